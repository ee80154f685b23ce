"""transformers in float32 with PyTorch's scaled dot product attention. Every slot is a cache; the model is shared."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.workers.protocol import Feeding, Logits, serve


class Transformers(Feeding):
    """A checkpoint as it is."""

    def __init__(self) -> None:
        self._torch = importlib.import_module("torch")
        self._transformers = importlib.import_module("transformers")
        self._caches: dict[str, Any] = {}
        self._model: Any = None

    def load(self, path: str, threads: int, settings: Mapping[str, Any]) -> None:
        """Read the weights."""
        del settings
        self._torch.set_num_threads(threads)
        self._torch.set_grad_enabled(False)
        kind = self._transformers.AutoModelForCausalLM
        self._model = kind.from_pretrained(path, dtype=self._torch.float32, attn_implementation="sdpa").eval()

    def open(self, slot: str, capacity: int) -> None:
        """A cache that keeps what the config's window asks for."""
        del capacity
        self._caches[slot] = self._transformers.DynamicCache(config=self._model.config)

    def feed(self, slot: str, ids: Sequence[int]) -> Logits:
        """As Feeding.feed."""
        ids_BT = self._torch.tensor([list(ids)])
        out = self._model(ids_BT, past_key_values=self._caches[slot], use_cache=True, logits_to_keep=1)
        return np.asarray(out.logits[0, -1].numpy(), dtype=np.float32)

    def kv_bytes(self, slot: str, tokens: int) -> int | None:
        """What the cache holds now; a layer with a sliding window stops growing."""
        del tokens
        held = [tensor for layer in self._caches[slot].layers for tensor in (layer.keys, layer.values)]
        return int(sum(tensor.numel() * tensor.element_size() for tensor in held))


if __name__ == "__main__":
    serve(Transformers())
