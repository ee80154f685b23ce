"""Tensor names of Mistral's own layout (`consolidated*.safetensors`), and how they become the model's parameters.

Queries and keys come with interleaved RoPE pairs and are put into Hugging Face's order, so that only one layout exists
from here on.

Symbols: H heads, G KV heads, D head dim, E experts.
"""

from __future__ import annotations

import re
from dataclasses import replace

from reference.config import ModelConfig
from reference.weight_source import WeightSource, stacked, whole

NATIVE_LM_HEAD = "output.weight"
_NAMES = {
    "embed_tokens.weight": "tok_embeddings.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": NATIVE_LM_HEAD,
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

_IMAGES = re.compile(r"(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\..+")
_FAKE_QUANTISER = re.compile(r"layers\.\d+\.(attention\.)?[qkv]+_fake_quantizer\.qscale_act")


def native_source(config: ModelConfig, names: frozenset[str], parameter: str, shape: tuple[int, ...]) -> WeightSource:
    """The source of one parameter of shape `shape`; `names`, what the checkpoint has, decides nothing in this layout.

    Every expert is a tensor of its own. (The first Mixtral stacked them in another way, in a pickle only.)
    """
    if parameter in _NAMES:
        return whole(parameter, shape, _NAMES[parameter])
    _, layer, part = parameter.split(".", 2)
    prefix, name = f"layers.{layer}.", _LAYER_NAMES[part]
    if part == "moe.router.weight":
        return whole(parameter, shape, f"{prefix}feed_forward.{name}")
    if part.startswith("moe."):
        experts = f"{prefix}feed_forward.experts"
        return stacked(parameter, shape, [f"{experts}.{expert}.{name}.weight" for expert in range(shape[0])])
    source = whole(parameter, shape, prefix + name)
    return replace(source, pairs_of_head=config.head_dim) if part in _INTERLEAVED else source


def native_unused_reason(config: ModelConfig, name: str, *, text_only: bool = False) -> str | None:
    """Why the tensor `name` of a native checkpoint may be left unread, or None when it may not.

    text_only: see `reference.checkpoint.Checkpoint`.
    """
    if text_only and _IMAGES.fullmatch(name):
        return "it reads images, and only the language model was asked for"
    if name == NATIVE_LM_HEAD and config.tie_word_embeddings:
        return "the output projection is tied to the embedding and holds the same values"
    if _FAKE_QUANTISER.fullmatch(name):
        return "training with simulated quantisation left it; the unquantised model does not use it"
    return None
