"""The part of a manifest that says how weights were quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from runtime.errors import BundleError
from runtime.manifest_section import Section

QUANTIZED_KINDS = {"int8": 8, "int4": 4}
"""Kinds of weights, and their bits."""

METHODS = ("search", "rtn", "checkpoint")
BLOCK_SIZES = (16, 32, 64, 128, 256)
SCALES = ("float16", "float32")
_KEPT_AS = ("F32", "BF16", "F16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class QuantizationInfo:
    """How most of the quantised matrices are: numbers of `bits` bits, a scale for `block_size` of them in a row.

    scales: their type. method: "search" or "rtn", how Cierzo found them, or "checkpoint", which had them already.
    kept: the matrices that are otherwise, and as what: a stored type as safetensors spells it, "int8" or "int4".
    """

    bits: int
    block_size: int
    zero_points: bool
    scales: str
    method: str
    kept: Mapping[str, str]

    def __str__(self) -> str:
        points = "with" if self.zero_points else "without"
        found = "as the checkpoint has them" if self.method == "checkpoint" else f"found by {self.method}"
        return (
            f"int{self.bits} in blocks of {self.block_size} {points} zero points, {self.scales} scales {found}; "
            f"{len(self.kept)} {'matrix' if len(self.kept) == 1 else 'matrices'} otherwise"
        )


def parse_quantization(weights: Section, kind: str, placement: str) -> QuantizationInfo | None:
    """`weights.quantization`, None where it is null.

    Raises BundleError for missing or mistyped keys, and for what does not go with the kind and the placement: such
    weights lie in a file of the bundle's own.
    """
    info = None
    if "quantization" not in weights.data or weights.data["quantization"] is not None:
        section = weights.section("quantization")
        kept = section.section("kept")
        info = QuantizationInfo(
            bits=_one_of(section, "bits", tuple(QUANTIZED_KINDS.values())),
            block_size=_one_of(section, "block_size", BLOCK_SIZES),
            zero_points=section.boolean("zero_points"),
            scales=section.one_of("scales", SCALES),
            method=section.one_of("method", METHODS),
            kept=MappingProxyType({name: kept.one_of(name, _KEPT_AS) for name in kept.data}),
        )
    if info is None:
        fits = kind not in QUANTIZED_KINDS
    else:
        as_it_was = kind == "stored" and info.method == "checkpoint"
        fits = placement == "copied" and (as_it_was or QUANTIZED_KINDS.get(kind) == info.bits)
    if not fits:
        found = "null" if info is None else f"{info.bits} bits by {info.method}"
        raise BundleError(
            f"The manifest's `weights.quantization` ({found}) does not go with weights of the kind {kind!r} that are "
            f"{placement!r}. Export the checkpoint again."
        )
    return info


def _one_of(section: Section, key: str, known: tuple[int, ...]) -> int:
    value = section.integer(key, minimum=1)
    if value not in known:
        raise BundleError(
            f"The manifest's `{section.path}{key}` is {value}, but this Cierzo knows only "
            f"{', '.join(map(str, known))}. Upgrade Cierzo, or export the checkpoint again with one of these."
        )
    return value
