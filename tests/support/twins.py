"""Shrunken twins of published models: the published config.json with small sizes, and random weights that fit it.

One function shrinks all of them. Sizes and lengths become small, and the same for all, so that twins of one structure
share a trace. What makes a model a kind of its own stays: theta and RoPE type, tied embeddings, biases, whether KV
heads are shared, whether the heads together are as wide as the hidden states, the dtype of the tensors, the generation
of the file, and every key that is left.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.checkpoints import randomise

CONFIGS = Path(__file__).parent / "configs"
PUBLISHED = tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))
"""Names of the published models with a fixture."""

WINDOW, LENGTH, FIRST_LENGTH = 5, 64, 16
"""Sliding window and max_position_embeddings of a twin, and the length before its context was stretched."""

_HEADS, _HEAD_DIM = 4, 8
_WIDTH = _HEADS * _HEAD_DIM
_SIZES = {"vocab_size": 64, "intermediate_size": 48, "moe_intermediate_size": 48, "num_attention_heads": _HEADS}
_SIZES |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": LENGTH}
_SIZES |= {"sliding_window": WINDOW, "head_dim": _HEAD_DIM, "original_max_position_embeddings": LENGTH}
_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def published(name: str) -> dict[str, Any]:
    """The config.json as published."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


def shrunk(config: dict[str, Any], num_layers: int = 2) -> dict[str, Any]:
    """`config` with small sizes, for a wrapper those of the language model and of the vision tower inside."""
    small = copy.deepcopy(config)
    if "text_config" in small:
        small["text_config"] = shrunk(small["text_config"], num_layers)
        small["vision_config"] |= {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2}
        small["vision_config"] |= {"num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
        return small
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = heads * (config.get("head_dim") or hidden // heads)
    small |= {key: size for key, size in _SIZES.items() if small.get(key) is not None}
    small["num_hidden_layers"] = num_layers
    small["num_key_value_heads"] = _HEADS if config["num_key_value_heads"] == heads else _HEADS // 2
    small["hidden_size"] = _WIDTH if hidden == width else _WIDTH + _HEAD_DIM
    for rope in (small.get("rope_scaling"), small.get("rope_parameters")):
        if rope is not None and "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] = FIRST_LENGTH
    return small


def make_twin(folder: Path, config: dict[str, Any], *, old_names: bool = True, seed: int = 0) -> Path:
    """Write random weights for `config`, and `config` itself, into `folder`, and return it.

    old_names: the tensors have the names of published files, rather than those that transformers 5 has in memory.
    """
    model_class = getattr(transformers, config["architectures"][0])
    settings = {key: value for key, value in copy.deepcopy(config).items() if key not in ("model_type", "auto_map")}
    # A wrapper of the old generation that says nothing has a head of its own; transformers 5 finds that out from the
    # tensors when it loads them.
    settings.setdefault("tie_word_embeddings", False)
    model = model_class(model_class.config_class(**settings))
    model.generation_config = transformers.GenerationConfig()
    randomise(model, torch.Generator().manual_seed(seed))
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    model.to(getattr(torch, dtype)).save_pretrained(folder, save_original_format=old_names)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
