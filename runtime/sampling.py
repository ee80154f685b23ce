"""Choosing the next token from logits.

Order of the filters, the same as in transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p.
All arithmetic is float64. With temperature 0 only the penalty applies, then the highest logit wins; ties go to the
lower id.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, SessionError

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to choose tokens and when to stop; checked at construction.

    max_new_tokens: at most so many tokens, >= 1.
    temperature: divides the logits; 0 is greedy.
    top_k: keep the k highest logits, and all that tie with the k-th.
    top_p: keep the fewest most likely tokens whose probabilities reach p (nucleus sampling, Holtzman et al. 2019).
    min_p: keep tokens with at least min_p times the probability of the likeliest (Nguyen et al. 2024).
    repetition_penalty: a logit of a token already seen is divided by it when positive and multiplied when negative
        (CTRL, Keskar et al. 2019); seen means read or chosen since the session's last reset.
    seed: of numpy's PCG64; None draws fresh entropy. Row r of a batch draws as a single prompt with seed + r does.
    stop_ids: ids that end the text; None means the model's end-of-text ids. The id itself is still returned.
    stop_strings: texts that end the generation as soon as one is complete, also across token borders.

    Raises InputError for a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: Sequence[int] | None = None
    stop_strings: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check(_is_int(self.max_new_tokens) and self.max_new_tokens >= 1, "max_new_tokens", "an integer >= 1", self)
        _check(_is_real(self.temperature) and self.temperature >= 0, "temperature", "a finite number >= 0", self)
        _check(self.top_k is None or (_is_int(self.top_k) and self.top_k >= 1), "top_k", "an integer >= 1", self)
        p = self.top_p
        _check(p is None or (_is_real(p) and 0 < p <= 1), "top_p", "above 0 and at most 1", self)
        p = self.min_p
        _check(p is None or (_is_real(p) and 0 <= p <= 1), "min_p", "from 0 to 1", self)
        penalty = self.repetition_penalty
        _check(_is_real(penalty) and penalty > 0, "repetition_penalty", "a finite number above 0", self)
        _check(self.seed is None or (_is_int(self.seed) and self.seed >= 0), "seed", "an integer >= 0", self)
        # Kept as tuples: an iterator would be used up by these checks and stop nothing.
        if self.stop_ids is not None:
            ids = _items(self.stop_ids)
            listed = ids is not None and all(_is_int(item) and item >= 0 for item in ids)
            _check(listed, "stop_ids", "a sequence of token ids", self)
            object.__setattr__(self, "stop_ids", ids)
        strings = _items(self.stop_strings)
        filled = strings is not None and all(isinstance(text, str) and text for text in strings)
        _check(filled, "stop_strings", "a sequence of non-empty strings", self)
        object.__setattr__(self, "stop_strings", strings)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The logits of a row: float [N], of the tokens `ids` (int64 [N], ascending), or of the whole vocabulary (None)."""

    logits_N: NDArray[np.floating]
    ids_N: NDArray[np.int64] | None = None


class Sampler:
    """Chooses tokens for one row; holds the row's random stream.

    seen_V: bool [V], the ids that the repetition penalty applies to; the caller keeps it up to date.
    """

    def __init__(self, options: SamplingOptions, *, row: int = 0) -> None:
        self._options = options
        self._random = np.random.Generator(np.random.PCG64(None if options.seed is None else options.seed + row))

    def highest_wanted(self, most: int) -> int:
        """How many of a row's highest logits a choice mostly needs, at most `most`; 0 when it needs all logits.

        For top-k it is `most`, since whether the k-th ties with more shows only in those that follow it.
        """
        options = self._options
        if most < 1 or options.repetition_penalty != 1.0:
            return 0
        if options.temperature == 0:
            return 1
        return most if options.top_k is not None and options.top_k < most else 0

    def suffice(self, highest_K: NDArray[np.floating]) -> bool:
        """Whether the choice can only fall among the tokens of these highest logits [K], best first.

        It cannot be told when the last of them may tie with the k-th: then the rest of the vocabulary may do so too.
        """
        options = self._options
        scores_K = highest_K.astype(np.float64)
        if options.temperature == 0 or not math.isfinite(scores_K[0]):
            return True
        assert options.top_k is not None
        scaled_K = _scaled(scores_K, options.temperature)
        return bool(scaled_K[-1] < scaled_K[options.top_k - 1] or scaled_K[-1] == -np.inf)

    def choose(self, logits_V: NDArray[np.floating], seen_V: BoolArray, ids_V: NDArray[np.int64] | None = None) -> int:
        """The next token id. Raises SessionError when the logits hold NaN or +infinity, or nothing above -infinity.

        ids_V: whose logits they are, ascending, when they are not those of the whole vocabulary but `suffice`. The id
        is the same, for the same random stream.
        """
        index = self._index(logits_V, seen_V)
        return index if ids_V is None else int(ids_V[index])

    def _index(self, logits_V: NDArray[np.floating], seen_V: BoolArray) -> int:
        options = self._options
        scores_V = logits_V.astype(np.float64)
        if not math.isfinite(scores_V.max()):  # NaN wins every max, so one look is enough
            raise SessionError(
                "The model's logits are not finite, so no token can be chosen: its weights or activations overflow in "
                "the engine's precision. Check the checkpoint with `cierzo validate`, or export with weights='fp32'."
            )
        if options.repetition_penalty != 1.0:
            scores_V = penalise_repetition(scores_V, seen_V, options.repetition_penalty)
        if options.temperature == 0:
            return int(scores_V.argmax())  # numpy returns the first of equal maxima
        scores_V = filter_scores(scores_V, options)
        left = np.flatnonzero(scores_V > -np.inf)
        probabilities = softmax(scores_V[left])
        cumulative = probabilities.cumsum()
        # side="right" skips tokens of probability 0, whose cumulative sum equals their predecessor's.
        index = int(cumulative.searchsorted(self._random.random() * cumulative[-1], side="right"))
        return int(left[min(index, int(probabilities.nonzero()[0][-1]))])


