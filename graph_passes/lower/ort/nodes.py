"""Putting nodes into a graph: each value with its type and shape, constants and casts once for all that read them.

Nothing here makes arithmetic on shapes. ONNX Runtime runs that on the CPU, whatever kernels there are, and a session
that leaves no node to the CPU refuses it. A shape that a Shape node gives may go into a Reshape or an Expand as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Extent = int | ir.SymbolicDim
MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


class Nodes:
    """Inserts nodes into a graph before a place in it, which may only move on."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self._model = model
        self._before = before
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def move_to(self, before: ir.Node) -> None:
        """Insert before this node from now on, which comes later in the graph than where nodes were inserted so far."""
        self._before = before

    def one(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType | None,
        shape: Sequence[Extent],
        attributes: Mapping[str, int | float | str] | None = None,
    ) -> ir.Value:
        """A node of the standard operator `op` that makes the value `name`."""
        return self.several(op, inputs, [(name, dtype, shape)], attributes)[0]

    def several(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[tuple[str, ir.DataType | None, Sequence[Extent]]],
        attributes: Mapping[str, int | float | str] | None = None,
        domain: str = "",
    ) -> list[ir.Value]:
        """A node that makes values of these names, types and shapes."""
        made = []
        for name, dtype, shape in outputs:
            assert dtype is not None, name
            made.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape)))
        node = ir.node(op, inputs, attributes, domain=domain, outputs=made, name=f"{made[0].name}.{op.lower()}")
        self._model.graph.insert_before(self._before, node)
        if domain:
            self._model.opset_imports[domain] = 1
            self._model.graph.opset_imports[domain] = 1
        return made

    def integers(self, numbers: npt.ArrayLike) -> ir.Value:
        """An int64 constant: a scalar for a number, and as many axes as `numbers` has otherwise."""
        array = np.asarray(numbers, np.int64)
        name = f"attention.integers_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.reshape(-1)[:4]))}"
        known, unique, tries = self._model.graph.initializers, name, 0
        while unique in known:
            held = known[unique].const_value
            if held is not None and held.shape == array.shape and np.array_equal(held.numpy(), array):
                return known[unique]
            tries += 1
            unique = f"{name}.{tries}"
        tensor = ir.tensor(array, name=unique)
        value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self._model.graph.register_initializer(value)
        return value

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in type `dtype`; cast once for all readers, and not at all where it has that type."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._casts:
            name = f"{value.name}.{dtype.name.lower()}"
            self._casts[value, dtype] = self.one("Cast", [value], name, dtype, extents(value), {"to": int(dtype)})
        return self._casts[value, dtype]


def extents(value: ir.Value) -> list[Extent]:
    """The shape of a value that has one."""
    assert value.shape is not None, value.name
    return [*value.shape]


def times(*factors: Extent) -> Extent:
    """The product of extents as one."""
    number, symbols = 1, []
    for factor in factors:
        if isinstance(factor, int):
            number *= factor
        else:
            symbols.append(str(factor.value))
    if not symbols:
        return number
    return ir.SymbolicDim("*".join([*symbols, *([str(number)] if number != 1 else [])]))
