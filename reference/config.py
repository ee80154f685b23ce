"""The model's shape and constants, read from a Hugging Face config.json and validated.

`ModelConfig.from_hf` understands both generations of the file: `rope_theta`, `rope_scaling` and `torch_dtype` at the
top level (published checkpoints), and `rope_parameters` and `dtype` (written by transformers 5). A key that is absent
gets the default of the config class in `transformers`, which is what every other reader of the file computes with.
Two of those defaults are easily missed: Mistral's sliding_window is 4096 when the key is absent and none when it is
null; Mixtral's is none in both cases, and its rope_theta is 1e6 instead of 1e4.

Symbols: L layers, H heads, G KV heads, D head dim, W window, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from reference.config_keys import check_keys, drop_ignored
from reference.config_reader import ConfigReader, refuse
from reference.rope_config import RopeConfig, read_rope
from runtime.errors import ConfigError

__all__ = ["ARCHITECTURES", "DTYPES", "SUPPORTED_ACTIVATIONS", "MoEConfig", "ModelConfig", "QueryScaling", "RopeConfig"]

ARCHITECTURES = ("mistral", "mixtral", "ministral")
DTYPES = ("float32", "float16", "bfloat16")
SUPPORTED_ACTIVATIONS = frozenset(
    {"silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh"}
)
"""The names under which reference.activations holds a function."""

_MODEL_CLASS = {"mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM", "ministral": "MinistralForCausalLM"}
_DEFAULT_EPS = {"mistral": 1e-6, "mixtral": 1e-5, "ministral": 1e-6}
_DEFAULT_THETA = {"mistral": 10_000.0, "mixtral": 1_000_000.0, "ministral": 10_000.0}
_DEFAULT_WINDOW = {"mistral": 4096, "mixtral": None, "ministral": 4096}
_SLIDING, _FULL = "sliding_attention", "full_attention"


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

    architecture: one of ARCHITECTURES.
    num_kv_heads: G; each KV head serves H / G query heads. head_dim: D, independent of hidden_size / H.
    norm_eps: added to the mean square in RMSNorm. activation: one of SUPPORTED_ACTIVATIONS.
    layer_windows: for each layer W, so that token i sees j when 0 <= i - j < W, or None for full causal attention.
    moe: present exactly for mixtral. tie_word_embeddings: the output projection is the embedding matrix.
    dtype: one of DTYPES, the type that config.json gives the weights; the tensors say for themselves what they are.
    eos_token_ids: ids that end a text; may be empty.
    qkv_bias, output_bias, mlp_bias: whether the projections of queries, keys and values, the attention's output
        projection, and those of the feed-forward layer add a bias.
    qk_norm: queries and keys of each head pass an RMSNorm over D, with norm_eps, before they are rotated.
    query_scaling: factor on rotated queries that grows with the position, or None.
    position_limit: positions from here on are not the same function for every engine, so none may run there; or None.
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

    def __post_init__(self) -> None:
        _require(
            self.architecture in ARCHITECTURES, f"the architecture is {self.architecture!r}, not one of {ARCHITECTURES}"
        )
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, but it must be at least 1")
        _require(self.max_position_embeddings >= 1, "max_position_embeddings must be at least 1")
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
            math.isfinite(self.norm_eps) and self.norm_eps > 0, f"rms_norm_eps is {self.norm_eps}, but it must exceed 0"
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
            (self.moe is not None) == (self.architecture == "mixtral"),
            "experts belong to mixtral and to no other architecture",
        )
        if self.moe is not None:
            _require(
                1 <= self.moe.top_k <= self.moe.num_experts,
                f"num_experts_per_tok = {self.moe.top_k} must lie between 1 and "
                f"num_local_experts = {self.moe.num_experts}",
            )
        _require(
            self.dtype in DTYPES, f"the weights are said to be {self.dtype}, and Cierzo reads {', '.join(DTYPES)} only"
        )
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for token in ids:
                _require(
                    token is None or 0 <= token < self.vocab_size,
                    f"{name} is {token}, which is no id of a vocabulary of {self.vocab_size}",
                )

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any], *, ignore_keys: Collection[str] = ()) -> Self:
        """Read the parsed content of a config.json.

        ignore_keys: keys to pass over although Cierzo does not know them ("rope_scaling.KEY" for one inside).
        Raises ConfigError, naming key, value, cause and way out, for anything that cannot be represented exactly.
        """
        kept = drop_ignored(mapping, ignore_keys)
        reader = ConfigReader(kept)
        architecture = reader.string("model_type")
        if architecture not in ARCHITECTURES:
            reader.refuse(
                "model_type",
                f"Cierzo builds {', '.join(ARCHITECTURES)} only",
                "Other architectures need a model of their own; see CONTRIBUTING for what that takes.",
            )
        check_keys(kept, architecture)
        _check_model_class(reader, architecture)
        num_layers = reader.integer("num_hidden_layers", 32)
        num_heads = reader.integer("num_attention_heads", 32)
        max_position_embeddings = reader.integer("max_position_embeddings", 131072)
        bos_token_ids = reader.token_ids("bos_token_id", (1,))
        if len(bos_token_ids) > 1:
            reader.refuse("bos_token_id", "a text begins with one token", "Write one id or null.")
        return cls(
            architecture=architecture,
            vocab_size=reader.integer("vocab_size", 32000),
            hidden_size=reader.integer("hidden_size", 4096),
            intermediate_size=reader.integer("intermediate_size", 14336),
            num_layers=num_layers,
            num_heads=num_heads,
            # Null means one KV head per query head; an absent key means 8, the default of all three classes.
            num_kv_heads=reader.optional_integer("num_key_value_heads", 8) or num_heads,
            head_dim=_head_dim(reader, num_heads),
            norm_eps=reader.number("rms_norm_eps", _DEFAULT_EPS[architecture]),
            activation=_activation(reader),
            rope=read_rope(
                reader,
                default_theta=_DEFAULT_THETA[architecture],
                max_position_embeddings=max_position_embeddings,
                ignored=ignore_keys,
            ),
            layer_windows=_layer_windows(reader, architecture, num_layers),
            moe=MoEConfig(reader.integer("num_local_experts", 8), reader.integer("num_experts_per_tok", 2))
            if architecture == "mixtral"
            else None,
            tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
            max_position_embeddings=max_position_embeddings,
            dtype=_dtype(reader),
            bos_token_id=bos_token_ids[0] if bos_token_ids else None,
            eos_token_ids=reader.token_ids("eos_token_id", (2,)),
        )


def _require(holds: bool, what_is_wrong: str) -> None:
    if not holds:
        raise ConfigError(
            f"This model config contradicts itself or Cierzo: {what_is_wrong}. Compare it with the published one."
        )


def _check_model_class(reader: ConfigReader, architecture: str) -> None:
    classes = reader.optional_strings("architectures")
    if classes and _MODEL_CLASS[architecture] not in classes:
        reader.refuse(
            "architectures",
            f"Cierzo computes {_MODEL_CLASS[architecture]}, a decoder with its language-model head, and nothing else",
            "Use the language-model checkpoint that this one was derived from.",
        )


def _head_dim(reader: ConfigReader, num_heads: int) -> int:
    head_dim = reader.optional_integer("head_dim")
    if head_dim is not None:
        return head_dim
    hidden_size = reader.integer("hidden_size", 4096)
    if hidden_size % num_heads:
        refuse(
            "hidden_size",
            hidden_size,
            f"it is not a multiple of num_attention_heads = {num_heads} and there is no head_dim",
            "Write the head_dim that the weights were trained with.",
        )
    return hidden_size // num_heads


def _activation(reader: ConfigReader) -> str:
    activation = reader.string("hidden_act", "silu")
    if activation not in SUPPORTED_ACTIVATIONS:
        reader.refuse(
            "hidden_act",
            f"Cierzo computes {', '.join(sorted(SUPPORTED_ACTIVATIONS))} only",
            "Use a checkpoint with one of these activations.",
        )
    return activation


def _dtype(reader: ConfigReader) -> str:
    new, old = (reader.string(key) if reader.mapping.get(key) is not None else None for key in ("dtype", "torch_dtype"))
    if new is not None and old is not None and new != old:
        reader.refuse("dtype", f"torch_dtype says {old!r}", "Keep the one that names the type of the tensors.")
    dtype = new or old or "float32"
    if dtype not in DTYPES:
        reader.refuse(
            "dtype" if new is not None else "torch_dtype",
            f"Cierzo reads weights of {', '.join(DTYPES)} only",
            "Convert the tensors to one of these types and name it here.",
        )
    return dtype


def _layer_windows(reader: ConfigReader, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """W or None for each layer, as transformers masks them.

    Its Mistral and Mixtral models mask all layers by sliding_window and read layer_types in the cache only, so a
    layer_types that says anything else is a contradiction. All three ignore use_sliding_window; it may stand there as
    long as it says what happens anyway.
    """
    window = reader.optional_integer("sliding_window", _DEFAULT_WINDOW[architecture])
    by_window = (_FULL if window is None else _SLIDING,) * num_layers
    kinds = reader.optional_strings("layer_types") or by_window
    if len(kinds) != num_layers:
        reader.refuse(
            "layer_types", f"it has {len(kinds)} entries for {num_layers} layers", "Write one for each layer."
        )
    unknown = [kind for kind in kinds if kind not in (_SLIDING, _FULL)]
    if unknown:
        reader.refuse("layer_types", f"Cierzo knows {_SLIDING} and {_FULL} only", "Use a checkpoint with these.")
    if architecture != "ministral" and kinds != by_window:
        reader.refuse(
            "layer_types",
            f"{architecture} has one sliding_window for all layers, here {window}, and would mask by that alone",
            "If the layers really differ, the model_type of these weights is ministral.",
        )
    if window is None and _SLIDING in kinds:
        reader.refuse("layer_types", "sliding_window is null", "Write the window of the layers that slide.")
    if "use_sliding_window" in reader.mapping and reader.boolean("use_sliding_window", True) != (_SLIDING in kinds):
        reader.refuse(
            "use_sliding_window",
            f"{architecture} does not read this key and goes by sliding_window, which is {window}",
            "Set sliding_window to null for full attention, or to the window, and delete this key.",
        )
    return tuple(window if kind == _SLIDING else None for kind in kinds)
