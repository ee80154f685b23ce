"""Feeding an engine and holding its logits against the reference and against transformers.

Truth is the reference in float64, which tests/reference/test_model.py holds against transformers. There is one budget
for all cases, `reference.parity.budget`, and no test loosens it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from exporter.quantized_reference import quantized_reference
from reference.checkpoint import Checkpoint
from reference.oracle import Load
from reference.parity import Budget, budget, position_errors
from reference.rounding import Rounding
from reference.watched import WatchedOracle
from reference.weights import bind, load_parameter
from runtime import Session
from runtime.bundle import read_bundle
from tests.support.bundles import Exported
from tests.support.checkpoints import load_oracle, oracle_logits
from tests.support.near_ties import decided_lengths

Rows = list[list[int]]
Logits = list[NDArray[np.float32]]
Filled = TypeVar("Filled", bound=nn.Module)


def boundary_lengths(window: int, chunk: int) -> list[int]:
    """W − 1, W, W + 1, 2W + 1, 3W + C."""
    return sorted({n for n in (window - 1, window, window + 1, 2 * window + 1, 3 * window + chunk) if n >= 1})


def random_rows(lengths: Sequence[int], vocab_size: int, seed: int) -> Rows:
    """Rows of token ids of these lengths."""
    rng = np.random.default_rng(seed)
    return [[int(token) for token in rng.integers(0, vocab_size, length)] for length in lengths]


def uneven_feeds(rows: Rows, seed: int) -> list[Rows]:
    """The rows cut at random places into the same number of feeds; a row may idle in any feed but the first."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 2 + max(len(row) for row in rows) // 2))
    cuts = [[0, *sorted(rng.integers(1, len(row) + 1, count - 1).tolist()), len(row)] for row in rows]
    feeds = [[row[c[i] : c[i + 1]] for row, c in zip(rows, cuts, strict=True)] for i in range(count)]
    return [feed for feed in feeds if any(feed)]


def feed(session: Session, feeds: list[Rows]) -> Logits:
    """Logits [T, V] of each row, after a reset."""
    session.reset()
    pieces: list[Logits] = []
    for rows in feeds:
        logits_BTV = session.forward(rows)
        pieces.append([logits_BTV[index, : len(row)] for index, row in enumerate(rows)])
    return [np.concatenate(row) for row in zip(*pieces, strict=True)]


def largest_error(truth: Sequence[NDArray[np.floating]], logits: Sequence[NDArray[np.floating]]) -> float:
    """Largest |difference| over all rows; infinite where a logit is not finite."""
    return max(float(position_errors(a, b).max()) for a, b in zip(truth, logits, strict=True))


def fill(module: Filled, checkpoint: Checkpoint, dtype: torch.dtype) -> Filled:
    """A model of the reference that was made on the meta device, with the checkpoint's weights."""
    state = {name: load_parameter(checkpoint, source, dtype) for name, source in bind(checkpoint).items()}
    if checkpoint.config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def with_weights(model: Any, weights: Mapping[str, Load]) -> Any:
    """A model of transformers with other values for some of its parameters, which have Cierzo's names here."""
    for name, load in weights.items():
        tensor = load(torch.float32)
        layer, _, matrix = name.removeprefix("layers.").partition(".moe.")
        if name == "lm_head.weight":
            model.lm_head.weight = nn.Parameter(tensor, requires_grad=False)  # perhaps tied until now
        elif matrix:
            experts = model.model.layers[int(layer)].mlp.experts
            width = tensor.shape[1]
            halves = {"gate_proj": slice(0, width), "up_proj": slice(width, None)}
            held = experts.gate_up_proj[:, halves[matrix]] if matrix in halves else experts.down_proj
            held.copy_(tensor)
        else:
            model.get_parameter(f"model.{name}").copy_(tensor)
    return model


ARITHMETIC = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Judge:
    """Truth, reference and transformers for one checkpoint, with the weights that a bundle has and what it rounds.

    arithmetic: what the engine computes in. In another type than float32 the reference computes in it throughout.
    kv: type of its rings, if it is another one than the bundle says.
    """

    def __init__(self, case: Exported, arithmetic: str = "float32", kv: str | None = None) -> None:
        checkpoint = case.opened()
        self.vocab_size = checkpoint.config.vocab_size
        held = quantized_reference(read_bundle(case.bundle))
        self._oracle = WatchedOracle(checkpoint, held.weights)
        self._moe = checkpoint.config.moe
        self._arithmetic = arithmetic
        # An engine of another arithmetic multiplies with the weights as they are, and does not round activations.
        self._rounding = held.rounding if arithmetic == "float32" else Rounding(kv=kv or arithmetic)
        self._transformers = with_weights(load_oracle(case.checkpoint), held.weights)

    def truth_and_budget(self, rows: Rows) -> tuple[list[NDArray[np.float64]], Budget]:
        """The reference's logits in float64, and what the engine may be away from them."""
        truth = [logits.numpy() for logits in self._oracle.logits(rows, torch.float64)]
        dtype = ARITHMETIC[self._arithmetic]
        rounded = self._oracle.logits(rows, dtype, rounding=self._rounding)
        return truth, budget(truth, [logits.float().numpy() for logits in rounded], self._rounding.kind)

    def transformers(self, rows: Rows) -> Logits:
        """Logits [T, V] of each row by transformers in float32, each row alone."""
        return [oracle_logits(self._transformers, torch.tensor([row]))[0].numpy() for row in rows]

    def hold(self, session: Session, rows: Rows, seed: int) -> None:
        """Feed `rows` in uneven pieces; assert the engine within its budget of the truth and of transformers.

        An engine of another arithmetic is compared up to where a router is undecided; see `tests.support.near_ties`.
        """
        logits = feed(session, uneven_feeds(rows, seed))
        assert all(np.isfinite(row).all() for row in logits)
        lengths = self.decided(rows)
        assert 2 * sum(lengths) >= sum(len(row) for row in rows), (lengths, "routers are undecided too early here")
        logits = [row[:length] for row, length in zip(logits, lengths, strict=True) if length]
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True) if length]
        truth, allowed = self.truth_and_budget(rows)
        assert largest_error(truth, logits) <= allowed.allowed, (lengths, allowed)
        assert largest_error(self.transformers(rows), logits) <= allowed.allowed, (lengths, allowed)

    def decided(self, rows: Rows) -> list[int]:
        """How many tokens of each row can be compared: all, or those before a router is undecided."""
        if self._moe is None or self._arithmetic == "float32":
            return [len(row) for row in rows]
        return decided_lengths(self._oracle, rows, self._moe.top_k, ARITHMETIC[self._arithmetic], self._rounding)
