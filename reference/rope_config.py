"""RoPE parameters: which rotation frequencies a checkpoint was trained with.

Five types are represented, each as the Hugging Face `transformers` library computes it:

| type    | meaning                                                        | source                                  |
|---------|----------------------------------------------------------------|-----------------------------------------|
| default | theta^(-2i/D)                                                  | Su et al. 2021, arXiv:2104.09864        |
| linear  | default divided by `factor`                                    | Chen et al. 2023, arXiv:2306.15595      |
| dynamic | default up to max_position_embeddings, see below               | bloc97 and emozilla 2023 (NTK-aware)    |
| llama3  | long wavelengths divided by `factor`, with a ramp between      | Llama 3.1 model card and reference code |
| yarn    | per-dimension ramp, and cos and sin times `attention_factor`   | Peng et al. 2023, arXiv:2309.00071      |

Dynamic RoPE chooses its base by the length of the whole sequence, once that exceeds max_position_embeddings: every
earlier key would have to be turned again at every step, which no cache can do. Up to that length it is the default
type, and `ModelConfig.position_limit` ends an engine's sequences there.

A config spells them in one of two generations: `rope_theta` and `rope_scaling` at the top level, or everything inside
`rope_parameters`. Both give the same `RopeConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from reference.config_keys import drop_ignored
from reference.config_reader import ConfigReader, shown
from runtime.errors import ConfigError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

_KEYS_OF_TYPE: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
_LONGROPE = (
    "that turns positions by one set of frequencies in short sequences and by another in long ones (longrope): every "
    "earlier key would have to be turned again when a sequence grows past original_max_position_embeddings, which no "
    "cache can do"
)
_REFUSED = {"longrope": _LONGROPE, "su": _LONGROPE}
_KEYS_OF_ALL_TYPES = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_NULL_IS_A_VALUE = frozenset({"truncate"})
"""Keys whose null is not as good as absence: transformers takes that one for false, and an absent one for true."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Everything that decides RoPE's frequencies; raises ConfigError at construction when the values contradict.

    theta: base of the geometric series of frequencies.
    type: one of ROPE_TYPES. The fields below belong to the types in brackets and keep their defaults otherwise.
    factor: by how much the context was stretched [linear, dynamic, llama3, yarn].
    original_max_position_embeddings: positions of the first training, before stretching [llama3, yarn]; 0 = unused.
    low_freq_factor, high_freq_factor: ends of the ramp, as original length divided by wavelength [llama3].
    beta_fast, beta_slow: ends of the ramp, in rotations over the original length [yarn].
    truncate: whether the ends of yarn's ramp are rounded outwards to whole dimensions [yarn].
    attention_factor: multiplies cos and sin, already worked out from mscale and mscale_all_dim [yarn].
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise ConfigError(f"RoPE type {self.type!r} is not one that Cierzo computes ({', '.join(ROPE_TYPES)}).")
        for key in (
            "theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        ):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"RoPE's {key} is {value}, but it must be finite and greater than zero.")
        if self.type in ("llama3", "yarn") and self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"RoPE type {self.type} needs original_max_position_embeddings of at least 1, "
                f"not {self.original_max_position_embeddings}. Take it from the published config."
            )
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"RoPE type llama3 says high_freq_factor = {self.high_freq_factor} and low_freq_factor = "
                f"{self.low_freq_factor}, but the first must be the larger. Take both from the published config."
            )
        if self.type == "yarn" and self.theta <= 1:
            raise ConfigError(f"RoPE type yarn divides by log(rope_theta), so rope_theta = {self.theta} must exceed 1.")
        if self.type == "yarn" and self.beta_fast < self.beta_slow:
            raise ConfigError(
                f"RoPE type yarn says beta_fast = {self.beta_fast} and beta_slow = {self.beta_slow}, but the first "
                "must not be the smaller. Take both from the published config."
            )


