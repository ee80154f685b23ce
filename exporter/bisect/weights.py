"""The weights of a bundle against those that its checkpoint gives, and the rebuilt graphs with the right ones.

Quantised weights are made again, by the options that the manifest records: quantising is the same every time, so that
they must be equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from exporter.bisect.widen import read_as_float, read_as_quantized
from exporter.defaults import QUANTIZERS
from exporter.plan import ExportPlan
from exporter.quantize.stream import THREADS, quantized_slices
from exporter.quantized_reference import QuantizedReference, quantized_reference
from exporter.recipes import first_readers, graft, parameters, value_of
from graph_passes.lower.formats import TYPES, LinearFormat, Quantized, Stored, packed_name, scale_name, zero_name
from graph_passes.unbound import UnboundWeight, is_unbound
from reference.checkpoint import Checkpoint
from reference.parameters import EMBEDDING, LM_HEAD
from reference.quantized_layout import QuantizedFormat, QuantizedRows, dequantize
from reference.weights import Source, bind, load_parameter
from runtime.bundle import Bundle

_COMPARED_AT_ONCE = 1 << 22
_SPELLED = {kind: name for name, kind in TYPES.items()}

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class WeightDifference:
    """A parameter of the bundle that is not what the checkpoint gives.

    elements: how many differ; largest: by how much at most; first: index of the first in the flattened parameter.
    A quantised parameter's elements are the values that its numbers stand for.
    """

    parameter: str
    elements: int
    total: int
    largest: float
    first: int


class BundleWeights:
    """What the graph of `bundle` reads as its weights, and what it should read.

    formats: how it reads each matrix. wrong: the parameters that differ from the checkpoint's, by name. Nothing large
    is held. Raises CheckpointError and ExportError as an export does, where quantised weights cannot be made again.
    """

    def __init__(self, bundle: Bundle, graph: ir.Model, checkpoint: Checkpoint) -> None:
        self._bundle, self._checkpoint = bundle, checkpoint
        self._held = parameters(graph)
        self._sources: dict[str, Source] = dict(bind(checkpoint))
        if packed_name(LM_HEAD) in self._held and LM_HEAD not in self._sources:
            self._sources[LM_HEAD] = self._sources[EMBEDDING]  # tied, and quantised for the product alone
        info = bundle.manifest.weights.quantization
        self._search = info is None or info.method != QUANTIZERS[1]
        self.formats: dict[str, LinearFormat] = dict(self._formats())
        self.wrong: dict[str, WeightDifference] = {}
        for name in self._sources:
            wanted = self.formats.get(name)
            if isinstance(wanted, Quantized):
                found = self._quantized_difference(name, wanted)
            elif name in self._held:
                want = load_parameter(checkpoint, self._sources[name], torch.float32).numpy()
                found = _difference(name, value_of(self._held[name]), want)
            else:
                continue
            if found is not None:
                self.wrong[name] = found

    def parameter_of(self, name: str) -> str:
        """The parameter that an initializer belongs to: a quantised one has three."""
        for suffix in (packed_name(""), scale_name(""), zero_name("")):
            if name.endswith(suffix) and isinstance(self.formats.get(name.removesuffix(suffix)), Quantized):
                return name.removesuffix(suffix)
        return name

    def reference(self) -> QuantizedReference:
        """What the PyTorch reference has to compute with: quantised weights as numbers, the right ones."""
        found = quantized_reference(self._bundle)
        right = {name: partial(self._numbers, name) for name in found.weights if name in self.wrong}
        return QuantizedReference({**found.weights, **right}, found.rounding)

    def bind(self, model: ir.Model) -> ir.Model:
        """A copy of a rebuilt `model` with the right weights.

        They are those that the bundle reads, which were just found to be the same; only the wrong ones are read
        from the checkpoint, so that a large model is not written a second time. What the model reads as float32 and
        the bundle in another form is widened by nodes.
        """
        copy = model.clone()
        if isinstance(self.formats.get(LM_HEAD), Quantized):
            _untie(copy)
        unbound = {name: value for name, value in copy.graph.initializers.items() if is_unbound(value)}
        readers = first_readers(copy, unbound.values())
        made: dict[str, dict[str, Array]] = {}
        for name, value in unbound.items():
            parameter = self.parameter_of(name)
            wanted = self.formats.get(parameter)
            if parameter in self.wrong or (wanted is None and name not in self._held):
                if parameter not in made:
                    made[parameter] = self._right(parameter)
                array = made[parameter][name] if name in made[parameter] else self._numbers(parameter).numpy()
                assert value.dtype is not None
                value.const_value = ir.tensor(array.astype(value.dtype.numpy(), copy=False), name=name)
            elif isinstance(wanted, Quantized) and name == parameter:
                parts = [self._held[part] for part in _names(parameter, wanted)]
                read_as_quantized(copy, value, parts, wanted, readers[value])
            elif self._held[name].dtype != value.dtype:
                read_as_float(copy, value, self._held[name], readers[value])
            else:
                graft(copy, value, self._held[name], readers[value])
        return copy

    def _formats(self) -> Iterator[tuple[str, LinearFormat]]:
        for name in self._sources:
            if (packed := self._held.get(packed_name(name))) is not None and packed.uses():
                attributes = next(iter(packed.uses())).node.attributes
                bits, block = (attributes[key].as_int() for key in ("bits", "block_size"))
                scale = self._held[scale_name(name)].dtype
                assert scale is not None
                yield name, Quantized(bits, block, zero_name(name) in self._held, _SPELLED[scale])
            elif (value := self._held.get(name)) is not None and value.shape is not None and len(value.shape) > 1:
                assert value.dtype is not None
                yield name, Stored(_SPELLED[value.dtype])

    def _slices(self, name: str, wanted: Quantized) -> Iterator[QuantizedRows]:
        with ThreadPoolExecutor(THREADS, "quantise") as pool:
            yield from quantized_slices(self._checkpoint, self._sources[name], _layout(wanted), self._search, pool)

    def _right(self, name: str) -> dict[str, Array]:
        """The parameter as it should be, whole, by the names of the initializers that hold it."""
        wanted = self.formats.get(name)
        if not isinstance(wanted, Quantized):
            return {name: load_parameter(self._checkpoint, self._sources[name], torch.float32).numpy()}
        slices = list(self._slices(name, wanted))
        leading = self._sources[name].shape[:-1]
        parts = [torch.cat([rows.packed for rows in slices]), torch.cat([rows.scale for rows in slices])]
        if wanted.zero_points:
            parts.append(torch.cat([rows.zero for rows in slices if rows.zero is not None]))
        arrays = [part.numpy().reshape(*leading, *part.shape[1:]) for part in parts]
        return dict(zip(_names(name, wanted), arrays, strict=True))

    def _numbers(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What the parameter as it should be stands for."""
        wanted, source = self.formats.get(name), self._sources[name]
        if not isinstance(wanted, Quantized):
            return load_parameter(self._checkpoint, source, dtype)
        columns = source.shape[-1]
        slices = [dequantize(rows, _layout(wanted), columns, dtype) for rows in self._slices(name, wanted)]
        return torch.cat(slices).view(source.shape)

    def _quantized_difference(self, name: str, wanted: Quantized) -> WeightDifference | None:
        columns, layout = self._sources[name].shape[-1], _layout(wanted)
        total = int(np.prod(self._sources[name].shape))
        held = [value_of(self._held[part]) for part in _names(name, wanted)]
        packed, scale, *zero = (
            part.reshape(-1, *part.shape[axis:]) for part, axis in zip(held, (-2, -1, -1), strict=False)
        )
        found = _Differences()
        first = 0
        for want in self._slices(name, wanted):
            rows = slice(first, first + want.scale.shape[0])
            mine = [torch.tensor(part[rows]) for part in (packed, scale, *zero)]
            theirs = [part for part in (want.packed, want.scale, want.zero) if part is not None]
            if [part.shape for part in mine] != [part.shape for part in theirs]:
                return WeightDifference(name, total, total, float("inf"), 0)
            if not all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)):
                ours = QuantizedRows(mine[0], mine[1], mine[2] if zero else None)
                a, b = (dequantize(r, layout, columns, torch.float32).numpy().reshape(-1) for r in (want, ours))
                found.see(first * columns, a, b)
            first = rows.stop
        return found.of(name, total)


