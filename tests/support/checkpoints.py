"""Tiny random Hugging Face checkpoints, written by `transformers` itself, and the same files read back as an oracle.

The weights are scaled so that every part of the computation matters: attention scores have a standard deviation above
one (attention is not uniform), norm weights differ from one and from each other, logits are spread over a few units.
A bug anywhere then moves the logits by far more than rounding does.

Nothing here uses Cierzo: the files and the oracle come from `transformers`, so tests compare two independent readings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.utils.logging.disable_progress_bar()

_CLASSES: dict[str, tuple[Any, Any]] = {
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "ministral": (transformers.MinistralConfig, transformers.MinistralForCausalLM),
    "ministral3": (transformers.Ministral3Config, transformers.Ministral3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
}
_LAYER_TYPES = ("ministral", "qwen2", "qwen3")
"""Architectures whose layers may differ."""

TOKENIZER_VOCAB_SIZE = 260
"""The least vocabulary with a tokenizer: 0 <unk>, 1 <s>, 2 </s>, 3 [INST], and 4 to 259 the 256 bytes."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def make_checkpoint(
    folder: str | Path,
    *,
    architecture: str = "mistral",
    vocab_size: int | None = None,
    hidden_size: int = 32,
    intermediate_size: int = 48,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    window: int | None = 5,
    layer_windows: Sequence[int | None] | None = None,
    num_experts: int = 4,
    top_k: int = 2,
    activation: str = "silu",
    norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    rope: dict[str, Any] | None = None,
    max_position_embeddings: int = 512,
    tie: bool = False,
    dtype: str = "float32",
    shards: int = 1,
    generation: str = "new",
    expert_layout: str = "per_expert",
    tokenizer: bool = False,
    eos_token_id: int | list[int] | None = 2,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    seed: int = 0,
) -> Path:
    """Write a tiny random checkpoint into `folder` (made if missing) and return its path.

    architecture: one that Cierzo has a row for, such as "mixtral" (num_experts, top_k) or "qwen3" (layer_windows).
    window: W of every layer, or None for full causal attention; "llama" has none.
    layer_windows: only for "ministral", "qwen2" and "qwen3": W or None for each layer; all that slide have the same W.
    rope: rotary parameters beside theta, for example {"rope_type": "linear", "factor": 2.0}. "ministral3" needs
        llama_4_scaling_beta and original_max_position_embeddings there, 0.1 and 8 when rope is None.
    attention_bias, mlp_bias: only where the class has such a key.
    dtype: "float32", "float16" or "bfloat16": how the tensors are stored.
    shards: 1 writes model.safetensors; more writes that many shards and model.safetensors.index.json.
    generation: "new" leaves config.json as transformers 5 wrote it; "old" spells it as the published checkpoints do
        (rope_theta and rope_scaling at the top level, torch_dtype).
    expert_layout: "per_expert" (block_sparse_moe.experts.{e}.w1 ..., as published) or "stacked"
        (mlp.experts.gate_up_proj [E, 2I, Hid], what transformers 5 holds in memory and can also save).
    tokenizer: also write tokenizer.json (bytes, no merges), tokenizer_config.json and chat_template.jinja; the
        vocabulary is then at least TOKENIZER_VOCAB_SIZE.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config_class, model_class = _CLASSES[architecture]
    if vocab_size is None:
        vocab_size = TOKENIZER_VOCAB_SIZE if tokenizer else 64
    if tokenizer and vocab_size < TOKENIZER_VOCAB_SIZE:
        raise ValueError(f"a checkpoint with a tokenizer needs vocab_size >= {TOKENIZER_VOCAB_SIZE}, not {vocab_size}")
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim if head_dim is not None else hidden_size // num_heads,
        "hidden_act": activation,
        "rms_norm_eps": norm_eps,
        "max_position_embeddings": max_position_embeddings,
        "sliding_window": window,
        "tie_word_embeddings": tie,
        "bos_token_id": 1,
        "eos_token_id": eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta} | (rope or {}),
        "attn_implementation": "eager",
    }
    settings |= _of_architecture(architecture, settings, num_experts, top_k)
    settings |= {"attention_bias": True} if attention_bias else {}
    settings |= {"mlp_bias": True} if mlp_bias else {}
    if layer_windows is not None:
        settings |= _layers_of_two_kinds(architecture, num_layers, layer_windows)

    model = model_class(config_class(**settings))
    randomise(model, torch.Generator().manual_seed(seed))
    model.to(getattr(torch, dtype)).save_pretrained(folder, save_original_format=expert_layout == "per_expert")
    if shards > 1:
        _shard(folder, shards)
    if generation == "old":
        _spell_as_old_generation(folder / "config.json")
    if tokenizer:
        _write_tokenizer(folder, vocab_size)
    return folder


def load_oracle(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The `transformers` model of a checkpoint: eager attention, eager experts, evaluation mode, no gradients.

    In float64 it still computes RMSNorm, softmax, the router and RoPE's angles in float32, as transformers' source
    says, so two float64 results may differ by about 1e-6.
    """
    (name,) = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["architectures"]
    model = getattr(transformers, name).from_pretrained(
        Path(folder), dtype=dtype, attn_implementation="eager", experts_implementation="eager", local_files_only=True
    )
    return model.eval().requires_grad_(False)


