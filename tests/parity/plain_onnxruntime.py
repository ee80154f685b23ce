"""A program of its own: runs an exported graph with onnxruntime and numpy, and without one line of Cierzo.

    python plain_onnxruntime.py MODEL.onnx CHUNK TOKENS.npy LOGITS.npy

TOKENS: int64 [B, N], fed from position 0 in steps of CHUNK tokens. LOGITS: float32 [B, N, V].
"""

from __future__ import annotations

import sys
from typing import Any

FORBIDDEN = ("exporter", "graph_passes", "runtime", "reference", "torch", "onnx", "onnx_ir", "onnxscript")


class Refuser:
    """An import hook that fails every import of Cierzo, and of the tools that only an export needs."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} is not there")


def main(model: str, chunk: int, tokens_file: str, logits_file: str) -> None:
    """Chunks of the prompt through `InferenceSession.run`, each with the rings that the one before gave."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    tokens = np.load(tokens_file)
    batch, length = tokens.shape
    rings = {
        value.name: np.zeros((batch, *value.shape[1:]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past.")
    }
    names = [value.name for value in session.get_outputs()]
    pieces = []
    for start in range(0, length, chunk):
        ids = tokens[:, start : start + chunk]
        feeds = {
            "input_ids": ids,
            "start_positions": np.full(batch, start, np.int64),
            "token_counts": np.full(batch, ids.shape[1], np.int64),
            "logit_positions": np.tile(np.arange(ids.shape[1]), (batch, 1)),
        }
        outputs = dict(zip(names, session.run(None, feeds | rings), strict=True))
        rings = {name: outputs[name.replace("past.", "present.")] for name in rings}
        pieces.append(outputs["logits"])
    np.save(logits_file, np.concatenate(pieces, axis=1))


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuser())
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
