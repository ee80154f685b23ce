"""Every node by itself: the nodes of a graph are fed with golden values, and what they give is held against golden.

A graph is cut at every value that the golden graph has too. What was an inner value becomes an input, so that no error
of one node reaches the next: a node that is off here is off because of itself, its attributes or its weights. Rings
are values like all others, and so a write into the wrong slot is seen in the step that makes it.

Letters: B rows, T tokens of a step, R of them whose logits are asked for: here all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporter.bisect.rings import is_store
from exporter.recipes import is_recipe, parameters
from exporter.taps import RollingTaps, module_path, modules_of, open_session
from graph_passes.lower.formats import packed_name
from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL
from graph_passes.ops.quantized_moe import QUANTIZED_MIXTURE_OF_EXPERTS
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION, ROLLING_ATTENTION_INT8
from graph_passes.prove import TOLERANCES, difference
from reference import parity
from runtime.chunking import PADDING_ID, Step
from runtime.manifest import Manifest
from runtime.rolling_kv import INT8

Array = npt.NDArray[Any]

GOT = "__got"
ROUNDING = 4 * TOLERANCES["float32"]
"""Largest difference between two spellings of one computation on the same inputs, relative to the largest magnitude.

Four times what a proof grants, as the sums of a real model are longer and its softmax more peaked than an example's.
"""

_ROUNDS_ACTIVATIONS = (QUANTIZED_MATMUL.name, QUANTIZED_MIXTURE_OF_EXPERTS.name)
_ROUNDED = 4.0
"""Times what is allowed for int8: activations in front of a product have outliers, which make their blocks coarse.

Measured on random models: up to 1.4 times. A runtime without 8-bit instructions does not round at all.
"""
_STORES = (ROLLING_ATTENTION.name, ROLLING_ATTENTION_INT8.name)

HELD_BYTES = 1 << 30
"""Golden values that are held at once; the graph is compared in as many parts as that takes."""


@dataclass(frozen=True, slots=True)
class Off:
    """A value that its own nodes do not compute as golden does, from golden inputs.

    value: its name in the bundle. error: largest difference relative to the largest magnitude, infinite when shapes
    or integers differ. step: number of the rolling step. inputs, expected, got: the arrays of that step.
    """

    value: str
    error: float
    step: int
    inputs: Mapping[str, Array]
    expected: Array
    got: Array


def pairs(model: ir.Model, golden: ir.Model) -> dict[str, str]:
    """Values that both graphs have: name in `model` to name in `golden`, in the order of `model`.

    The same name is the same value. Where a graph was named anew, modules with a weight are matched by their path.
    """
    there = {str(value.name): value for node in golden.graph if not is_recipe(node) for value in node.outputs}
    known = parameters(model)
    by_module = {}
    golden_modules = modules_of(golden)
    for path, name in modules_of(model).items():
        weights = f"{path}.weight", "embed_tokens.weight" if path == "lm_head" else ""  # perhaps tied
        if path in golden_modules and any(one in known for name_ in weights for one in (name_, packed_name(name_))):
            by_module[name] = golden_modules[path]
    found: dict[str, str] = {}
    for node in model.graph:
        for value in () if is_recipe(node) else node.outputs:
            name = str(value.name)
            if (other := name if name in there else by_module.get(name)) and _alike(value, there[other]):
                found[name] = other
    return found


def _alike(a: ir.Value, b: ir.Value) -> bool:
    ranks = [None if value.shape is None else len(value.shape) for value in (a, b)]
    return a.type is not None and a.dtype == b.dtype and (None in ranks or ranks[0] == ranks[1])


def roughness(model: ir.Model, shared: Mapping[str, str], kv: str) -> dict[str, float]:
    """How far each shared value may be off because its own nodes round on purpose, relative to the largest magnitude.

    Golden does not round activations, and where it rounds keys and values too, a number that lies between two may go
    to the other one: what is allowed is that of `reference.parity` for such a type. kv: type of the rings.
    """
    allowed = {kind: tolerance.multiple * tolerance.eps for kind, tolerance in parity.TOLERANCES.items()}
    rough: dict[ir.Value, float] = {}
    for node in model.graph:
        own = _ROUNDED * allowed[INT8] if node.op_type in _ROUNDS_ACTIVATIONS else 0.0
        if kv != "float32" and (node.op_type in _STORES or is_store(node)):
            own = allowed[kv]
        rounds = node.attributes.get("rounds")
        if node.op_type in _STORES and rounds is not None and rounds.as_int() == 1:
            own = allowed[INT8]  # bfloat16 has as many bits
        inherited = [rough.get(v, 0.0) for v in node.inputs if v is not None and v.name not in shared]
        rough |= dict.fromkeys(node.outputs, max([own, *inherited]))
    return {str(value.name): most for value, most in rough.items() if value.name in shared}


def cut(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of `model` in which the readers of each value `names` read an input of that name instead.

    The value itself is given out as `name__got`. Outputs that are not cut are dropped.
    """
    copy = model.clone()
    graph = copy.graph
    values = {str(value.name): value for node in graph for value in node.outputs}
    graph.outputs.clear()
    for name in names:
        made = values[name]
        rank = None if made.shape is None else len(made.shape)
        made.name = name + GOT
        fed = ir.Value(name=name, type=made.type, shape=None if rank is None else ir.Shape([None] * rank))
        ir.convenience.replace_all_uses_with(made, fed)
        graph.inputs.append(fed)
        graph.outputs.append(made)
    for node in graph:
        for value in node.outputs:
            value.shape = None if value.shape is None else ir.Shape([None] * len(value.shape))
    return copy