def rope_parameters(
    reader: ConfigReader, ignored: Collection[str] = (), default: Mapping[str, Any] | None = None
) -> ConfigReader:
    """The object `rope_scaling`, or the newer `rope_parameters`, without nulls and ignored keys; empty for neither.

    ignored: keys of the form "rope_scaling.KEY" or "rope_parameters.KEY" that the user asked to pass over.
    default: what stands there when both are absent or null.
    Raises ConfigError when both are given and differ, as transformers prefers rope_scaling, and when one of the
    ignored keys decides about the rotation.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in ("rope_scaling", "rope_parameters"):  # the one that transformers takes first
        entries = _without_ignored(reader, name, ignored)
        if entries:  # also one of nulls only, which stands in the other's way all the same
            found[name] = {key: value for key, value in entries.items() if value is not None or key in _NULL_IS_A_VALUE}
    if len(found) == 2 and _normalised(found["rope_parameters"]) != _normalised(found["rope_scaling"]):
        reader.refuse(
            "rope_scaling",
            "rope_parameters says something else, and the two are the old and the new spelling of one thing",
            "Delete the one that the weights were not trained with.",
        )
    if default is not None and not reader.mapping.get("rope_scaling") and reader.mapping.get("rope_parameters") is None:
        found["rope_parameters"] = dict(default)
    name, entries = next(iter(found.items()), ("rope_parameters", {}))
    return ConfigReader(entries, prefix=f"{reader.prefix}{name}.")


def read_rope(
    reader: ConfigReader,
    rope: ConfigReader,
    *,
    default_theta: float,
    max_position_embeddings: int,
    types: Collection[str] = ROPE_TYPES,
    further_keys: Collection[str] = (),
) -> RopeConfig:
    """RopeConfig out of `rope`, which is what `rope_parameters` found, and rope_theta beside it.

    default_theta: the value that the architecture's config class gives an absent rope_theta.
    max_position_embeddings: stands in for an absent original_max_position_embeddings.
    types: those that the architecture takes. further_keys: keys in `rope` that the caller reads.
    Raises ConfigError for other types, unknown keys, contradictions between the two spellings, and partial rotation.
    """
    kind = _rope_type(rope, types)
    _check_keys(rope, kind, further_keys)

    top_theta = reader.optional_number("rope_theta")
    theta = rope.optional_number("rope_theta")
    if theta is not None and top_theta is not None and theta != top_theta:
        reader.refuse("rope_theta", f"{rope.prefix.rstrip('.')} says rope_theta = {theta}", "Keep one of the two.")
    theta = theta or top_theta or default_theta

    fields: dict[str, Any] = {}
    if kind in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = _original_length(reader, rope, max_position_embeddings)
    if kind in ("linear", "dynamic", "llama3"):
        fields["factor"] = rope.number("factor")
    if kind == "llama3":
        fields |= {key: rope.number(key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        fields |= _yarn_fields(rope, max_position_embeddings / fields["original_max_position_embeddings"])
    return RopeConfig(theta=theta, type=kind, **fields)


def _without_ignored(reader: ConfigReader, name: str, ignored: Collection[str]) -> dict[str, Any]:
    """The object `name`; messages name it with the reader's prefix, so that users may as well."""
    entries = reader.optional_mapping(name)
    prefixes = (f"{name}.", f"{reader.prefix}{name}.")
    keys = {key.removeprefix(prefix) for prefix in prefixes for key in ignored if key.startswith(prefix)}
    kind = entries.get("rope_type") or entries.get("type") or "default"
    read = _KEYS_OF_TYPE.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
    return drop_ignored(entries, keys, read | {"rope_type", "type", "rope_theta"}, prefixes[1])


def _normalised(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_type" if key == "type" else key: value for key, value in entries.items()}


def _rope_type(rope: ConfigReader, types: Collection[str]) -> str:
    new, old = rope.mapping.get("rope_type"), rope.mapping.get("type")
    if new is not None and old is not None and new != old:
        rope.refuse("rope_type", f"type says {shown(old)}", "Keep one of the two.")
    key = "rope_type" if new is not None else "type"
    kind = rope.string(key, "default")
    if kind in _REFUSED:
        rope.refuse(key, _REFUSED[kind], "Use a checkpoint of another type, such as the one for short contexts.")
    if kind not in types:
        rope.refuse(
            key,
            f"Cierzo computes RoPE of the types {', '.join(types)} only here; any other rotates queries and keys by "
            "other angles, so the engine would not be the same function",
            "Use a checkpoint of one of these types.",
        )
    return kind


def _check_keys(rope: ConfigReader, kind: str, further_keys: Collection[str]) -> None:
    for key, value in rope.mapping.items():
        if key in further_keys:
            continue
        if isinstance(value, dict):
            rope.refuse(
                key, "RoPE parameters that differ by kind of layer are not supported", "Use one set for all layers."
            )
        if key == "partial_rotary_factor":
            if isinstance(value, bool) or value != 1:
                rope.refuse(key, "Cierzo rotates all of each head's dimensions", "Use a checkpoint with 1.0.")
        elif key not in _KEYS_OF_TYPE[kind] | _KEYS_OF_ALL_TYPES:
            rope.refuse(
                key,
                f"RoPE type {kind} has no such parameter",
                f"If it is known to change nothing, pass --ignore-config-key {rope.prefix}{key}.",
            )


def _original_length(reader: ConfigReader, rope: ConfigReader, max_position_embeddings: int) -> int:
    """Inside the RoPE object, else at the top level, else max_position_embeddings, as transformers does."""
    key = "original_max_position_embeddings"
    inside, top = rope.optional_integer(key), reader.optional_integer(key)
    if inside is not None and top is not None and inside != top:
        reader.refuse(key, f"{rope.prefix}{key} says {inside}", "Keep one of the two.")
    return inside or top or max_position_embeddings


def _yarn_fields(rope: ConfigReader, ratio_of_lengths: float) -> dict[str, Any]:
    """Yarn's parameters; an absent factor is the ratio of the lengths, absent betas are the paper's 32 and 1."""
    factor = rope.optional_number("factor") or ratio_of_lengths
    attention_factor = rope.optional_number("attention_factor")
    if attention_factor is None:
        # A zero means "not given" here, as in the configs that spell it out.
        mscale, mscale_all_dim = (
            None if rope.mapping.get(key) == 0 else rope.optional_number(key) for key in ("mscale", "mscale_all_dim")
        )
        if mscale and mscale_all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_mscale(factor)
    return {
        "factor": factor,
        "attention_factor": attention_factor,
        "beta_fast": rope.optional_number("beta_fast") or 32.0,
        "beta_slow": rope.optional_number("beta_slow") or 1.0,
        "truncate": rope.boolean("truncate", True),
    }


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1·mscale·ln(factor) + 1, the paper's fit of the softmax temperature's root (arXiv:2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
