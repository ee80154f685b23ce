"""Engines of graphs, lowered from a bundle as `cierzo build` does it and run by ONNX Runtime's CPU provider.

What a GPU has and a CPU has not is put into the graphs: PagedAttention as a function body, and bfloat16 as float32
whose every result is rounded. All else, the runtime included, is the real thing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import helper

from exporter.build.cuda_placement import flat
from exporter.build.step_graphs import lower_for_steps
from exporter.build.top_logits import top_logits_model
from exporter.build.value_types import value_types
from runtime import Session
from runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaEngine
from runtime.bundle import Bundle, read_bundle
from runtime.engine_info import DECODE, PREFILL
from runtime.step_engine_info import TOP, GraphFile, StepEngineInfo
from tests.support.bundles import Exported
from tests.support.host_place import host_place
from tests.support.paged_attention import with_paged_body

_NARROW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_folder = tempfile.TemporaryDirectory(prefix="cierzo-step-engines-")


def step_session(case: Exported, arithmetic: str) -> Session:
    """A session of the engine of `case` that computes in `arithmetic`, float32 among them."""
    bundle = read_bundle(case.bundle)
    return Session(bundle, step_engine(bundle, arithmetic))


def step_engine(bundle: Bundle, arithmetic: str) -> OnnxRuntimeCudaEngine:
    """The runtime's engine on the CPU."""
    graphs = lower_for_steps(bundle, arithmetic)
    models = {
        PREFILL: on_cpu(onnx.load_from_string(graphs.prefill)),
        DECODE: on_cpu(onnx.load_from_string(graphs.decode)),
        TOP: top_logits_model(bundle.manifest.model.vocab_size),
    }
    folder = Path(tempfile.mkdtemp(dir=_folder.name))
    files: Mapping[str, Path] = {name: folder / f"{name}.onnx" for name in models}
    for name, model in models.items():
        files[name].write_bytes(model.SerializeToString())
    info = StepEngineInfo(
        name="toy",
        backend="onnxruntime-cuda",
        version="1.31",
        arithmetic=arithmetic,
        kv=arithmetic,
        max_batch=bundle.manifest.kv.max_batch,
        chunk=bundle.manifest.kv.chunk,
        graph_sha256="",
        graphs={name: GraphFile(file.name, file.stat().st_size, "", {}) for name, file in files.items()},
        rings=graphs.rings,
        scratch=graphs.scratch,
        tensors=graphs.weights,
        orders=graphs.orders,
    )
    return OnnxRuntimeCudaEngine(bundle, info, files, host_place())


def on_cpu(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` for the CPU provider."""
    return with_paged_body(_widened(model))


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every node that reads or gives bfloat16 does so in float32, and its results are rounded."""
    model = flat(model)
    types = value_types(model)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    wide: dict[str, str] = {}

    def cast(source: str, target: str, to: ir.DataType) -> None:
        model.graph.node.append(helper.make_node("Cast", [source], [target], to=int(to)))

    for node in nodes:
        if node.op_type != "Cast" and any(types.get(name) == _NARROW for name in (*node.input, *node.output)):
            for index, name in enumerate(node.input):
                if types.get(name) == _NARROW:
                    if name not in wide:
                        wide[name] = f"{name}.wide"
                        cast(name, wide[name], _WIDE)
                    node.input[index] = wide[name]
            given = [name for name in node.output if types.get(name) == _NARROW]
            for index, name in enumerate(node.output):
                if name in given:
                    node.output[index] = f"{name}.unrounded"
            model.graph.node.append(node)
            for name in given:
                cast(f"{name}.unrounded", name, _NARROW)
        else:
            model.graph.node.append(node)
    del model.graph.value_info[:]
    return model