def steps_of(rows: Sequence[npt.NDArray[np.int64]], chunk: int) -> list[Step]:
    """Feed `rows` in pieces of C, C, 1, C − 1, … tokens, partly padded; the shorter row idles at the end."""
    sizes = [chunk, chunk, 1, max(1, chunk - 1)]
    steps: list[Step] = []
    position_B = np.zeros(len(rows), np.int64)
    while any(position < len(row) for position, row in zip(position_B, rows, strict=True)):
        size = sizes[len(steps) % len(sizes)]
        count_B = np.array([min(size, len(row) - at) for row, at in zip(rows, position_B, strict=True)], np.int64)
        width = min(chunk, int(count_B.max()) + 1)  # one token of padding wherever the chunk has room for it
        input_ids_BT = np.full((len(rows), width), PADDING_ID, np.int64)
        for row, (ids, at, count) in enumerate(zip(rows, position_B, count_B, strict=True)):
            input_ids_BT[row, :count] = ids[at : at + count]
        steps.append(Step(input_ids_BT, position_B.copy(), count_B, int(position_B.max())))
        position_B += count_B
    return steps


class LocalComparison:
    """Compares the nodes of several graphs with one golden graph over the same rolling steps."""

    def __init__(self, golden: ir.Model, manifest: Manifest, folder: Path | None, steps: Sequence[Step]) -> None:
        self._golden, self._manifest, self._folder, self._steps = golden, manifest, folder, steps
        shapes = {str(value.name): value.shape for node in golden.graph for value in node.outputs}
        self._shapes = shapes

    def off(
        self,
        model: ir.Model,
        shared: Mapping[str, str],
        *,
        only: Iterable[str] | None = None,
        tolerance: float = ROUNDING,
        native: bool = False,
    ) -> list[Off]:
        """The values that are off, in the order of the graph, each in the first step that shows it.

        Only the first carries its inputs: the others are there to be named.

        shared: as `pairs` gives it. only: compare these values and no others. tolerance: see ROUNDING; what `roughness`
        allows is allowed beside it, unless the tolerance is 0 or less.
        native: run kernels where there are any, as a session does. Otherwise function bodies run: a bundle carries
        them everywhere, and a fault in one is seen by nothing else. So whoever looks for faults looks at both.
        """
        rough = roughness(model, shared, self._manifest.kv.dtype) if tolerance > 0 else {}
        most = {name: max(tolerance, rough.get(name, 0.0)) for name in shared}
        chosen = None if only is None else set(only)
        wanted = [name for name in shared if chosen is None or name in chosen]
        found: dict[str, Off] = {}
        for part in self._parts(wanted, shared):
            for off in self._compare(model, shared, part, most, native):
                found.setdefault(off.value, off)
        in_order = [found[name] for name in wanted if name in found]
        return in_order[:1] + [replace(later, inputs={}) for later in in_order[1:]]

    def _parts(self, names: Sequence[str], shared: Mapping[str, str]) -> Iterator[list[str]]:
        """Names in consecutive parts whose arrays of the widest step fit into HELD_BYTES."""
        widest = max(step.input_ids_BT.shape[1] for step in self._steps)
        extents = {"B": len(self._steps[0].token_counts_B), "T": widest, "R": widest}
        part: list[str] = []
        held = 0
        for name in names:
            size = 8
            for dim in self._shapes[shared[name]] or ():
                text = str(dim if isinstance(dim, int) else dim.value)
                for factor in text.split("*"):
                    size *= int(factor) if factor.isdigit() else extents.get(factor, 1)
            if part and held + size > HELD_BYTES:
                yield part
                part, held = [], 0
            part.append(name)
            held += size
        if part:
            yield part

    def _compare(
        self, model: ir.Model, shared: Mapping[str, str], part: Sequence[str], most: Mapping[str, float], native: bool
    ) -> Iterator[Off]:
        """Golden rolls along; in each step the nodes of `part` are run on its values."""
        severed = _behind(cut(model, shared), [name + GOT for name in part])
        session = open_session(severed, self._folder, native=native)
        fed = [argument.name for argument in session.get_inputs()]
        needed = {shared[name] for name in [*part, *fed] if name in shared}
        for number, (feeds, taps) in enumerate(
            RollingTaps(self._golden, self._manifest, self._folder, sorted(needed), in_place=False, native=False).run(
                self._steps, len(self._steps[0].token_counts_B)
            )
        ):
            arrays = {name: feeds[name] if name in feeds else taps[shared[name]] for name in fed}
            got = session.run([name + GOT for name in part], arrays)
            step = self._steps[number]
            for name, array in zip(part, got, strict=True):
                expected = taps[shared[name]]
                kept = _real_tokens(self._shapes[shared[name]], expected.shape, step)
                if kept is not None and expected.shape == array.shape:
                    expected = np.where(kept, expected, array)  # what stands at padding means nothing
                error = _difference(expected, array)
                if error > most[name]:
                    yield Off(name, error, number, arrays, expected, array)


