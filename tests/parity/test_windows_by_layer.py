"""Several different windows in one model, which only Mistral's own layout can say, beside a layer without one.

transformers' class knows one window; it takes the masks of its layers from its caller, though, and so it is the oracle
here all the same, with masks written down pair by pair.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exporter import export
from reference.checkpoint import open_checkpoint
from reference.oracle import Oracle
from reference.parity import budget
from runtime import load
from tests.support.bundles import checkpoint, shared_traces
from tests.support.checkpoints import load_oracle
from tests.support.native import as_native
from tests.support.parity import boundary_lengths, feed, largest_error, random_rows, uneven_feeds

WINDOWS = (3, None, 7, 1)
CONTEXT = 40


def masks(length: int) -> dict[str, torch.Tensor]:
    """For each layer which pairs see each other, added to the scores, [1, 1, T, T]."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    return {
        f"layer {index}": torch.where(
            (distance >= 0) & (distance < (window or length)), 0.0, torch.finfo(torch.float32).min
        )[None, None]
        for index, window in enumerate(WINDOWS)
    }


@pytest.mark.parametrize("chunk", [2, 5, 9])
def test_every_layer_has_its_own_window(tmp_path: Path, chunk: int) -> None:
    twin = checkpoint(architecture="ministral", num_layers=4, layer_windows=[3, None, 3, 3])
    native = as_native(twin, tmp_path / "native", sliding_window=list(WINDOWS))
    opened = open_checkpoint(native)
    assert opened.config.layer_windows == WINDOWS
    with shared_traces():
        bundle = export(native, tmp_path / "bundle", chunk=chunk, context=CONTEXT)
    session = load(bundle, threads=1)
    assert [layer.capacity for layer in session.manifest.kv.layers] == [3 + chunk - 1, CONTEXT, 7 + chunk - 1, chunk]

    theirs: Any = load_oracle(twin)
    theirs.config.layer_types = theirs.model.config.layer_types = list(masks(1))
    oracle, lengths = Oracle(opened), {n for w in WINDOWS for n in boundary_lengths(w or 4, chunk) if n <= CONTEXT}
    for length in sorted({*lengths, CONTEXT}):
        rows = random_rows([length, 1, max(1, length // 2)], opened.config.vocab_size, seed=length)
        logits = feed(session, uneven_feeds(rows, seed=chunk))
        truth = [t.numpy() for t in oracle.logits(rows, torch.float64)]
        allowed = budget(truth, [t.numpy() for t in oracle.logits(rows, torch.float32)], "float32").allowed
        assert largest_error(truth, logits) <= allowed, length
        with torch.no_grad():
            independent = [
                theirs(input_ids=torch.tensor([row]), attention_mask=masks(len(row)), use_cache=False).logits[0].numpy()
                for row in rows
            ]
        assert largest_error(independent, logits) <= allowed, length
