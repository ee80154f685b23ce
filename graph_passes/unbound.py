"""A weight without data: dtype and shape are known, the bytes stay in the checkpoint until the bundle is written.

The passes see nothing else, and therefore no pass can copy, fold or hash gigabytes by accident.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import onnx_ir as ir


class UnboundWeight(ir.TensorProtocol):
    """Stands for a parameter in `Value.const_value`. Reading it raises FileNotFoundError.

    FileNotFoundError, because onnxscript's constant folding takes that one as "data not available" and goes on.
    """

    def __init__(self, name: str, dtype: ir.DataType, shape: ir.Shape) -> None:
        self.name: str | None = name
        self.dtype = dtype
        self.shape = shape
        self.doc_string: str | None = None
        self.raw: Any = None
        self.metadata_props: dict[str, str] = {}
        self.meta: dict[str, Any] = {}

    @property
    def size(self) -> int:
        return math.prod(self.shape.numpy())  # parameters have no symbolic dims

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize  # type: ignore[return-value]

    def _refuse(self) -> NoReturn:
        raise FileNotFoundError(f"weight {self.name} is not bound to data while the graph is being rewritten")

    def numpy(self) -> Any:
        self._refuse()

    def tobytes(self) -> bytes:
        self._refuse()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        self._refuse()

    def __dlpack__(self, *, stream: Any = None) -> Any:
        self._refuse()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __repr__(self) -> str:
        return f"UnboundWeight({self.name}, {self.dtype}, {self.shape})"


def is_unbound(value: ir.Value | None) -> bool:
    """Whether `value` is a parameter whose data is not there."""
    return value is not None and isinstance(value.const_value, UnboundWeight)