def oracle_logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of a full-context forward over int64 `token_ids` [B, T], without any cache."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=token_ids, use_cache=False).logits
    return logits


def _of_architecture(architecture: str, settings: dict[str, Any], num_experts: int, top_k: int) -> dict[str, Any]:
    """What the architecture's class wants beside, or instead of, the common settings."""
    slides = settings["sliding_window"] is not None
    if architecture == "mixtral":
        return {"num_local_experts": num_experts, "num_experts_per_tok": top_k}
    if architecture == "qwen3_moe":
        experts = {"num_experts": num_experts, "num_experts_per_tok": top_k, "norm_topk_prob": True}
        return experts | {"moe_intermediate_size": settings["intermediate_size"], "use_sliding_window": slides}
    if architecture in ("qwen2", "qwen3"):
        return {"use_sliding_window": slides, "max_window_layers": 0}
    if architecture == "llama":
        return {"sliding_window": None}
    if architecture == "phi3":
        return {"pad_token_id": 0}
    if architecture == "ministral3":
        scaling = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
        return {"rope_parameters": scaling | settings["rope_parameters"]}
    return {}


def _layers_of_two_kinds(
    architecture: str, num_layers: int, layer_windows: Sequence[int | None]
) -> dict[str, int | list[str] | None]:
    if architecture not in _LAYER_TYPES:
        raise ValueError(f"layer_windows needs one of {_LAYER_TYPES}: the others have one window for all layers")
    if len(layer_windows) != num_layers:
        raise ValueError(f"layer_windows has {len(layer_windows)} entries for {num_layers} layers")
    windows = sorted({window for window in layer_windows if window is not None})
    if len(windows) > 1:
        raise ValueError(f"a Hugging Face config holds one sliding_window, not {windows}")
    kinds = ["full_attention" if window is None else "sliding_attention" for window in layer_windows]
    settings = {"layer_types": kinds, "sliding_window": windows[0] if windows else None}
    return settings | ({} if architecture == "ministral" else {"use_sliding_window": bool(windows)})


def randomise(model: Any, generator: torch.Generator) -> None:
    """Normal weights with standard deviation gain / sqrt(fan-in), biases 0.5; norm weights uniform in [0.7, 1.3]."""
    gains = {"q_proj": 1.5, "k_proj": 1.5, "qkv_proj": 1.5, "lm_head": 2.0, "gate.weight": 2.0}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.6 + 0.7)
                continue
            if name.endswith(".bias"):
                deviation = 0.5
            elif "embed_tokens" in name:
                # A tied embedding is also the output projection and keeps the logits in the same range.
                deviation = 2.0 / math.sqrt(parameter.shape[-1]) if model.config.tie_word_embeddings else 1.0
            else:
                gain = next((gain for part, gain in gains.items() if part in name), 1.0)
                deviation = gain / math.sqrt(parameter.shape[-1])
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)


def _shard(folder: Path, shards: int) -> None:
    single = folder / "model.safetensors"
    tensors = load_file(single)
    if shards > len(tensors):
        raise ValueError(f"cannot spread {len(tensors)} tensors over {shards} shards")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].clone() for name in names[shard::shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    single.unlink()


def _spell_as_old_generation(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    rope.pop("partial_rotary_factor", None)  # Phi-3's class writes its 1.0 out
    config["rope_scaling"] = None if kind == "default" and not rope else {"type": kind} | rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.42.0"
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer without merges: every string round-trips, one id per UTF-8 byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    specials = ["<unk>", "<s>", "</s>", "[INST]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    assert len(vocabulary) == TOKENIZER_VOCAB_SIZE <= vocab_size
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
