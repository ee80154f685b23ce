"""onnxruntime-genai. Every slot is a generator; the model is shared."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.workers.protocol import Feeding, Logits, serve


class OnnxRuntimeGenai(Feeding):
    """A folder that its model builder wrote."""

    def __init__(self) -> None:
        self._genai = importlib.import_module("onnxruntime_genai")
        self._generators: dict[str, Any] = {}
        self._model: Any = None
        self._layers = self._window = 0

    def load(self, path: str, threads: int, settings: Mapping[str, Any]) -> None:
        """Open the session with its default options, but for the number of threads."""
        del settings
        config = self._genai.Config(path)
        threaded = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": threaded}}))
        self._model = self._genai.Model(config)
        decoder = json.loads((Path(path) / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        self._layers = decoder["num_hidden_layers"]
        window = decoder.get("sliding_window", {})
        self._window = window["window_size"] if window.get("layers") else 0

    def open(self, slot: str, capacity: int) -> None:
        """A generator with room for `capacity` tokens, but for a window at least: with less it fails at the first."""
        self._generators.pop(slot, None)
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=max(capacity, 2 * self._window), do_sample=False)
        self._generators[slot] = self._genai.Generator(self._model, parameters)

    def feed(self, slot: str, ids: Sequence[int]) -> Logits:
        """As Feeding.feed."""
        generator = self._generators[slot]
        generator.append_tokens(np.asarray(ids, dtype=np.int32))
        return np.asarray(generator.get_logits(), dtype=np.float32).reshape(-1)

    def kv_bytes(self, slot: str, tokens: int) -> int | None:
        """The buffers as they are; without a sliding window they have room for every token."""
        held = 0
        for name in ("key", "value"):
            shape = list(self._generators[slot].get_input(f"past_key_values.0.{name}").shape)
            if not self._window:
                shape[2] = tokens
            held += self._layers * 4 * math.prod(shape)
        return held


if __name__ == "__main__":
    serve(OnnxRuntimeGenai())