def _untie(model: ir.Model) -> None:
    """Where the head multiplies with the embedding, give it a weight of its own: the embedding is not quantised."""
    embedding = model.graph.initializers.get(EMBEDDING)
    uses = [] if embedding is None else [use for use in embedding.uses() if use.node.op_type != "Gather"]
    if embedding is None or not uses:
        return
    assert embedding.shape is not None
    weight = UnboundWeight(LM_HEAD, ir.DataType.FLOAT, embedding.shape)
    head = ir.Value(name=LM_HEAD, type=embedding.type, shape=embedding.shape, const_value=weight)
    model.graph.register_initializer(head)
    for use in uses:
        use.node.replace_input_with(use.idx, head)


def _layout(wanted: Quantized) -> QuantizedFormat:
    return QuantizedFormat(wanted.bits, wanted.block_size, wanted.zero_points, wanted.scale)


def _names(parameter: str, wanted: Quantized) -> list[str]:
    """Numbers, scales and, if there are any, zero points."""
    names = [packed_name(parameter), scale_name(parameter)]
    return [*names, zero_name(parameter)] if wanted.zero_points else names


class _Differences:
    """Counts elements that differ in any bit of float32, piece after piece."""

    def __init__(self) -> None:
        self._elements, self._largest, self._first = 0, 0.0, -1

    def see(self, begin: int, want: Array, got: Array) -> None:
        """Compare two flat float32 arrays whose first element is number `begin` of the parameter."""
        off = np.flatnonzero(want.view(np.uint32) != got.view(np.uint32))
        if len(off):
            with np.errstate(invalid="ignore"):
                gap = float(np.abs(want[off].astype(np.float64) - got[off].astype(np.float64)).max())
            gap = gap if np.isfinite(gap) else float("inf")
            self._first = begin + int(off[0]) if self._first < 0 else self._first
            self._elements, self._largest = self._elements + len(off), max(self._largest, gap)

    def of(self, parameter: str, total: int) -> WeightDifference | None:
        """What was seen, None where nothing differs."""
        if self._elements == 0:
            return None
        return WeightDifference(parameter, self._elements, total, self._largest, self._first)


