"""Tensor names of Mistral's own layout (`consolidated*.safetensors`), and how they become the model's parameters.

Queries and keys come with interleaved RoPE pairs and are put into Hugging Face's order, so that only one layout exists
from here on.

Symbols: H heads, G KV heads, D head dim, E experts.
"""

from __future__ import annotations

from dataclasses import replace

from reference.config import ModelConfig
from reference.weight_source import WeightSource, stacked, whole

_NAMES = {
    "embed_tokens.weight": "tok_embeddings.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "moe.router.weight": "gate.weight",
    "moe.gate_proj": "w1",
    "moe.up_proj": "w3",
    "moe.down_proj": "w2",
}
_INTERLEAVED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")


def native_source(config: ModelConfig, names: frozenset[str], parameter: str, shape: tuple[int, ...]) -> WeightSource:
    """The source of one parameter of shape `shape`; `names` are the tensors that the checkpoint has."""
    if parameter in _NAMES:
        return whole(parameter, shape, _NAMES[parameter])
    _, layer, part = parameter.split(".", 2)
    prefix, name = f"layers.{layer}.", _LAYER_NAMES[part]
    if part.startswith("moe."):
        block = f"{prefix}feed_forward."
        if f"{block}gate.weight" not in names and f"{prefix}block_sparse_moe.gate.weight" in names:
            block = f"{prefix}block_sparse_moe."
        if part == "moe.router.weight":
            return whole(parameter, shape, block + name)
        return stacked(parameter, shape, [f"{block}experts.{expert}.{name}.weight" for expert in range(shape[0])])
    source = whole(parameter, shape, prefix + name)
    return replace(source, pairs_of_head=config.head_dim) if part in _INTERLEAVED else source
