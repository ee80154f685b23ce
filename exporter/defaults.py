"""What an export takes when nobody says otherwise. Without imports, so that `cierzo --help` can show it at once."""

from __future__ import annotations

DEFAULT_CHUNK = 256
"""Most tokens of a step, where no window is smaller."""

LEAST_CHUNK = 16
"""A chunk is not made smaller than this for the sake of a small window."""

DEFAULT_CONTEXT = 4096
"""Most positions of a full-attention buffer, where the checkpoint was trained for more."""

DEFAULT_MAX_BATCH = 8
"""Most rows of a session."""

WEIGHT_KINDS = ("stored", "fp32", "int8", "int4")
"""What becomes of weights: left as the checkpoint has them (the default), converted, or quantised."""

QUANTIZED_KINDS = {"int8": 8, "int4": 4}
"""The quantised ones, and their bits."""

DEFAULT_BLOCK_SIZE = 32
"""Weights that share a scale."""

QUANTIZERS = ("search", "rtn")
"""How scales are found (`exporter.quantize.blocks`); the first one is the default."""

SCALES = ("float16", "float32")
"""Types of the scales; the first one is the default."""

GROUPS = ("lm_head", "attention", "mlp", "experts", "first", "last", "embed", "router")
"""Names for parameters that stay more precise; mlp and experts name the same."""

KV_KINDS = ("float32", "float16", "int8")
"""Types that KV buffers can have. The first is the default, and with quantised weights the second."""

LAYOUTS = ("huggingface", "native")
"""Layouts of checkpoints that can be asked for; without asking, it is the one that the folder has."""

TRACING, FUSING, WRITING, HASHING, VERIFYING = "tracing", "fusing", "writing weights", "hashing", "verifying"
TO_THE_GPU = "weights to the GPU"
BYTE_STAGES = (WRITING, HASHING, VERIFYING, TO_THE_GPU)
"""Stages whose progress counts bytes."""

FRONTENDS = ("reference", "transformers")
"""Where the traced model comes from; the first one is the default."""

ATTENTIONS = ("sdpa", "eager")
"""How the front end transformers spells attention; the first one is the default."""

RUN_BACKENDS = ("onnxruntime", "onnxruntime-cuda", "tensorrt")
"""Backends that bundles run on, as `runtime.backends` has them; the first one is the default."""

ENGINE_BACKENDS = ("tensorrt", "onnxruntime-cuda")
"""Backends that engines are built for; the first one is the default."""

ENGINE_FLAVORS = ("tensorrt", "tensorrt-rtx")
"""The names in `runtime.tensorrt.flavor.FLAVORS`."""

ARITHMETIC_KINDS = ("bfloat16", "float16", "float32")
"""Types that an engine can compute in; by default it is the one that the weights are stored in."""

RING_KINDS = (*ARITHMETIC_KINDS, "float8")
"""Types that an engine's KV rings can have; by default the one that it computes in."""

ENGINE_WEIGHTS = ("weightless", "embedded")
"""Whether an engine's plans read the bundle's weights when they are loaded (the default), or hold their own."""

BUILDING = "building the {} plan"
"""The stage of a plan that is built, in percent."""

COMPILING = "compiling CUDA kernels"
"""The stage in which the plugins' kernels are compiled."""

LOWERING = "lowering the graph"
"""The stage in which an engine of graphs is made, by graph."""
