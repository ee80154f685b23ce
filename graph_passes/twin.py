"""Proofs of what is too large to run: on a twin, the same program traced with small sizes.

The experts of a published mixture hold a billion numbers, and no proof can run them. Their graph does not depend on
the sizes, though: the twin is traced from the same code with a small hidden and intermediate size, is matched and
proved in full, and each of its matches is carried over to the large graph under the same names. Before that, the two
regions are compared node for node: same operators, connections, attributes and constants. Only whole numbers may
differ, and only as one table of sizes (twin 37 ↔ 4,096) that holds throughout both graphs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir

from graph_passes.driver_types import Adapted, Match, Operand, source_of
from graph_passes.graph import Dim, Refusal, constant, dims
from graph_passes.ops.base import OPSET
from graph_passes.region import IR_VERSION
from graph_passes.unbound import is_unbound
from runtime.errors import ProofError

_NUMBER = re.compile(r"\b(\d+)\b")


class Twin:
    """A small model and the large one that it stands for; both are rewritten in step."""

    def __init__(self, small: ir.Model, large: ir.Model) -> None:
        self.small, self._large = small, large
        self._sizes: dict[int, int] = {}

    def transplant(self, match: Match) -> Match:
        """The match of the small model's graph, in the large one.

        Raises ProofError when the two regions are not the same but for sizes.
        """
        values = {str(v.name): v for v in _values(self._large)}
        nodes = {str(node.name): node for node in self._large.graph}
        missing = [str(v.name) for v in (*match.sources, *match.outputs) if str(v.name) not in values] + (
            [] if str(match.anchor.name) in nodes else [str(match.anchor.name)]
        )
        if missing:
            raise ProofError(f"{match.place}: the small twin has {missing[0]!r} and the model has not.")
        self._compare(match, values)
        try:
            return replace(
                match,
                anchor=nodes[str(match.anchor.name)],
                inputs=tuple(
                    self._moved(match, operand, values[str(source_of(operand).name)]) for operand in match.inputs
                ),
                outputs=tuple(values[str(v.name)] for v in match.outputs),
            )
        except Refusal as refusal:  # the sizes do not go together as those of the twin did
            raise self._differ(match, refusal.reason) from refusal

    def _compare(self, match: Match, values: dict[str, ir.Value]) -> None:
        """Walk both regions from their outputs to their sources at once."""
        stack = [(v, values[str(v.name)]) for v in match.outputs]
        counterpart = {v: values[str(v.name)] for v in match.sources}
        for small, large in counterpart.items():
            self._same_shape(match, small, large)
        while stack:
            small, large = stack.pop()
            if small in counterpart:
                if counterpart[small] is not large:
                    known = counterpart[small].name
                    raise self._differ(match, f"{small.name!r} is {known!r} in one place and {large.name!r} in another")
                continue
            counterpart[small] = large
            self._same_shape(match, small, large)
            a, b = small.producer(), large.producer()
            if (a is None) != (b is None):
                raise self._differ(match, f"{small.name!r} is computed in one and given in the other")
            if a is None or b is None:
                self._same_constant(match, small, large)
                continue
            if (a.domain, a.op_type, a.name) != (b.domain, b.op_type, b.name) or len(a.inputs) != len(b.inputs):
                raise self._differ(match, f"{a.op_type} {a.name!r} is {b.op_type} {b.name!r}")
            if small.index() != large.index():
                raise self._differ(match, f"{small.name!r} is another output of {a.name!r} than {large.name!r}")
            self._same_attributes(match, a, b)
            for x, y in zip(a.inputs, b.inputs, strict=True):
                if (x is None) != (y is None):
                    raise self._differ(match, f"{a.name!r} has an input that {b.name!r} has not")
                if x is not None and y is not None:
                    stack.append((x, y))

    def _same_shape(self, match: Match, small: ir.Value, large: ir.Value) -> None:
        if small.shape is None or large.shape is None:
            if (small.shape is None) != (large.shape is None):
                raise self._differ(match, f"only one {small.name!r} has a shape")
            return
        a, b = dims(small), dims(large)
        if len(a) != len(b) or small.dtype != large.dtype:
            raise self._differ(match, f"{small.name!r} is {a} and {b}")
        for x, y in zip(a, b, strict=True):
            self._same_extent(match, x, y, str(small.name))

    def _same_extent(self, match: Match, small: Dim, large: Dim, name: str) -> None:
        if isinstance(small, int) and isinstance(large, int):
            if self._sizes.setdefault(small, large) != large:
                reason = f"{small} stands for {self._sizes[small]} elsewhere and for {large} in {name!r}"
                raise self._differ(match, reason)
            return
        if str(small).startswith("?") and str(large).startswith("?"):
            return  # neither has a name, see graph.dims
        a, b = (_NUMBER.split(str(extent)) for extent in (small, large))
        if isinstance(small, int) or isinstance(large, int) or a[::2] != b[::2]:
            raise self._differ(match, f"{name!r} has an extent of {small} and {large}")
        for x, y in zip(a[1::2], b[1::2], strict=True):  # such as the 8 in 8*B*T
            self._same_extent(match, int(x), int(y), name)

    def _same_constant(self, match: Match, small: ir.Value, large: ir.Value) -> None:
        if small.const_value is None or is_unbound(small):
            if (small.const_value is None) != (large.const_value is None) or is_unbound(small) != is_unbound(large):
                raise self._differ(match, f"{small.name!r} is of two kinds")
            return
        a, b = constant(small), constant(large)
        if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
            raise self._differ(match, f"the constants {small.name!r} have two forms")
        if np.issubdtype(a.dtype, np.integer):
            for x, y in zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True):
                self._same_extent(match, x, y, str(small.name))
        elif not np.array_equal(a, b):
            raise self._differ(match, f"the constants {small.name!r} are {a} and {b}")

    def _same_attributes(self, match: Match, small: ir.Node, large: ir.Node) -> None:
        if small.attributes.keys() != large.attributes.keys():
            raise self._differ(match, f"{small.name!r} has other attributes")
        for name, a in small.attributes.items():
            b = large.attributes[name]
            xs, ys = _numbers(a), _numbers(b)
            if a.type != b.type or len(xs) != len(ys):
                raise self._differ(match, f"{name} of {small.name!r} is {xs} and {ys}")
            for x, y in zip(xs, ys, strict=True):
                if isinstance(x, int) and isinstance(y, int):
                    self._same_extent(match, x, y, f"{small.name}.{name}")
                elif x != y:
                    raise self._differ(match, f"{name} of {small.name!r} is {x} and {y}")

    def _moved(self, match: Match, operand: Operand, source: ir.Value) -> Operand:
        """The operand with `source` in the place of its own, its shape told by the table of sizes.

        Raises ProofError when its nodes give another shape there: they hold a size that is the twin's.
        """
        if not isinstance(operand, Adapted):
            return source
        shape = tuple(
            self._sizes.get(extent, extent) if isinstance(extent, int) else extent for extent in operand.shape
        )
        for due, found in zip(shape, _inferred(operand, source), strict=True):
            if isinstance(found, int) and found != due:
                raise self._differ(match, f"{source.name!r} {operand.how} has an extent of {found} where {due} is due")
        return replace(operand, source=source, shape=shape)

    @staticmethod
    def _differ(match: Match, reason: str) -> ProofError:
        return ProofError(
            f"{match.place}: this region is too large to be run, and the small twin that should prove it is another "
            f"graph: {reason}. Nothing was changed."
        )


def _numbers(attribute: ir.Attr) -> list[object]:
    value = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        return [str(attribute.as_tensor().dtype), *attribute.as_tensor().numpy().reshape(-1).tolist()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _values(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _inferred(operand: Adapted, source: ir.Value) -> tuple[Dim, ...]:
    """The shape that the operand's nodes make of `source`, as far as ONNX can tell."""
    given = ir.Value(name="source", type=source.type, shape=source.shape)
    nodes = list(operand.build(given))
    result = nodes[-1].outputs[0]
    for index, value in enumerate(v for node in nodes for v in node.outputs):
        value.name = f"v{index}"
    result.type = ir.TensorType(operand.dtype)
    graph = ir.Graph([given], [result], nodes=nodes, opset_imports={"": OPSET}, name="adapter")
    proto = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION))
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    return dims(inferred.graph.outputs[0])
