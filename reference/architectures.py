"""The architecture table: what each model_type of a config.json means, a row each.

A row holds what the config class of transformers fills in for an absent key, which keys it reads beside the common
ones, and which features its model has; `reference.hf_config` reads a config.json by it, and nothing else in Cierzo
asks for a model_type. A further architecture is one more row, and one weight map if its tensors have other names.

Not in a row, since all rows share it: a decoder of pre-norm layers with RMSNorm, grouped-query attention with RoPE over
whole heads, and a gated feed-forward layer, or a mixture of such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from reference.config_keys import Fixed
from reference.layer_windows import BY_LAYER, LAST_LAYERS, NO_WINDOW, ONE_SWITCHED, ONE_WINDOW, WindowRule
from reference.rope_config import ROPE_TYPES


@dataclass(frozen=True, slots=True)
class Experts:
    """How a mixture of experts is spelled, with the defaults of its class.

    size_key: the key of each expert's intermediate size; size its default.
    renormalised_by: the key that says whether the chosen weights are scaled to sum to one, which Cierzo's router
        always does; false when absent. None where the class always does.
    """

    count: int
    top_k: int
    size_key: str = "intermediate_size"
    size: int = 14336
    renormalised_by: str | None = None

    @property
    def keys(self) -> frozenset[str]:
        """The keys that say this; transformers takes either name for the number of experts."""
        keys = {"num_experts", "num_local_experts", "num_experts_per_tok", self.size_key}
        return frozenset(keys if self.renormalised_by is None else keys | {self.renormalised_by})


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row.

    model_class: name of the class in transformers whose function this is.
    vocab_size to eos_token_id: defaults of the config class. num_kv_heads None: as many as heads. head_dim None: hidden
        size by heads. theta: of an absent rope_theta. window: of an absent sliding_window.
    rope: what stands for RoPE parameters that are absent altogether. rope_types: those that the class takes.
    windows: how the layers' windows are read. experts: present where every layer is a mixture.
    qkv_bias: queries, keys and values always have a bias. attention_bias: the key of that name gives one to all four
        projections. mlp_bias: the key of that name gives one to the feed-forward layer.
    qk_norm: queries and keys pass a norm. query_scaling: rotated queries grow with the position, by RoPE's
        llama_4_scaling_beta and original_max_position_embeddings.
    weight_map: one of `reference.weight_maps.WEIGHT_MAPS`.
    neutral: keys that change nothing here. fixed: keys that may have certain values only, before the common ones.
    """

    model_class: str
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = 8
    head_dim: int | None = None
    max_position_embeddings: int = 131072
    norm_eps: float = 1e-6
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    theta: float = 10_000.0
    rope: Mapping[str, Any] | None = None
    rope_types: tuple[str, ...] = ROPE_TYPES
    windows: WindowRule = ONE_WINDOW
    window: int | None = None
    experts: Experts | None = None
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    query_scaling: bool = False
    weight_map: str = "plain"
    neutral: frozenset[str] = frozenset()
    fixed: Fixed = field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        """The keys that this row reads beside `reference.config_keys.CONSUMED`."""
        biases = {"attention_bias"} if self.attention_bias else set()
        biases |= {"mlp_bias"} if self.mlp_bias else set()
        return self.windows.keys | biases | (self.experts.keys if self.experts is not None else frozenset())


_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "window": 4096,
}
_QWEN_DENSE: dict[str, Any] = {"intermediate_size": 22016, "num_kv_heads": 32, "windows": LAST_LAYERS}
_NO_MROPE: Fixed = {"use_mrope": ((False, None), "Cierzo rotates by one position for each token")}
_QK_NORM: Fixed = {"use_qk_norm": ((True, None), "this architecture normalises queries and keys whatever the key says")}
_NOT_SHARED = "Cierzo's mixtures have no expert that all tokens visit"
_ALL_MIXTURES = "Cierzo's layers are all mixtures of experts or none of them is"
_MINISTRAL_3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_PHI_3_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "mistral": Architecture("MistralForCausalLM", window=4096),
        "mixtral": Architecture(
            "MixtralForCausalLM", norm_eps=1e-5, theta=1_000_000.0, experts=Experts(8, 2), weight_map="mixtral"
        ),
        "ministral": Architecture("MinistralForCausalLM", windows=BY_LAYER, window=4096),
        "ministral3": Architecture(
            "Ministral3ForCausalLM",
            vocab_size=131072,
            num_layers=34,
            head_dim=128,
            max_position_embeddings=262144,
            norm_eps=1e-5,
            rope=_MINISTRAL_3_ROPE,
            query_scaling=True,
        ),
        "llama": Architecture(
            "LlamaForCausalLM",
            intermediate_size=11008,
            num_kv_heads=None,
            max_position_embeddings=2048,
            windows=NO_WINDOW,
            attention_bias=True,
            mlp_bias=True,
        ),
        "qwen2": Architecture("Qwen2ForCausalLM", **_QWEN, **_QWEN_DENSE, qkv_bias=True, fixed=_NO_MROPE),
        "qwen3": Architecture(
            "Qwen3ForCausalLM", **_QWEN, **_QWEN_DENSE, head_dim=128, attention_bias=True, qk_norm=True, fixed=_QK_NORM
        ),
        "qwen3_moe": Architecture(
            "Qwen3MoeForCausalLM",
            **_QWEN,
            hidden_size=2048,
            intermediate_size=6144,
            num_layers=24,
            num_kv_heads=4,
            windows=ONE_SWITCHED,
            experts=Experts(128, 8, size_key="moe_intermediate_size", size=768, renormalised_by="norm_topk_prob"),
            attention_bias=True,
            qk_norm=True,
            weight_map="qwen3_moe",
            # intermediate_size is that of layers without experts, max_window_layers of the dense models.
            neutral=frozenset({"intermediate_size", "max_window_layers"}),
            fixed={
                **_QK_NORM,
                "decoder_sparse_step": ((1,), _ALL_MIXTURES),
                "mlp_only_layers": ((None, []), _ALL_MIXTURES),
                "shared_expert_intermediate_size": ((None, 0), _NOT_SHARED),
            },
        ),
        "phi3": Architecture(
            "Phi3ForCausalLM",
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            num_kv_heads=None,
            max_position_embeddings=4096,
            norm_eps=1e-5,
            eos_token_id=32000,
            rope_types=("default",),
            weight_map="phi3",
            neutral=frozenset({"embd_pdrop", "resid_pdrop"}),  # dropouts
            # The published files name the code from before transformers had this class.
            fixed={"auto_map": ((None, {}, _PHI_3_CODE), "the model's own code would run, which Cierzo cannot read")},
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A model that sees images and whose language model is one of ARCHITECTURES.

    text_model: the model_type of a text_config that names none. text_config: what stands for an absent one.
    tied_by_either: tie_word_embeddings of the text_config counts as well as that of the wrapper.
    """

    model_class: str
    text_model: str
    text_config: Mapping[str, Any]
    tied_by_either: bool


WRAPPERS: Mapping[str, Wrapper] = MappingProxyType(
    {
        "mistral3": Wrapper(
            "Mistral3ForConditionalGeneration",
            "mistral",
            {
                "head_dim": 128,
                "hidden_size": 5120,
                "intermediate_size": 32768,
                "max_position_embeddings": 131072,
                "num_attention_heads": 32,
                "num_hidden_layers": 40,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1_000_000_000.0,
                "sliding_window": None,
                "vocab_size": 131072,
            },
            tied_by_either=False,
        ),
        "llava": Wrapper("LlavaForConditionalGeneration", "llama", {}, tied_by_either=True),
    }
)
