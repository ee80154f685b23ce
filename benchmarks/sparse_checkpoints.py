"""Checkpoints of a published shape without their weights: true headers and indices in front of holes.

The files have the published names, sizes and safetensors headers, and a hole where the weights would be, which reads
as zeros and takes no disk. What an export does with headers, offsets and file sizes costs what it costs on the real
checkpoint; what it does with weights reads zeros. Writing 281 GB this way takes a fraction of a second.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import Shape

HUGGING_FACE, NATIVE = "huggingface", "native"
SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in a shard: what save_pretrained took when these checkpoints were published."""

_BFLOAT16_BYTES = 2
_STEM = {HUGGING_FACE: "model", NATIVE: "consolidated"}

Tensor = tuple[str, tuple[int, ...]]

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mixtral-8x22B": _COMMON
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "max_position_embeddings": 65536,
        "num_attention_heads": 48,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 56,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    },
    "Mistral-7B": _COMMON
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
}
"""The config.json of Mixtral-8x22B-v0.1 and of Mistral-7B-v0.1."""

_NATIVE_NAMES = (
    (r"^lm_head\.", "output."),
    (r"^model\.embed_tokens\.", "tok_embeddings."),
    (r"^model\.", ""),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.([qkvo])_proj\.", r".attention.w\1."),
    (r"\.block_sparse_moe\.", ".feed_forward."),
    (r"\.mlp\.gate_proj\.", ".feed_forward.w1."),
    (r"\.mlp\.down_proj\.", ".feed_forward.w2."),
    (r"\.mlp\.up_proj\.", ".feed_forward.w3."),
)
"""Names of mistral-inference's modules for those of Hugging Face's, applied one after the other."""


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json of the Mistral family describes, in bfloat16."""
    heads = config["num_attention_heads"]
    return Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ffn=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        window=config["sliding_window"] or config["max_position_embeddings"],
        experts=config.get("num_local_experts", 0),
        dtype="bfloat16",
    )


def write_sparse(
    folder: Path, config: Mapping[str, Any], *, layout: str = HUGGING_FACE, shard_bytes: int | None = SHARD_BYTES
) -> Path:
    """Make the new folder `folder`: config.json or params.json, and every shard as a header and a hole.

    config: a config.json of the Mistral family, in the older generation's spelling.
    layout: HUGGING_FACE or NATIVE, which decides names of files, configuration and tensors.
    shard_bytes: most bytes of tensors in a file, None for one file. One file has no index.
    """
    folder.mkdir()
    tensors = shape_of(config).tensors()
    if layout == NATIVE:
        name, content = "params.json", native_params(config)
        tensors = ((native_name(tensor), extents) for tensor, extents in tensors)
    else:
        name, content = "config.json", dict(config)
    (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shards, stem = list(_sharded(tensors, shard_bytes)), _STEM[layout]
    if len(shards) == 1:
        _write_shard(folder / f"{stem}.safetensors", shards[0])
        return folder
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = folder / f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(file, shard)
        weight_map |= dict.fromkeys((tensor for tensor, _ in shard), file.name)
    total = sum(_nbytes(extents) for shard in shards for _, extents in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def native_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The params.json of mistral-inference for a config.json."""
    shape = shape_of(config)
    params: dict[str, Any] = {
        "dim": shape.hidden,
        "n_layers": shape.layers,
        "head_dim": shape.head_dim,
        "hidden_dim": shape.ffn,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": shape.vocabulary,
        "rope_theta": config["rope_theta"],
        "max_position_embeddings": config["max_position_embeddings"],
    }
    if config["sliding_window"] is not None:
        params["sliding_window"] = config["sliding_window"]
    if shape.experts:
        params["moe"] = {"num_experts_per_tok": config["num_experts_per_tok"], "num_experts": shape.experts}
    return params


def native_name(tensor: str) -> str:
    """A tensor's name in consolidated.safetensors for its name in model.safetensors."""
    for pattern, replacement in _NATIVE_NAMES:
        tensor = re.sub(pattern, replacement, tensor)
    return tensor


def allocated_bytes(files: Iterable[Path]) -> int:
    """Bytes that `files` take on the disk: no holes, and no file that another name holds as well, or that is a link."""
    stats = [file.lstat() for file in files if not file.is_symlink()]
    return sum(512 * stat.st_blocks for stat in stats if stat.st_nlink == 1)


def _nbytes(extents: tuple[int, ...]) -> int:
    return _BFLOAT16_BYTES * math.prod(extents)


def _sharded(tensors: Iterable[Tensor], shard_bytes: int | None) -> Iterator[list[Tensor]]:
    """Tensors in order, a new shard wherever the next one would not fit any more."""
    shard: list[Tensor] = []
    used = 0
    for tensor, extents in tensors:
        if shard and shard_bytes is not None and used + _nbytes(extents) > shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append((tensor, extents))
        used += _nbytes(extents)
    yield shard


def _write_shard(file: Path, tensors: list[Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor, extents in tensors:
        end = begin + _nbytes(extents)
        header[tensor] = {"dtype": "BF16", "shape": extents, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + begin)
