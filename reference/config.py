"""The model's shape and constants, validated: what every stage behind the checkpoint's config file goes by.

`ModelConfig.from_hf` reads a Hugging Face config.json (`reference.hf_config`), `reference.native_config` Mistral's own
params.json. Both give equal objects for the same model.

Symbols: L layers, H heads, G KV heads, D head dim, W window, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from reference.architectures import ARCHITECTURES as TABLE
from reference.quantization_config import Quantization
from reference.rope_config import RopeConfig
from runtime.errors import ConfigError

__all__ = ["ARCHITECTURES", "DTYPES", "SUPPORTED_ACTIVATIONS", "MoEConfig", "ModelConfig", "QueryScaling", "RopeConfig"]

ARCHITECTURES = tuple(TABLE)
DTYPES = ("float32", "float16", "bfloat16")
SUPPORTED_ACTIVATIONS = frozenset(
    {"silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh"}
)
"""The names under which reference.activations holds a function."""

MOST: Mapping[str, int] = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 20,
    "num_layers": 1024,
    "num_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "head_dim": 1 << 14,
    "num_experts": 4096,
    "experts_of_all_layers": 1 << 16,
    "max_position_embeddings": (1 << 31) - 1,
}
"""Sizes of which more can only be damage, so that a damaged file is refused and does not fill the memory with names.

Each is at least eight times that of the largest model published (126 layers, 384 experts, 23,424 experts in all
layers but for that last one, which has less than three); a matrix of any two of them counts its bytes in 64 bits.
"""


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """A mixture of experts in place of each layer's MLP: E = num_experts, of which each token visits top_k."""

    num_experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class QueryScaling:
    """Queries at position p are multiplied by 1 + beta · ln(1 + floor(p / length)) (Llama 4; Ministral 3)."""

    beta: float
    length: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that decides the function which the weights parametrise; contradictions raise ConfigError.

    architecture: one of ARCHITECTURES, the rows of `reference.architectures`.
    num_kv_heads: G; each KV head serves H / G query heads. head_dim: D, independent of hidden_size / H.
    norm_eps: added to the mean square in RMSNorm. activation: one of SUPPORTED_ACTIVATIONS.
    layer_windows: for each layer W, so that token i sees j when 0 <= i - j < W, or None for full causal attention.
    moe: present exactly for architectures with experts; intermediate_size is then that of each.
    tie_word_embeddings: the output projection is the embedding matrix.
    dtype: one of DTYPES, the type that config.json gives the weights; the tensors say for themselves what they are.
    eos_token_ids: ids that end a text; may be empty.
    qkv_bias, output_bias, mlp_bias: whether the projections of queries, keys and values, the attention's output
        projection, and those of the feed-forward layer add a bias.
    qk_norm: queries and keys of each head pass an RMSNorm over D, with norm_eps, before they are rotated.
    query_scaling: factor on rotated queries that grows with the position, or None.
    position_limit: positions from here on are not the same function for every engine, so none may run there; or None.
    quantization: how the checkpoint packs its matrices; None where all are plain.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    rope: RopeConfig
    layer_windows: tuple[int | None, ...]
    moe: MoEConfig | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    query_scaling: QueryScaling | None = None
    position_limit: int | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        _require(
            self.architecture in ARCHITECTURES, f"the architecture is {self.architecture!r}, not one of {ARCHITECTURES}"
        )
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, but it must be at least 1")
        _require(self.max_position_embeddings >= 1, "max_position_embeddings must be at least 1")
        sizes = {name: getattr(self, name) for name in MOST if hasattr(self, name)}
        if self.moe is not None:
            sizes["num_experts"] = self.moe.num_experts
            sizes["experts_of_all_layers"] = self.moe.num_experts * self.num_layers
        for name, size in sizes.items():
            _require(size <= MOST[name], f"{name} is {size:,}, and no model has more than {MOST[name]:,}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_attention_heads = {self.num_heads} is not a multiple of num_key_value_heads = {self.num_kv_heads}, "
            "so the query heads cannot share the KV heads evenly",
        )
        _require(
            self.head_dim >= 2 and self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}, but RoPE rotates pairs, so it must be even and at least 2",
        )
        _require(
            1e-30 <= self.norm_eps <= 1,
            f"rms_norm_eps is {self.norm_eps}, but it must lie between 1e-30 and 1 to mean anything in float32",
        )
        _require(
            self.activation in SUPPORTED_ACTIVATIONS,
            f"hidden_act is {self.activation!r}, and Cierzo computes {', '.join(sorted(SUPPORTED_ACTIVATIONS))} only",
        )
        _require(
            len(self.layer_windows) == self.num_layers,
            f"there are {len(self.layer_windows)} windows for num_hidden_layers = {self.num_layers}",
        )
        _require(
            all(window is None or window >= 1 for window in self.layer_windows),
            f"a window of {min(window for window in (*self.layer_windows, 1) if window is not None)} sees no token, "
            "not even the current one; the least is 1",
        )
        _require(
            (self.moe is not None) == (TABLE[self.architecture].experts is not None),
            f"{self.architecture} has {'no experts' if self.moe is not None else 'experts in every layer'}",
        )
        if self.moe is not None:
            _require(
                1 <= self.moe.top_k <= self.moe.num_experts,
                f"num_experts_per_tok = {self.moe.top_k} must lie between 1 and "
                f"the number of experts = {self.moe.num_experts}",
            )
        if self.query_scaling is not None:
            beta, length = self.query_scaling.beta, self.query_scaling.length
            _require(
                math.isfinite(beta) and beta > 0 and length >= 1,
                f"queries grow by {beta} every {length} positions, but both must exceed 0",
            )
        _require(self.position_limit is None or self.position_limit >= 1, "position_limit must be at least 1")
        _require(
            self.dtype in DTYPES, f"the weights are said to be {self.dtype}, and Cierzo reads {', '.join(DTYPES)} only"
        )
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for token in ids:
                _require(
                    token is None or 0 <= token < self.vocab_size,
                    f"{name} is {token}, which is no id of a vocabulary of {self.vocab_size}",
                )

    @staticmethod
    def from_hf(
        mapping: Mapping[str, Any], *, ignore_keys: Collection[str] = (), text_only: bool = False
    ) -> ModelConfig:
        """Read the parsed content of a config.json; see `reference.hf_config.read_hf`."""
        from reference.hf_config import read_hf  # which makes the object that this module defines

        return read_hf(mapping, ignore_keys=ignore_keys, text_only=text_only)


def _require(holds: bool, what_is_wrong: str) -> None:
    if not holds:
        raise ConfigError(
            f"This model config contradicts itself or Cierzo: {what_is_wrong}. Compare it with the published one."
        )
