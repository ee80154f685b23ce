"""A bundle's graph as an engine is built from it: in the engine's arithmetic, and with every weight as an input.

The graph that leaves here holds no weight at all. The builder decides what an input becomes: it stays one, which all
plans of an engine read from one place, or it is replaced by a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common

from exporter.bundle_graph import load_graph
from graph_passes.lower.arithmetic import ARITHMETIC, RINGS, lower_arithmetic
from graph_passes.lower.bodies import refresh_bodies
from graph_passes.lower.dequantize import dequantize_products
from graph_passes.lower.packed_attention import pack_attention
from graph_passes.lower.products import merge_products
from graph_passes.ops.base import DOMAIN
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION, ROLLING_ATTENTION_INT8
from graph_passes.ops.stored_matmul import STORED_MATMUL
from runtime.bundle import Bundle
from runtime.engine_info import INPUT, REFIT, EngineWeight
from runtime.errors import BackendError, BundleError
from runtime.json_files import brief
from runtime.weight_expression import Cast, Concat, Expression, Rows, Signed, Stored, files_of, pieces

_SPELLED = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.UINT8: "U8",
    ir.DataType.INT8: "I8",
    ir.DataType.INT4: "I4",
}
_WEIGHTS_OF = {STORED_MATMUL.name: (1,), MIXTURE_OF_EXPERTS.name: (3, 4, 5)}
"""Ops that read weights in the type that they compute in, and where."""


@dataclass(frozen=True, slots=True)
class LoweredGraph:
    """onnx: the model's bytes. weights: its inputs beyond the bundle's. orders: index lists that expressions name."""

    onnx: bytes
    weights: tuple[EngineWeight, ...]
    orders: Mapping[str, tuple[int, ...]]


def lower_for_engine(bundle: Bundle, arithmetic: str, kv: str) -> LoweredGraph:
    """The graph of `bundle` with products in `arithmetic` and rings of type `kv` (keys of ARITHMETIC and RINGS).

    Inputs and outputs keep the names of the manifest; logits are float32. Weights that are rounded into a type of less
    range are read once. Raises BackendError for what no engine can take in that arithmetic, BundleError for weights
    whose numbers it does not hold, FusionError as the passes do.
    """
    if arithmetic not in ARITHMETIC or kv not in RINGS:
        raise BackendError(
            f"An engine computes in {', '.join(ARITHMETIC)} with rings of {', '.join(RINGS)}, not in {arithmetic} with "
            f"{kv}."
        )
    model = load_graph(bundle)
    _refuse(model, bundle, arithmetic)
    refresh_bodies(model)
    lower_arithmetic(model, arithmetic, kv)
    merge_products(model)
    pack_attention(model)
    weights = _Weights(model)
    dequantize_products(model, ARITHMETIC[arithmetic], weights.bind)
    weights.detach_all()
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    if kv == "float8":
        _mark_what_is_beyond(model)
    for weight in weights.made():
        _refuse_other_files(bundle, weight)
        if isinstance(weight.expression, Cast) and weight.expression.to != "F32":
            for _ in pieces(weight.expression, bundle.file, weights.orders):
                pass  # made as when it is loaded, which refuses what would become infinite: better here than there
    return LoweredGraph(ir.to_proto(model).SerializeToString(deterministic=True), weights.made(), weights.orders)


def _refuse(model: ir.Model, bundle: Bundle, arithmetic: str) -> None:
    if any((node.domain, node.op_type) == (DOMAIN, ROLLING_ATTENTION_INT8.name) for node in model.graph):
        raise BackendError(
            f"The bundle {bundle.path} has int8 KV buffers, and this backend keeps its own kinds. Export the "
            "checkpoint with --kv float16 (kv='float16')."
        )
    quantization = bundle.manifest.weights.quantization
    if quantization is not None and quantization.scales != arithmetic:
        raise BackendError(
            f"The bundle's quantised weights have {quantization.scales} scales, and products with them are computed in "
            f"the type of the scales, not in {arithmetic}. Build with --arithmetic float16 from a bundle with float16 "
            "scales, which is what an export writes by default."
        )


def _refuse_other_files(bundle: Bundle, weight: EngineWeight) -> None:
    known = bundle.manifest.files.keys() | bundle.manifest.weights.files.keys()
    if other := files_of(weight.expression) - known:
        raise BundleError(
            f"The graph of {bundle.path} reads {weight.name} from {brief(other.pop())}, which is no file of the "
            "bundle. Export the checkpoint again."
        )


def _mark_what_is_beyond(model: ir.Model) -> None:
    """Numbers that e4m3 cannot hold become NaN in a ring, not its largest number, as in Cierzo's kernels."""
    for function in model.functions.values():
        for node in function if function.name == ROLLING_ATTENTION.name else ():
            like = node.inputs[1] if node.op_type == "CastLike" else None
            if like is not None and like.name in ROLLING_ATTENTION.inputs[5:7]:
                node.attributes["saturate"] = ir.AttrInt64("saturate", 0)


class _Weights:
    """Turns the weights of a graph into inputs, each once for each type that it is read in."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._inputs: dict[tuple[str, str], ir.Value] = {}
        self._names: dict[ir.Value, str] = {}
        self._made: list[EngineWeight] = []
        self.orders: dict[str, tuple[int, ...]] = {}

    def made(self) -> tuple[EngineWeight, ...]:
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
            for index, value in enumerate(node.inputs):
                if value is None:
                    continue
                expression = self._known(value, known)
                if expression is None:
                    continue
                assert value.shape is not None
                assert value.dtype is not None
                computes = node.domain == DOMAIN and index in _WEIGHTS_OF.get(node.op_type, ())
                dtype = node.inputs[0].dtype if computes and node.inputs[0] is not None else value.dtype
                assert dtype is not None
                made = self._input(value, expression, dtype, value.shape.numpy(), INPUT)
                node.replace_input_with(index, made)

    def _known(self, value: ir.Value, known: dict[ir.Value, Expression | None]) -> Expression | None:
        if value not in known:
            known[value] = self._expression(value)
        return known[value]

    def _input(
        self, weight: ir.Value, expression: Expression, dtype: ir.DataType, shape: Sequence[int], role: str
    ) -> ir.Value:
        spelled, name = _SPELLED[dtype], self._names.setdefault(weight, str(weight.name))
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
            return Stored(str(tensor.location), tensor.offset or 0, _SPELLED[tensor.dtype], tuple(tensor.shape.numpy()))
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type == "Concat" and node.attributes["axis"].as_int() == 0:
            parts = [None if v is None else self._expression(v) for v in node.inputs]
            found = [part for part in parts if part is not None]
            return Concat(tuple(found)) if len(found) == len(parts) else None
        source = node.inputs[0]
        below = None if source is None else self._expression(source)
        if below is None or node.op_type not in ("Gather", "Cast"):
            return None
        if node.op_type == "Cast":
            to = ir.DataType(node.attributes["to"].as_int())
            return _as(below, _SPELLED[to]) if to in ARITHMETIC.values() else None
        order = node.inputs[1]
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if order is None or order.const_value is None or axis != 0 or isinstance(order.const_value, ir.ExternalTensor):
            return None
        name = str(order.name)
        self.orders[name] = tuple(int(index) for index in order.const_value.numpy().reshape(-1))
        return Rows(below, name)


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
