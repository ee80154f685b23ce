"""Turns the weights of a lowered graph into inputs, each described by how it is made of the bundle's files.

A weight is what lies in a file, and whatever nodes make of such alone: parts put together, rows in another order, a
cast. Those nodes are left without readers, and nothing of a weight stays in the graph.

Letters: E experts, N rows and K columns of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graph_passes.lower.arithmetic import ARITHMETIC
from runtime.bundle import Bundle
from runtime.engine_info import INPUT, REFIT, EngineWeight
from runtime.errors import BundleError
from runtime.json_files import brief
from runtime.weight_expression import NUMPY_TYPES, Cast, Concat, Expression, Rows, Signed, Stored, files_of, pieces

SPELLED = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.UINT8: "U8",
    ir.DataType.INT8: "I8",
    ir.DataType.INT4: "I4",
}


@dataclass(frozen=True, slots=True)
class Reader:
    """How an op reads weights. computed: the inputs that have the type of its first one, in which it computes.

    role: what its weights become.
    """

    computed: tuple[int, ...]
    role: str = INPUT


class WeightInputs:
    """Turns the weights of a graph into inputs, each once for each type that it is read in.

    readers: by domain and name, the ops that read weights in another way than with the type that they are stored in.
    orders: index lists that expressions name, filled while weights are met.
    """

    def __init__(self, model: ir.Model, readers: Mapping[tuple[str, str], Reader]) -> None:
        self._model = model
        self._readers = readers
        self._inputs: dict[tuple[str, str], ir.Value] = {}
        self._names: dict[ir.Value, str] = {}
        self._made: list[EngineWeight] = []
        self.orders: dict[str, tuple[int, ...]] = {}

    def made(self) -> tuple[EngineWeight, ...]:
        """The weights that are inputs now, in the order of the graph's inputs."""
        return tuple(self._made)

    def bind(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[int], fuses: bool) -> ir.Value:
        """The input that takes the place of `value`, a weight that nodes make or an initializer; see `Bind`.

        Only as a constant does a weight become part of its product, and so it is filled into every plan.
        """
        expression = self._expression(value)
        assert expression is not None, value.name
        return self._input(value, expression, dtype, shape, REFIT if fuses else INPUT)

    def detach_all(self) -> None:
        """Every weight that is still read by a node becomes an input, of the type that the node computes in."""
        known: dict[ir.Value, Expression | None] = {}
        for node in list(self._model.graph):
            if node.outputs and self._known(node.outputs[0], known) is not None:
                continue  # makes a weight, and is read itself by what uses it
            reader = self._readers.get((node.domain, node.op_type), Reader(()))
            for index, value in enumerate(node.inputs):
                if value is None:
                    continue
                expression = self._known(value, known)
                if expression is None:
                    continue
                assert value.shape is not None
                assert value.dtype is not None
                first = node.inputs[0]
                dtype = first.dtype if index in reader.computed and first is not None else value.dtype
                assert dtype is not None
                made = self._input(value, expression, dtype, value.shape.numpy(), reader.role)
                node.replace_input_with(index, made)

    def _known(self, value: ir.Value, known: dict[ir.Value, Expression | None]) -> Expression | None:
        if value not in known:
            known[value] = self._expression(value)
        return known[value]

    def _input(
        self, weight: ir.Value, expression: Expression, dtype: ir.DataType, shape: Sequence[int], role: str
    ) -> ir.Value:
        spelled, name = SPELLED[dtype], self._names.setdefault(weight, str(weight.name))
        if (name, spelled) not in self._inputs:
            unique = f"{name}.{spelled.lower()}" if name in {known for known, _ in self._inputs} else name
            if weight.is_initializer() and weight.name == name:  # who reads it still does, until it is met as well
                self._model.graph.initializers.pop(name)
                weight.name = f"{name}.stored"
                self._model.graph.register_initializer(weight)
            value = ir.Value(name=unique, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            self._model.graph.inputs.append(value)
            self._inputs[name, spelled] = value
            self._made.append(EngineWeight(unique, spelled, tuple(shape), role, _as(expression, spelled)))
        return self._inputs[name, spelled]

    def _expression(self, value: ir.Value) -> Expression | None:
        """How `value` is made of files alone; None when it is not."""
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            assert tensor.dtype is not None
            return Stored(str(tensor.location), tensor.offset or 0, SPELLED[tensor.dtype], tuple(tensor.shape.numpy()))
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type == "Concat":
            parts = [None if v is None else self._expression(v) for v in node.inputs]
            found = [part for part in parts if part is not None]
            if len(found) < len(parts):
                return None
            axis = node.attributes["axis"].as_int()
            if axis == 0:
                return Concat(tuple(found))
            matrices = self._matrices(value) if axis == 1 else None
            return None if matrices is None else Concat(tuple(matrices))
        source = node.inputs[0] if node.inputs else None
        below = None if source is None else self._expression(source)
        if below is None or node.op_type not in ("Gather", "Cast", "Reshape"):
            return None
        if node.op_type == "Reshape":
            return below  # the same bytes
        if node.op_type == "Cast":
            to = ir.DataType(node.attributes["to"].as_int())
            return _as(below, SPELLED[to]) if to in ARITHMETIC.values() else None
        order = node.inputs[1]
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if order is None or order.const_value is None or isinstance(order.const_value, ir.ExternalTensor):
            return None
        assert source is not None
        matrices = self._matrices(source) if axis == 1 else None
        if axis > 1 or (axis == 1 and matrices is None):
            return None
        name = str(order.name)
        self.orders[name] = tuple(int(index) for index in order.const_value.numpy().reshape(-1))
        return Rows(below, name) if matrices is None else Concat(tuple(Rows(matrix, name) for matrix in matrices))

    def _matrices(self, stack: ir.Value) -> list[Expression] | None:
        """The matrices [N, K] of a stack [E, N, K], one for each expert; None where they cannot be told apart.

        Of stacks that were put together along axis 1, each is an expert's matrices one after the other.
        """
        node = stack.producer()
        if node is None or node.op_type != "Concat" or node.attributes["axis"].as_int() != 1:
            expression = self._expression(stack)
            return None if expression is None else _experts(expression)
        split = [None if value is None else self._matrices(value) for value in node.inputs]
        found = [matrices for matrices in split if matrices is not None]
        if len(found) < len(split) or len({len(matrices) for matrices in found}) > 1:
            return None
        return [Concat(matrices) for matrices in zip(*found, strict=True)]


def check_weight(bundle: Bundle, weight: EngineWeight, orders: Mapping[str, tuple[int, ...]]) -> None:
    """Raises BundleError for a weight from a file that is not the bundle's, or one that its type does not hold.

    Weights that are rounded into a type of less range are read once for that.
    """
    known = bundle.manifest.files.keys() | bundle.manifest.weights.files.keys()
    if other := files_of(weight.expression) - known:
        raise BundleError(
            f"The graph of {bundle.path} reads {weight.name} from {brief(other.pop())}, which is no file of the "
            "bundle. Export the checkpoint again."
        )
    if _narrows(weight.expression):
        for _ in pieces(weight.expression, bundle.file, orders):
            pass  # made as when it is loaded, which refuses what would become infinite: better here than there


def filled_from(weights: Sequence[EngineWeight]) -> str:
    """From which files an engine's weights are filled, for a person; nothing where it has none."""
    files = sorted({file for weight in weights for file in files_of(weight.expression)})
    return f"filled from {', '.join(files)} when it is loaded" if files else ""


def _narrows(expression: Expression) -> bool:
    if isinstance(expression, Stored):
        return False
    if isinstance(expression, Concat):
        return any(_narrows(part) for part in expression.parts)
    return (isinstance(expression, Cast) and expression.to != "F32") or _narrows(expression.of)


def _experts(stack: Expression) -> list[Expression] | None:
    """The matrices [N, K] of a stack [E, N, K], one after the other."""
    if isinstance(stack, Stored):
        count, *matrix = stack.shape
        size = math.prod(matrix) * np.dtype(NUMPY_TYPES[stack.dtype]).itemsize
        return [replace(stack, offset=stack.offset + index * size, shape=tuple(matrix)) for index in range(count)]
    if isinstance(stack, Concat):
        parts = [_experts(part) for part in stack.parts]
        found = [part for part in parts if part is not None]
        return [matrix for part in found for matrix in part] if len(found) == len(parts) else None
    if isinstance(stack, Rows):
        return None
    below = _experts(stack.of)
    return None if below is None else [replace(stack, of=matrix) for matrix in below]


def _as(expression: Expression, dtype: str) -> Expression:
    """`expression` in the type `dtype`, cast or made signed if it has another."""
    has = _dtype(expression)
    if has == dtype:
        return expression
    return Signed(expression, dtype) if has == "U8" else Cast(expression, dtype)


def _dtype(expression: Expression) -> str:
    if isinstance(expression, Stored):
        return expression.dtype
    if isinstance(expression, Concat):
        return _dtype(expression.parts[0])
    return _dtype(expression.of) if isinstance(expression, Rows) else expression.to
