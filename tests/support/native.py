"""The native twin of a Hugging Face checkpoint: params.json and consolidated.safetensors of the same model.

Written from the published description of the layout and with safetensors alone. Nothing here uses Cierzo, so a test
that opens both folders compares two readings of one model.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_IN_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "block_sparse_moe.gate": "feed_forward.gate",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])")


def as_native(hugging_face: str | Path, out: str | Path, *, shards: int = 1, index: bool = True, **params: Any) -> Path:
    """Write the native twin of a folder of `make_checkpoint` (experts as published) into `out`, and return `out`.

    shards: more than one writes consolidated-0000i-of-000NN.safetensors, and their index if `index`.
    params: keys of params.json to set, or with None to leave out.
    """
    source, out = Path(hugging_face), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    content = {key: value for key, value in (native_params(config) | params).items() if value is not None}
    (out / "params.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("model*.safetensors")):
        stored |= load_file(file)
    tensors = native_tensors(stored, content["head_dim"])
    if shards == 1:
        save_file(tensors, out / "consolidated.safetensors")
        return out
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file_name = f"consolidated-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, out / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    if index:
        total = sum(tensor.nbytes for tensor in tensors.values())
        (out / "consolidated.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}), encoding="utf-8"
        )
    return out


def native_tensors(hugging_face: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """The tensors under their native names, queries and keys with the two of each rotated pair side by side."""
    tensors = {}
    for name, tensor in hugging_face.items():
        native = _native_name(name)
        rotated = name.endswith(("q_proj.weight", "k_proj.weight"))
        tensors[native] = interleaved(tensor, head_dim) if rotated else tensor.clone()
    return tensors


def interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows [H·D, C] of a projection by pairs, where each head had the first of all pairs before the second."""
    by_half = rows.view(-1, 2, head_dim // 2, rows.shape[1])
    return by_half.transpose(1, 2).reshape(rows.shape).contiguous()


def native_params(config: dict[str, Any]) -> dict[str, Any]:
    """params.json out of a config.json of transformers 5 or of the generation before."""
    rope = config.get("rope_parameters") or (config.get("rope_scaling") or {}) | {"rope_theta": config["rope_theta"]}
    params: dict[str, Any] = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": rope["rope_theta"],
        "max_position_embeddings": config["max_position_embeddings"],
        "activation": config["hidden_act"],
    }
    window = config.get("sliding_window")
    if config["model_type"] == "ministral":
        params["sliding_window"] = [window if kind == "sliding_attention" else None for kind in config["layer_types"]]
    elif window is not None:
        params["sliding_window"] = window
    if config["model_type"] == "mixtral":
        params["moe"] = {
            "num_experts": config["num_local_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
        }
    if config["tie_word_embeddings"]:
        params["tied_embeddings"] = True
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "yarn":
        params["yarn"] = _yarn(rope)
    elif kind != "default":
        raise ValueError(f"the native layout has no RoPE of type {kind}")
    if rope.get("llama_4_scaling_beta"):  # zero is how transformers says that there is none
        params["llama_4_scaling"] = {
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "beta": rope["llama_4_scaling_beta"],
        }
    return params


def _yarn(rope: dict[str, Any]) -> dict[str, Any]:
    """apply_scale is whether cos and sin are multiplied, which transformers' config says in one of three ways."""
    factor, scaled = rope["factor"], True
    if rope.get("attention_factor") is not None:
        scaled = rope["attention_factor"] != 1.0
        if scaled and not math.isclose(rope["attention_factor"], 0.1 * math.log(factor) + 1):
            raise ValueError("the native layout has no attention_factor of its own")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        if rope["mscale"] != rope["mscale_all_dim"]:
            raise ValueError("the native layout has no ratio of mscales")
        scaled = False
    return {
        "factor": factor,
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta": rope.get("beta_fast") or 32,
        "alpha": rope.get("beta_slow") or 1,
        "apply_scale": scaled,
    }


def _native_name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _LAYER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} has no native name")
    layer, part = match.groups()
    expert = _EXPERT.fullmatch(part)
    native = f"feed_forward.experts.{expert[1]}.{expert[2]}" if expert else _IN_LAYER[part]
    return f"layers.{layer}.{native}.weight"
