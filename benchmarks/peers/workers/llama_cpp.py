"""llama.cpp through the C functions that llama-cpp-python binds. Every slot is a context; the weights are shared."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.workers.protocol import Feeding, Logits, serve

_BATCH = 2048
"""llama.cpp's own default for the tokens of one call, which it works through in pieces of 512."""


class LlamaCpp(Feeding):
    """A GGUF file."""

    def __init__(self) -> None:
        self._llama = importlib.import_module("llama_cpp")
        self._llama.llama_backend_init()
        self._contexts: dict[str, Any] = {}
        self._rooms: dict[str, int] = {}
        self._fed: dict[str, int] = {}
        self._model: Any = None
        self._vocabulary = self._threads = 0
        self._settings: Mapping[str, Any] = {}

    def load(self, path: str, threads: int, settings: Mapping[str, Any]) -> None:
        """Map the file."""
        self._threads, self._settings = threads, settings
        parameters = self._llama.llama_model_default_params()
        self._model = self._llama.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise RuntimeError("llama_model_load_from_file returned nothing")
        self._vocabulary = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))

    def open(self, slot: str, capacity: int) -> None:
        """A context with KV for `capacity` tokens, all of it allocated now."""
        self._fed[slot] = 0
        if self._rooms.get(slot) == capacity:
            self._llama.llama_memory_clear(self._llama.llama_get_memory(self._contexts[slot]), True)
            return
        if slot in self._contexts:
            self._llama.llama_free(self._contexts.pop(slot))
        parameters = self._llama.llama_context_default_params()
        parameters.n_ctx = capacity
        parameters.n_batch = _BATCH
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.flash_attn_type = int(self._settings["flash_attention"])
        context = self._llama.llama_init_from_model(self._model, parameters)
        if not context:
            raise RuntimeError("llama_init_from_model returned nothing")
        self._contexts[slot], self._rooms[slot] = context, capacity

    def feed(self, slot: str, ids: Sequence[int]) -> Logits:
        """As Feeding.feed."""
        context = self._contexts[slot]
        for begin in range(0, len(ids), _BATCH):
            piece = ids[begin : begin + _BATCH]
            tokens = (self._llama.llama_token * len(piece))(*piece)
            status = self._llama.llama_decode(context, self._llama.llama_batch_get_one(tokens, len(piece)))
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status}")
        self._fed[slot] += len(ids)
        pointer = self._llama.llama_get_logits_ith(context, -1)
        floats = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(floats, shape=(self._vocabulary,)).astype(np.float32)

    def kv_bytes(self, slot: str, tokens: int) -> int | None:
        """What it would save of the slot's text, which grows with every token: it keeps all of them."""
        return int(self._llama.llama_state_seq_get_size(self._contexts[slot], 0)) * tokens // self._fed[slot]


if __name__ == "__main__":
    serve(LlamaCpp())
