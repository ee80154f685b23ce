"""Decides for each parameter whether it is quantised, and how.

Matrices of the attention, of the feed-forward layers and experts, and the output projection are. Embedding, routers,
norms and biases never are: an embedding's rows are only looked up, a router decides which experts run at all, and the
others are small. An output projection that is tied to the embedding becomes a quantised parameter of its own.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from exporter.defaults import GROUPS, QUANTIZERS
from exporter.quantize.options import Keep, QuantizeOptions
from exporter.weights import stored_type
from reference.checkpoint import Checkpoint
from reference.packed_source import PackedSource
from reference.parameters import EMBEDDING, LM_HEAD
from reference.quantized_layout import QuantizedFormat
from reference.weights import Source
from runtime.errors import ExportError

Decision = QuantizedFormat | str
"""Quantised, or a stored type as safetensors spells it."""

_EXPERTS = ("moe.gate_proj", "moe.up_proj", "moe.down_proj")
CHECKPOINT = "checkpoint"
"""The method of weights that came quantised."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """sources: of all parameters that are written, a tied output projection too where it is quantised.

    by_parameter: for the same names. main: the format of most quantised ones. method: as in the manifest.
    """

    sources: Mapping[str, Source]
    by_parameter: Mapping[str, Decision]
    main: QuantizedFormat
    method: str

    @property
    def search(self) -> bool:
        """Whether what is not quantised yet gets its scales by the search."""
        return self.method != QUANTIZERS[1]

    @property
    def kept(self) -> dict[str, str]:
        """Matrices that have another format than most: their type, "int8" or as safetensors spells it."""
        return {
            name: decision if isinstance(decision, str) else f"int{decision.bits}"
            for name, decision in self.by_parameter.items()
            if len(self.sources[name].shape) > 1 and decision != self.main
        }


def is_quantized(sources: Mapping[str, Source]) -> bool:
    """Whether a checkpoint came with quantised weights."""
    return any(isinstance(source, PackedSource) for source in sources.values())


def decide(checkpoint: Checkpoint, sources: Mapping[str, Source], options: QuantizeOptions | None) -> Decisions:
    """options: None copies what a quantised checkpoint has, and keeps all else as it is stored.

    Raises ExportError for kept names that match nothing, for experts of one layer in different formats, and for a
    checkpoint that is quantised already in another way than is asked for.
    """
    packed = {name: source.format for name, source in sources.items() if isinstance(source, PackedSource)}
    own = Counter(packed.values()).most_common(1)[0][0] if packed else None
    if EMBEDDING in packed:
        raise ExportError(
            f"{checkpoint.path} has a quantised embedding, whose rows a graph cannot look up. Pass --weights fp32 "
            "(weights='fp32'), which turns all weights back into numbers."
        )
    if options is None:
        assert own is not None, "nothing is quantised and nothing is to be"
        decisions: dict[str, Decision] = {name: _decided(checkpoint, source) for name, source in sources.items()}
        return _checked(Decisions(sources, decisions, own, CHECKPOINT))
    main = options.format(own)
    if packed:
        _refuse_other(checkpoint, packed, main)
    if checkpoint.config.tie_word_embeddings:
        sources = {**sources, LM_HEAD: replace(sources[EMBEDDING], parameter=LM_HEAD)}
    kept = _kept(checkpoint, sources, options.keep)
    decisions = {}
    for name, source in sources.items():
        keep = kept.get(name)
        if isinstance(source, PackedSource) or not may_be_quantized(name, source.shape):
            decisions[name] = _decided(checkpoint, source)
        elif keep is None:
            decisions[name] = main
        elif keep.bits is not None:
            decisions[name] = replace(main, bits=keep.bits)
        elif name != LM_HEAD or not checkpoint.config.tie_word_embeddings:  # which the embedding holds already
            decisions[name] = _decided(checkpoint, source)
    written = {name: sources[name] for name in decisions}
    method = QUANTIZERS[0] if options.search else QUANTIZERS[1]
    if packed and not any(d == main for name, d in decisions.items() if name not in packed):
        method = CHECKPOINT
    return _checked(Decisions(written, decisions, main, method))


def may_be_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the parameter is a matrix, or a stack of them, that stands in a large product."""
    return len(shape) > 1 and name != EMBEDDING and not name.endswith("moe.router.weight")


