"""OpenVINO GenAI. Its pipeline generates and shows no logits, so it is timed by its own clock."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.workers.protocol import Engine, serve


class OpenVinoGenai(Engine):
    """A folder that optimum-intel wrote."""

    def __init__(self) -> None:
        self._genai = importlib.import_module("openvino_genai")
        self._openvino = importlib.import_module("openvino")
        self._pipeline: Any = None

    def load(self, path: str, threads: int, settings: Mapping[str, Any]) -> None:
        """Compile with its default options, but for the number of threads and what `settings` says."""
        self._pipeline = self._genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads, **settings)

    def run(self, slot: str, ids: Sequence[int], steps: int, resume: bool) -> tuple[float | None, list[float]]:
        """Time to the first token, and the times between later ones. It cannot resume: it reads `ids` every time."""
        del slot, resume
        done = self._generate(ids, max_new_tokens=steps + 1)
        raw = done.perf_metrics.raw_metrics
        stamps = [moment * 1e-3 for moment in raw.m_new_token_times]
        later = [after - before for before, after in itertools.pairwise(stamps)]
        return raw.m_times_to_first_token[0] * 1e-6, later

    def answer(self, ids: Sequence[int]) -> dict[str, Any]:
        """The next token and its log-probability."""
        done = self._generate(ids, max_new_tokens=1, logprobs=1)
        return {"token": int(done.tokens[0][0]), "logprob": float(done.scores[0])}

    def _generate(self, ids: Sequence[int], **options: int) -> Any:
        config = self._genai.GenerationConfig(do_sample=False, ignore_eos=True, **options)
        return self._pipeline.generate(self._openvino.Tensor(np.asarray(ids, dtype=np.int64)[None]), config)


if __name__ == "__main__":
    serve(OpenVinoGenai())
