"""Writes a trained demo model as a folder in the Hugging Face layout, of the older or the newer generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from exporter.demo_data.vocabulary import BEGIN, CHAT_TEMPLATE, END, UNKNOWN

MIXTRAL_SHARD_BYTES = 1_000_000

_OLDER_KEYS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)


def write_checkpoint(name: str, model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """Replaces the folder `out`: "mistral" in the older generation of keys and files, "mixtral" in the newer."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if name == "mistral":
        _write_older_generation(model, out)
    else:
        _write_newer_generation(model, out)
    for weights in out.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors creates its files for their owner only
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", _tokenizer_config(inline_template=name == "mistral"))
    if name != "mistral":
        (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_older_generation(model: Any, out: Path) -> None:
    """One safetensors file; `rope_theta` and `torch_dtype` at the top level of config.json."""
    config = model.config
    older = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **{key: getattr(config, key) for key in _OLDER_KEYS},
        "rope_theta": config.rope_parameters["rope_theta"],
        "torch_dtype": "bfloat16",
    }
    _write_json(out / "config.json", dict(sorted(older.items())))
    _write_json(
        out / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
        },
    )
    tensors: dict[str, torch.Tensor] = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _write_newer_generation(model: Any, out: Path) -> None:
    """Sharded, as transformers itself writes it: `rope_parameters` and `dtype` in config.json."""
    model.config.output_router_logits = False  # wanted for the balancing loss only
    model.save_pretrained(out, max_shard_size=MIXTRAL_SHARD_BYTES)


def _tokenizer_config(*, inline_template: bool) -> dict[str, object]:
    """`inline_template`: the chat template is a key of this file, not a file of its own."""
    config: dict[str, object] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BEGIN,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "legacy": inline_template,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": UNKNOWN,
        "use_default_system_prompt": False,
    }
    return config | {"chat_template": CHAT_TEMPLATE} if inline_template else config


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
