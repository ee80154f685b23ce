"""The real CUDA provider takes all that the passes make, in both narrow types, and captures it as a CUDA graph."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.lower.ort.operators import lower_operators
from tests.graph_passes.lower.ort.operator_cases import dense, gated, quantized, quantized_experts, stored
from tests.support.onnxruntime_gpu import CUDA, Observed, Step, run_steps
from tests.support.ort_lowering import small

NORMS = """g (float[B,T,64] a, float[B,T,64] b, float[64] w) => (float[B,T,64] y, float[B,T,64] z) {
    s = Add (a, b)
    y = cierzo.RMSNorm <epsilon = 1e-5> (s, w)
    z = cierzo.RMSNorm <epsilon = 1e-5> (a, w)
}"""
KERNELS = {
    "product": ("blas cublasGemmEx",),
    "four bits": ("MatMulFloat4Bits",),
    "eight bits, a part of a block": ("8Bits",),
    "norms": ("SkipLayerNorm", "LayerNorm"),
    "gated activation": ("ScaledSiLU", "OP_Mul"),
    "experts": ("TopK", "ScatterElements", "SoftmaxTopK"),
    "all experts": ("TopK", "ScatterElements", "SoftmaxTopK"),
    "many experts": ("TopK", "ScatterElements", "SoftmaxTopK"),
    "experts of four bits": ("TopK", "ScatterElements", "MoeFCGemm", "doGatedActivation"),
    "experts of eight bits, zero points": ("TopK", "ScatterElements", "MoeFCGemm", "doGatedActivation"),
}
"""Parts of the names of kernels that a case must come to."""


def case(name: str, kind: str) -> ir.Model:
    model = {
        "product": lambda: stored(kind, kind),
        "four bits": lambda: quantized(kind, kind, 256, 64, 4, 128),
        "eight bits, a part of a block": lambda: quantized(kind, kind, 72, 64, 8, 32, zero=True),
        "norms": lambda: small(NORMS),
        "gated activation": lambda: gated(kind),
        "experts": lambda: dense(6, 2, x=kind, w=kind),
        "all experts": lambda: dense(4, 4, x=kind, w=kind),
        "many experts": lambda: dense(128, 8, x=kind, w=kind),
        "experts of four bits": lambda: quantized_experts(x=kind),
        "experts of eight bits, zero points": lambda: quantized_experts(8, zero=True, x=kind),
    }[name]()
    lower_operators(model)
    return _with_constants(model) if "bits" in name and "experts" in name else model


def _with_constants(model: ir.Model) -> ir.Model:
    types = {ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16, ir.DataType.UINT8: np.uint8}
    for value in list(model.graph.inputs):
        if value.name in ("x", "logits"):
            continue
        assert value.shape is not None
        assert value.dtype is not None
        zeros = np.zeros(value.shape.numpy(), types[value.dtype])
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(zeros, name=value.name)
        model.graph.register_initializer(value)
    return model


@cache
def observed() -> dict[tuple[str, str], Observed]:
    """All cases at once: a process takes longer to begin than they do."""
    names = [(name, kind) for name in KERNELS for kind in ("bfloat16", "float16")]
    sizes = {"B": 1, "T": 1, "N": 1}
    graphs = [ir.to_proto(case(*each)).SerializeToString() for each in names]
    steps = [Step(graph, sizes, cuda_graph=True, runs=2) for graph in graphs]
    return dict(zip(names, run_steps(steps), strict=True))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", KERNELS)
def test_runs_on_cuda_and_is_captured(name: str, kind: str) -> None:
    seen = observed()[name, kind]
    assert seen.error is None
    assert list(seen.assigned) == [CUDA]
    assert not seen.violations
    assert seen.captured
    for part in KERNELS[name]:
        assert any(part in launch for launch in seen.launches), (part, sorted(set(seen.launches)))
