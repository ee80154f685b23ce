"""What an export is asked for in quantised weights, checked before anything is read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from exporter.defaults import DEFAULT_BLOCK_SIZE, QUANTIZED_KINDS, QUANTIZERS, SCALES
from reference.quantized_layout import BLOCK_SIZES, QuantizedFormat
from runtime.errors import ExportError
from runtime.json_files import brief

_SPELLED = dict(zip(SCALES, ("F16", "F32"), strict=True))


@dataclass(frozen=True, slots=True)
class Keep:
    """Parameters that stay more precise. name: of a group of `exporter.quantize.decide`, or a glob. bits: 8, or None.

    None keeps them as they are stored.
    """

    name: str
    bits: int | None

    def __str__(self) -> str:
        return self.name if self.bits is None else f"{self.name}=int{self.bits}"


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """bits 4 or 8; all else None where it was not asked for, so that a quantised checkpoint's own may stand."""

    bits: int
    block_size: int | None = None
    zero_points: bool | None = None
    scale: str | None = None
    quantizer: str | None = None
    keep: tuple[Keep, ...] = ()

    @property
    def search(self) -> bool:
        """Which of the two methods."""
        return (self.quantizer or QUANTIZERS[0]) == QUANTIZERS[0]

    def format(self, like: QuantizedFormat | None = None) -> QuantizedFormat:
        """What was asked for; where nothing was, that of `like`, or the defaults."""
        like = like or QuantizedFormat(self.bits, DEFAULT_BLOCK_SIZE, False, _SPELLED[SCALES[0]])
        return QuantizedFormat(
            self.bits,
            like.block_size if self.block_size is None else self.block_size,
            like.zero_points if self.zero_points is None else self.zero_points,
            self.scale or like.scale,
        )


def read_options(
    weights: str,
    *,
    block_size: int | None = None,
    zero_points: bool | None = None,
    scales: str | None = None,
    quantizer: str | None = None,
    keep: Collection[str] = (),
) -> QuantizeOptions | None:
    """The arguments of `exporter.compile.export`; None where `weights` asks for no quantisation.

    Raises ExportError for values that no format has, and for options that the weights asked for have no use for.
    """
    asked = {"block_size": block_size, "zero_points": zero_points, "scales": scales, "quantizer": quantizer}
    given = [name for name, value in (*asked.items(), ("keep", keep or None)) if value is not None]
    if weights not in QUANTIZED_KINDS:
        if given:
            raise ExportError(
                f"{' and '.join(given)} only mean something with quantised weights, but weights is {weights!r}. "
                f"Ask for one of {', '.join(QUANTIZED_KINDS)}, or leave them out."
            )
        return None
    if isinstance(block_size, bool) or block_size not in (None, *BLOCK_SIZES):
        raise ExportError(f"block_size is {brief(block_size)}, but must be one of {', '.join(map(str, BLOCK_SIZES))}.")
    if zero_points is not None and not isinstance(zero_points, bool):
        raise ExportError(f"zero_points is {brief(zero_points)}, but must be true or false.")
    for name, value, known in (("scales", scales, SCALES), ("quantizer", quantizer, QUANTIZERS)):
        if value not in (None, *known):
            raise ExportError(f"{name} is {brief(value)}, but must be one of {', '.join(known)}.")
    bits = QUANTIZED_KINDS[weights]
    if isinstance(keep, str):
        raise ExportError(f"keep is the text {brief(keep)}, but must be a collection of names, such as ['lm_head'].")
    return QuantizeOptions(
        bits, block_size, zero_points, None if scales is None else _SPELLED[scales], quantizer,
        tuple(dict.fromkeys(_kept(one, bits) for one in keep)),
    )  # fmt: skip


def _kept(text: str, bits: int) -> Keep:
    name, equals, kind = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not name or (equals and kind != "int8"):
        raise ExportError(
            f"keep has {brief(text)}, but each must be a name, which stays as it is stored, or NAME=int8. "
            "Names are lm_head, attention, mlp, experts, first, last, or a pattern such as 'layers.3.*'."
        )
    if equals and bits == 8:
        raise ExportError(f"keep has {brief(text)}, but all weights become int8 anyway. Leave it out, or ask for int4.")
    return Keep(name, 8 if equals else None)
