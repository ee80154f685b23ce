"""Synthetic checkpoints in the Hugging Face layout, written as a stream: their size never has to fit into memory.

Random weights cost exactly as much to compute with as trained ones. Each tensor is cut out of one pool of random
numbers at a random place, which takes a fraction of the time of drawing every number.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_POOL = 1 << 23
_STORED_BYTES = {"float32": 4, "bfloat16": 2}
_SAFETENSORS_NAME = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to make up. experts 0 is a dense Mistral, otherwise a Mixtral with top-2 routing."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    window: int
    experts: int = 0
    dtype: str = "float32"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the checkpoint."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.q_proj.weight", (query, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (kv, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, query)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            if self.experts:
                yield f"{prefix}.block_sparse_moe.gate.weight", (self.experts, self.hidden)
                for expert in range(self.experts):
                    for name, shape in (("w1", (self.ffn, self.hidden)), ("w2", (self.hidden, self.ffn))):
                        yield f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight", shape
                    yield f"{prefix}.block_sparse_moe.experts.{expert}.w3.weight", (self.ffn, self.hidden)
            else:
                yield f"{prefix}.mlp.gate_proj.weight", (self.ffn, self.hidden)
                yield f"{prefix}.mlp.up_proj.weight", (self.ffn, self.hidden)
                yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.ffn)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for _, shape in self.tensors())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return self.parameters * _STORED_BYTES[self.dtype]

    @property
    def linear_parameters(self) -> int:
        """Numbers that a token multiplies with in a dense model: all matrices, without the embedding."""
        matrices = sum(math.prod(shape) for _, shape in self.tensors() if len(shape) == 2)
        return matrices - self.vocabulary * self.hidden

    def config(self) -> dict[str, object]:
        """The config.json, spelled as published checkpoints spell it."""
        kind = "mixtral" if self.experts else "mistral"
        config: dict[str, object] = {
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "model_type": kind,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "sliding_window": self.window,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "torch_dtype": self.dtype,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.experts:
            config |= {"num_local_experts": self.experts, "num_experts_per_tok": 2}
        return config


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write config.json and model.safetensors into the new folder `folder`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1), encoding="utf-8")
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(_POOL, dtype=np.float32)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, extents in shape.tensors():
        end = begin + math.prod(extents) * _STORED_BYTES[shape.dtype]
        header[name] = {"dtype": _SAFETENSORS_NAME[shape.dtype], "shape": extents, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, extents in shape.tensors():
            for block in _blocks(extents, pool, rng):
                file.write(_stored(block, shape.dtype).data)
    return folder


def make_bundle(folder: Path, shape: Shape, *, chunk: int) -> Path:
    """Write a checkpoint below `folder` and export it, in a process of its own: an export's memory is not a run's."""
    checkpoint, bundle = write_checkpoint(folder / "checkpoint", shape), folder / "bundle"
    command = [sys.executable, "-m", "exporter", "export", str(checkpoint), str(bundle), "--max-batch", "1"]
    subprocess.run([*command, "--chunk", str(chunk), "--no-prove", "--json"], check=True, stdout=subprocess.DEVNULL)
    return bundle


def _blocks(
    extents: tuple[int, ...], pool: NDArray[np.float32], rng: np.random.Generator
) -> Iterator[NDArray[np.float32]]:
    """A tensor in pieces: ones for a norm, otherwise normal with standard deviation 1 / sqrt(fan-in)."""
    left = math.prod(extents)
    if len(extents) == 1:
        yield np.ones(left, dtype=np.float32)
        return
    deviation = np.float32(extents[-1] ** -0.5)
    while left:
        begin = int(rng.integers(_POOL // 2))
        block = pool[begin : begin + left] * deviation
        yield block
        left -= block.size


def _stored(block: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """bfloat16 is the upper half of float32."""
    return (block.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else block
