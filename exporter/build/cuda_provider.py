"""The kernels of ONNX Runtime's CUDA provider that engines rely on: their types, and what they want on the host.

Held against the provider itself by a test. Kernels that call cuDNN are not listed, since nothing else here needs that
library: reductions and convolutions. An op that is not listed is one that no engine has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

VERSION = "1.31"
"""Of ONNX Runtime, whose kernels these are."""

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

MICROSOFT = "com.microsoft"
"""The domain of the ops that ONNX Runtime adds to ONNX."""

_F = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_HALF = _F - {ir.DataType.FLOAT}
_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})
_NUMBERS = _F | _INTEGERS
_COMPARED = _NUMBERS - {ir.DataType.BFLOAT16}
_BYTES = frozenset({ir.DataType.UINT8, ir.DataType.INT8})
_BOOL = frozenset({ir.DataType.BOOL})
_ALL = _NUMBERS | _BYTES | _BOOL


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """What a kernel takes.

    inputs: types by index, of those inputs that have a type of their own; the others follow from these. host_inputs and
    host_outputs: by index, those that lie in the host's memory. outputs_like: the input whose type the outputs have,
    for an op that ONNX does not define.
    """

    inputs: Mapping[int, frozenset[ir.DataType]]
    host_inputs: frozenset[int] = frozenset()
    host_outputs: frozenset[int] = frozenset()
    outputs_like: int = 0


def _kernels(
    ops: str,
    types: Collection[ir.DataType],
    more: Mapping[int, frozenset[ir.DataType]] | None = None,
    *,
    host: Collection[int] = (),
    domain: str = "",
) -> dict[tuple[str, str], CudaKernel]:
    inputs = {0: frozenset(types), **(more or {})}
    return {(domain, op): CudaKernel(inputs, frozenset(host)) for op in ops.split()}


KERNELS: Mapping[tuple[str, str], CudaKernel] = {
    **_kernels("Add Sub Mul Div", _NUMBERS | _BYTES),
    **_kernels("Max Min Mod", _NUMBERS),
    **_kernels("Abs", _NUMBERS | _BYTES),
    **_kernels("Neg", _NUMBERS),
    **_kernels("Equal", _COMPARED | _BOOL),
    **_kernels("Less LessOrEqual Greater GreaterOrEqual", _COMPARED),
    **_kernels("And Or Not", _BOOL),
    **_kernels("IsNaN IsInf", _F),
    **_kernels("Where", _BOOL, {1: _NUMBERS | {ir.DataType.UINT8}}),
    **_kernels("Cos Sin Exp Erf Sqrt Tanh Sigmoid Relu Softplus Gelu", _F),
    **_kernels("Reciprocal Log Floor", _F - {ir.DataType.BFLOAT16}),
    **_kernels("Pow", _NUMBERS),
    **_kernels("Cast Identity Transpose Concat", _ALL),
    **_kernels("Gather GatherElements", _ALL, {1: _INTEGERS}),
    **_kernels("GatherND", _F | {ir.DataType.INT64, ir.DataType.BOOL}, {1: frozenset({ir.DataType.INT64})}),
    **_kernels("ScatterElements", _ALL, {1: _INTEGERS}),
    **_kernels("TensorScatter", _ALL),
    **_kernels("ConstantOfShape", frozenset({ir.DataType.INT64}), host=(0,)),
    **_kernels("Reshape Expand Squeeze Unsqueeze Split", _ALL, host=(1,)),
    **_kernels("Slice", _ALL, {1: _INTEGERS}, host=(1, 2, 3, 4)),
    **_kernels("Range", _INTEGERS | {ir.DataType.FLOAT}, host=(0, 1, 2)),
    **_kernels("CumSum", _COMPARED, {1: _INTEGERS}, host=(1,)),
    **_kernels("TopK", _NUMBERS | _BYTES, host=(1,)),
    **_kernels("MatMul Gemm RMSNormalization RotaryEmbedding Attention SimplifiedLayerNormalization", _F),
    ("", "Shape"): CudaKernel({0: _ALL}, host_outputs=frozenset({0})),
    **_kernels("FusedMatMul ScaledSiLU QuickGelu SkipSimplifiedLayerNormalization MoE", _F, domain=MICROSOFT),
    **_kernels("MatMulNBits", _F, {1: frozenset({ir.DataType.UINT8}), 2: _F}, domain=MICROSOFT),
    **_kernels("QMoE", _HALF, {2: frozenset({ir.DataType.UINT8}), 3: _HALF}, domain=MICROSOFT),
    **_kernels("PagedAttention", _HALF, {3: _HALF, 5: frozenset({ir.DataType.INT32})}, host=(16,), domain=MICROSOFT),
}
"""By domain and name."""