def penalise_repetition(scores_V: Float64Array, seen_V: BoolArray, penalty: float) -> Float64Array:
    """Divide positive and multiply negative scores of the seen ids by `penalty`, once per id."""
    penalised_V = np.where(scores_V < 0, scores_V * penalty, scores_V / penalty)
    return np.where(seen_V, penalised_V, scores_V)


def filter_scores(scores_V: Float64Array, options: SamplingOptions) -> Float64Array:
    """Apply temperature (> 0), top-k, top-p and min-p; what is filtered out becomes -infinity."""
    scores_V = _scaled(scores_V, options.temperature)
    if options.top_k is not None and options.top_k < scores_V.size:
        kth = np.partition(scores_V, -options.top_k)[-options.top_k]
        scores_V = np.where(scores_V < kth, -np.inf, scores_V)
    if options.top_p is not None and options.top_p < 1:
        candidates = np.flatnonzero(scores_V > -np.inf)
        probabilities = softmax(scores_V[candidates])
        # All N that are less likely than (1 - p) / N make up less than 1 - p together, so they are behind the nucleus.
        # To sort them as well takes longer than all else here, for a large vocabulary longer than the model's step.
        likely = probabilities >= (1 - options.top_p) / candidates.size
        likely[probabilities.argmax()] = True  # for certain, however that was rounded
        candidates, probabilities = candidates[likely], probabilities[likely]
        order = np.argsort(-scores_V[candidates], kind="stable")  # of equal scores the lower id comes first
        before = probabilities[order].cumsum() - probabilities[order]
        before[0] = 0.0
        kept = candidates[order[before < options.top_p]]
        nucleus_V = np.full_like(scores_V, -np.inf)
        nucleus_V[kept] = scores_V[kept]
        scores_V = nucleus_V
    if options.min_p is not None and options.min_p > 0:
        candidates = np.flatnonzero(scores_V > -np.inf)
        probabilities = softmax(scores_V[candidates])
        scores_V = scores_V.copy()
        scores_V[candidates[probabilities < options.min_p * probabilities.max()]] = -np.inf
    return scores_V


def _scaled(scores_V: Float64Array, temperature: float) -> Float64Array:
    """Relative to the highest, so that the least temperature gives -infinity, not NaN."""
    with np.errstate(over="ignore"):
        return np.asarray((scores_V - scores_V.max()) / temperature)


def softmax(scores_V: Float64Array) -> Float64Array:
    """Probabilities of scores, of which at least one is finite; -infinity becomes 0."""
    weights_V = np.exp(scores_V - scores_V.max())
    return np.asarray(weights_V / weights_V.sum(), dtype=np.float64)


def _items(value: object) -> tuple[Any, ...] | None:
    """The items of anything iterable but a text; None for everything else."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else None


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return (_is_int(value) or isinstance(value, (float, np.floating))) and math.isfinite(value)  # type: ignore[arg-type]


def _check(holds: bool, name: str, words: str, options: SamplingOptions) -> None:
    if not holds:
        raise InputError(f"The sampling option `{name}` must be {words}, not {getattr(options, name)!r}.")
