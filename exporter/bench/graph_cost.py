"""What a step of a bundle's graph has to read and to compute at least: its linear layers, counted from the graph.

A matrix with N · K numbers costs 2 · N · K operations for each row of activations that it is multiplied with, and its
bytes once for each step. Attention, norms and activations are not counted. Of E experts a token needs the top K only.

Letters: B batch rows, T tokens of a step, N and K sizes of a matrix, E experts.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.bundle import Bundle

if TYPE_CHECKING:
    import onnx_ir as ir

_EXPERTS = ("MixtureOfExperts", "QuantizedMixtureOfExperts")
_QUANTIZED = ("MatMulNBits", "QuantizedMatMul", "QuantizedMixtureOfExperts")
_LINEAR = ("MatMul", "Gemm", "StoredMatMul", *_QUANTIZED, *_EXPERTS)
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class LinearCost:
    """One node of the graph that multiplies with weights.

    nbytes: of all its weights, as an engine holds them. numbers: how many weights these are, block by block.
    chosen, experts: a token needs `chosen` of `experts` equal parts; both are 1 for an ordinary matrix.
    quantized: computed in whole numbers of 8 bits. head: its rows are the logits that are asked for, not all tokens.
    """

    node: str
    op: str
    plugin: bool
    nbytes: int
    numbers: int
    chosen: int
    experts: int
    quantized: bool
    head: bool

    def operations(self, tokens: int, logits: int) -> int:
        """For `tokens` tokens of which `logits` are followed by logits."""
        return 2 * self.numbers * self.chosen * (logits if self.head else tokens) // self.experts

    def bytes_read(self, rows: int) -> int:
        """In a step of one token in each of `rows` rows: of experts, as many as the tokens can choose at most."""
        return self.nbytes * min(rows * self.chosen, self.experts) // self.experts


@dataclass(frozen=True, slots=True)
class GraphCost:
    """All linear nodes of a graph, and the names of all nodes that are plugin ops, each with its op."""

    linear: tuple[LinearCost, ...]
    plugins: dict[str, str]

    def operations(self, tokens: int, logits: int, *, quantized: bool) -> int:
        """Of the nodes that are computed in whole numbers, or of the others."""
        return sum(cost.operations(tokens, logits) for cost in self.linear if cost.quantized == quantized)


def require_packages() -> None:
    """Raises ModuleNotFoundError now, and not after all measurements, when an install cannot read graphs.

    The packages are imported only then, since what they take would count among an engine's memory.
    """
    for name in ("onnx", "onnx_ir"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def graph_cost(bundle: Bundle, native: Collection[str]) -> GraphCost:
    """Count the graph of `bundle`. No weight is read. native: the plugin ops that run as kernels of their own.

    Weights that the graph makes out of stored ones in float32 count as float32, for an engine makes them when it loads.
    The same goes for a StoredMatMul whose body runs.
    """
    import onnx_ir as ir

    from graph_passes.ops import DOMAIN

    model = ir.load(bundle.file(bundle.manifest.graph.file))
    constant = _constants(model.graph)
    heads = _heads(model.graph, bundle.manifest.graph.logits)
    found = []
    for node in model.graph:
        weights = [value for value in node.inputs if value is not None and value in constant and _rank(value) >= 2]
        if node.op_type not in _LINEAR or not weights:
            continue
        plugin = node.domain == DOMAIN
        experts, chosen = 1, 1
        if node.op_type in _EXPERTS:
            experts, chosen = _extents(weights[0])[0], _experts_of_a_token(node)
        found.append(
            LinearCost(
                node=node.name or "",
                op=node.op_type,
                plugin=plugin,
                nbytes=_held_bytes(node, weights, native),
                numbers=_numbers(node, weights),
                chosen=chosen,
                experts=experts,
                quantized=node.op_type in _QUANTIZED,
                head=node in heads,
            )
        )
    return GraphCost(tuple(found), {node.name or "": node.op_type for node in model.graph if node.domain == DOMAIN})


def _constants(graph: ir.Graph) -> set[ir.Value]:
    """Initialisers, and whatever is made out of nothing else."""
    constant = set(graph.initializers.values())
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if inputs and all(value in constant for value in inputs):
            constant.update(node.outputs)
    return constant


def _heads(graph: ir.Graph, logits: str) -> set[ir.Node]:
    """The linear node that gives out the logits, behind whatever only reshapes them."""
    value = next((output for output in graph.outputs if output.name == logits), None)
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in _LINEAR:
            return {node}
        value = node.inputs[0] if node.inputs else None
    return set()


def _held_bytes(node: ir.Node, weights: Sequence[ir.Value], native: Collection[str]) -> int:
    if node.op_type == "StoredMatMul" and node.op_type not in native:
        return _FLOAT_BYTES * _count(weights)
    return sum(math.prod(_extents(value)) * int(value.dtype.itemsize) for value in weights if value.dtype is not None)


def _numbers(node: ir.Node, weights: Sequence[ir.Value]) -> int:
    """Of a quantised matrix from its attributes or its packed bytes, else from the shapes."""
    if node.op_type not in _QUANTIZED:
        return _count(weights)
    if node.op_type in _EXPERTS:
        bits = node.attributes["bits"].as_int()
        packed = [value for value in weights if _rank(value) == 4]  # [E, rows, blocks, bytes]
        return _count(packed) * 8 // bits
    return node.attributes["N"].as_int() * node.attributes["K"].as_int()


def _experts_of_a_token(node: ir.Node) -> int:
    chosen = node.inputs[2]
    return _extents(chosen)[-1] if chosen is not None else 1


def _count(values: Sequence[ir.Value]) -> int:
    return sum(math.prod(_extents(value)) for value in values)


def _rank(value: ir.Value) -> int:
    return 0 if value.shape is None else len(value.shape)


def _extents(value: ir.Value) -> list[int]:
    """A constant's sizes, which shape inference knows."""
    return [extent for extent in value.shape or () if isinstance(extent, int)]