def _difference(expected: Array, got: Array) -> float:
    """As `difference`; the numbers of int8 rings are rounded, so that they may differ by one."""
    if expected.dtype == got.dtype == np.int8:
        return difference(expected.astype(np.float32), got.astype(np.float32))
    return difference(expected, got)


def _real_tokens(symbolic: ir.Shape | None, shape: tuple[int, ...], step: Step) -> npt.NDArray[np.bool_] | None:
    """Which elements belong to a token that is not padding, broadcast over `shape`; None when all of them do."""
    B, T = step.input_ids_BT.shape
    valid_BT = np.arange(T)[None] < step.token_counts_B[:, None]
    if valid_BT.all() or symbolic is None:
        return None
    # All tokens' logits are asked for, in order, so that R is T.
    names = [str(dim if isinstance(dim, int) else dim.value).replace("R", "T") for dim in symbolic]
    for flat in ("B*T", "T*B"):
        if flat in names:
            place = [1] * len(shape)
            place[names.index(flat)] = B * T
            return valid_BT.reshape(place)
    if "T" in names and "B" in names:
        place = [1] * len(shape)
        place[names.index("B")], place[names.index("T")] = B, T
        if names.index("B") < names.index("T"):
            return valid_BT.reshape(place)
    return None


def _behind(model: ir.Model, outputs: Sequence[str]) -> ir.Model:
    """The piece of a cut `model` that computes `outputs`."""
    values = {str(value.name): value for value in model.graph.outputs}
    graph = ir.convenience.extract(model.graph, list(model.graph.inputs), [values[name] for name in outputs])
    read = {value for node in graph for value in node.inputs}
    for value in [value for value in graph.inputs if value not in read]:
        graph.inputs.remove(value)
    used = called(model, {node.op_identifier() for node in graph})
    functions = [body.clone() for name, body in model.functions.items() if name in used]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)


def called(model: ir.Model, ops: Iterable[ir.OperatorIdentifier]) -> list[ir.OperatorIdentifier]:
    """Those of `ops` that have a function body, and what their bodies call, callers first."""
    found: list[ir.OperatorIdentifier] = []
    waiting = list(ops)
    while waiting:
        op = waiting.pop(0)
        if op in model.functions and op not in found:
            found.append(op)
            waiting += [node.op_identifier() for node in model.functions[op]]
    return found


def alone(model: ir.Model, shared: Mapping[str, str], value: str) -> ir.Model:
    """The nodes between golden values and `value`, as a model of their own that gives out `value` under its name."""
    piece = _behind(cut(model, shared), [value + GOT])
    piece.graph.outputs[0].name = value
    return piece


def path_of(model: ir.Model, value: str) -> str:
    """The module in which `value` is made."""
    return next((module_path(node) for node in model.graph for v in node.outputs if v.name == value), "")
