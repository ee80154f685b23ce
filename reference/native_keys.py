"""What each key of a params.json may be: read, without influence on inference, fixed, or unknown and refused.

Published files carry keys of models that they do not describe, with null (Ministral 3 has those of latent attention),
so null is accepted where it says that something is not there. The sorts are those of `reference.config_keys`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from reference.config_reader import Absent, ConfigReader, shown
from runtime.errors import ConfigError

PARAMS_FILE = "params.json"

_SIZES = frozenset({"dim", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "n_layers", "norm_eps", "vocab_size"})
_CONSUMED = _SIZES | {
    "_sliding_window", "activation", "dtype", "llama_4_scaling", "max_position_embeddings", "max_seq_len", "model_type",
    "moe", "multimodal", "rope_theta", "sliding_window", "tied_embeddings", "vision_encoder", "yarn",
}  # fmt: skip
# How many rows the reference implementation makes room for when it starts.
_NEUTRAL = frozenset({"max_batch_size"})

_NO_LATENT = "Cierzo's model keeps whole keys and values and has no latent attention (MLA)"
_NO_BIAS = "the projections of Mistral's text models have no bias"
_NO_CONDITION = "Cierzo's norms do not depend on a time"
_QUANTISED = "the tensors are then packed in a quantised layout that Cierzo does not read"

_FIXED: dict[str, tuple[tuple[object, ...], str]] = {
    "ada_rms_norm_t_cond": ((None, False), _NO_CONDITION),
    "ada_rms_norm_t_cond_dim": ((None,), _NO_CONDITION),
    "causal": ((True,), "Cierzo's model is a causal decoder"),
    "kv_lora_rank": ((None,), _NO_LATENT),
    "lora": ((None,), "the adapter would have to be merged into the weights first"),
    "q_lora_rank": ((None,), _NO_LATENT),
    "qk_nope_head_dim": ((None,), _NO_LATENT),
    "qk_rope_head_dim": ((None,), _NO_LATENT),
    "quantization": ((None,), _QUANTISED),
    "quantization_config": ((None,), _QUANTISED),
    "use_biases": ((None, False), _NO_BIAS),
    "v_head_dim": ((None,), _NO_LATENT),
}


class ParamsReader(ConfigReader):
    """A ConfigReader whose messages name params.json."""

    def refuse(self, key: str, cause: str, way_out: str) -> NoReturn:
        value = shown(self.mapping.get(key))
        raise ConfigError(f"{PARAMS_FILE} says {self.prefix}{key} = {value}, but {cause}. {way_out}")

    def _get(self, key: str, default: object) -> object:
        if key not in self.mapping and isinstance(default, Absent):
            raise ConfigError(
                f"{PARAMS_FILE} has no {self.prefix}{key}, which this kind of model needs. "
                f"Copy the {PARAMS_FILE} that was published with the weights."
            )
        return super()._get(key, default)

    def one_of(self, key: str, default: str, known: Collection[str]) -> str:
        """The string under `key`, one of `known`."""
        value = self.string(key, default)
        if value not in known:
            self.refuse(key, f"Cierzo knows {', '.join(known)} only", "Use a checkpoint with one of these.")
        return value

    def inside(self, key: str, known: Collection[str]) -> ParamsReader | None:
        """The object under `key`, which may have the keys `known` only; None for null and absence."""
        if self._get(key, None) is None:
            return None
        inner = ParamsReader(self.optional_mapping(key), prefix=f"{key}.")
        for name in inner.mapping:
            if name not in known:
                inner.refuse(
                    name,
                    "Cierzo does not know what that means, so the engine might compute something else",
                    f"If it is known to change nothing at inference, pass --ignore-config-key {inner.prefix}{name}.",
                )
        return inner


def kept(mapping: Mapping[str, Any], ignore_keys: Collection[str]) -> dict[str, Any]:
    """`mapping` without the keys to ignore, at the top and inside objects."""
    for key in sorted(set(ignore_keys) & _CONSUMED):
        raise ConfigError(
            f"{key} decides what the model computes, so it cannot be ignored. "
            f"Correct its value in a copy of {PARAMS_FILE} instead, if you are sure of the right one."
        )
    kept = {key: value for key, value in mapping.items() if key not in ignore_keys}
    for key, value in kept.items():
        if isinstance(value, dict):
            kept[key] = {name: inner for name, inner in value.items() if f"{key}.{name}" not in ignore_keys}
    return kept


def check_keys(reader: ParamsReader) -> None:
    """Refuse the first key that is not consumed, neutral, or fixed at the value that Cierzo computes."""
    for key, value in reader.mapping.items():
        if key in _CONSUMED or key in _NEUTRAL:
            continue
        if key not in _FIXED:
            reader.refuse(
                key,
                "Cierzo does not know what that means, so the engine might compute something else",
                f"If it is known to change nothing at inference, pass --ignore-config-key {key}.",
            )
        allowed, cause = _FIXED[key]
        if not any(type(value) is type(one) and value == one for one in allowed):
            reader.refuse(
                key,
                f"{cause}; accepted here: {', '.join(shown(one) for one in allowed)}",
                f"Use a checkpoint without it, or pass --ignore-config-key {key} if it is known to change nothing.",
            )