def _difference(name: str, held: Array, due: Array) -> WeightDifference | None:
    want, got = due.reshape(-1), held.reshape(-1)
    if want.shape != got.shape:
        return WeightDifference(name, max(want.size, got.size), want.size, float("inf"), 0)
    found = _Differences()
    for begin in range(0, want.size, _COMPARED_AT_ONCE):
        a, b = want[begin : begin + _COMPARED_AT_ONCE], got[begin : begin + _COMPARED_AT_ONCE]
        found.see(begin, a, b.astype(np.float32, copy=False))
    return found.of(name, want.size)


def template_weights(model: ir.Model, plan: ExportPlan, checkpoint: Checkpoint) -> ir.Model:
    """A copy of a template with real weights: each kind has those of the first layer of that kind.

    They are the checkpoint's own also where the bundle's are quantised, as templates are compared among themselves.
    """
    first_layer = [plan.kind_of_layer.index(kind) for kind in range(len(plan.kinds))]
    copy = model.clone()
    sources = bind(checkpoint)
    for name, value in copy.graph.initializers.items():
        if not is_unbound(value):
            continue
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(first_layer[int(parts[1])])
        tensor = load_parameter(checkpoint, sources[".".join(parts)], torch.float32)
        value.const_value = ir.tensor(tensor.numpy(), name=name)
    return copy