def _decided(checkpoint: Checkpoint, source: Source) -> Decision:
    """As the checkpoint has it; float32 for float64 and for a mixture of types."""
    if isinstance(source, PackedSource):
        return source.format
    stored = stored_type(checkpoint, source)
    return "F32" if stored == "F64" else stored


def _refuse_other(checkpoint: Checkpoint, packed: Mapping[str, QuantizedFormat], main: QuantizedFormat) -> None:
    other = {name: found for name, found in packed.items() if found != main}
    if other:
        name, found = next(iter(other.items()))
        points = "with" if found.zero_points else "without"
        raise ExportError(
            f"{checkpoint.path} is quantised already: {name} has {found.bits} bits in blocks of {found.block_size} "
            f"{points} zero points and with scales of {'float16' if found.scale == 'F16' else 'float32'}. Another "
            "format would be a second rounding. Pass --weights stored (weights='stored'), which copies what is there, "
            "or quantise the original checkpoint."
        )


def _kept(checkpoint: Checkpoint, sources: Mapping[str, Source], keep: tuple[Keep, ...]) -> dict[str, Keep]:
    """What is kept, and how: as stored, where one that names a parameter says so."""
    kept: dict[str, Keep] = {}
    for one in keep:
        matches = _matcher(one.name, checkpoint.config.num_layers)
        named = [name for name in sources if matches(name)]
        quantizable = [name for name in named if may_be_quantized(name, sources[name].shape)]
        if not named:
            raise ExportError(
                f"keep names {one.name!r}, and {checkpoint.path} has no parameter of that name. Names are "
                f"{', '.join(GROUPS)}, or a pattern over parameters such as {list(sources)[-1]}."
            )
        if one.bits is not None and not quantizable:
            raise ExportError(
                f"keep has {one}, but {named[0]} is never quantised: embedding, routers, norms and biases stay as "
                "they are stored. Leave it out."
            )
        there = [name for name in quantizable if isinstance(sources[name], PackedSource)]
        if there:
            raise ExportError(
                f"keep has {one}, but {checkpoint.path} holds {there[0]} quantised already, and nothing more precise. "
                "Leave it out, or quantise the original checkpoint."
            )
        for name in quantizable:
            if name not in kept or one.bits is None:
                kept[name] = one
    return kept


def _matcher(name: str, layers: int) -> Callable[[str], bool]:
    groups: dict[str, Callable[[str], bool]] = {
        "lm_head": lambda parameter: parameter == LM_HEAD,
        "embed": lambda parameter: parameter == EMBEDDING,
        "router": lambda parameter: parameter.endswith("moe.router.weight"),
        "first": lambda parameter: parameter.startswith("layers.0."),
        "last": lambda parameter: parameter.startswith(f"layers.{layers - 1}."),
        "attention": lambda parameter: ".self_attn." in parameter,
        "mlp": _is_feed_forward,
        "experts": _is_feed_forward,
    }
    assert groups.keys() == set(GROUPS)
    return groups.get(name, lambda parameter: fnmatch.fnmatchcase(parameter, name))


def _is_feed_forward(parameter: str) -> bool:
    return ".mlp." in parameter or parameter.endswith(_EXPERTS)


def _checked(decisions: Decisions) -> Decisions:
    """Raises ExportError for experts that one node could not read."""
    for name, decision in decisions.by_parameter.items():
        if not name.endswith(_EXPERTS[0]):
            continue
        others = [name.removesuffix(_EXPERTS[0]) + suffix for suffix in _EXPERTS]
        if any(decisions.by_parameter[other] != decision for other in others):
            raise ExportError(
                f"{', '.join(others)} would have different formats, and the experts of a layer are read together. "
                "Keep all three or none, for example with 'experts' or 'layers.3.moe.*'; a checkpoint that has them "
                "like that can be exported with --weights fp32."
            )
    return decisions
