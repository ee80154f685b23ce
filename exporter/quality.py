"""What quantising the weights cost: the engine beside the original checkpoint, on one text, with teacher forcing.

Random tokens would tell little, as a model is not trained for them. Without a text of the user's, the engine writes
one: it begins with the beginning of a text and draws every token from its own distribution, so that the text is of the
kind that the model was trained for, whatever that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exporter.borders import last_position
from exporter.validation_report import Check, Quality
from reference.oracle import Oracle
from reference.parity import perplexity
from runtime.errors import InputError
from runtime.session import Session

MOST_TOKENS = 512
"""Length of the text that the engine writes: the means below are known to a few per cent then."""

MOST_READ = 2048
"""What is read of a user's text: both sides' logits are held for all of it."""

_AT_ONCE = 32
"""Positions whose distributions are compared at once, in float64."""

MOST_KL: Mapping[str, float] = {"int8": 0.05, "int4": 0.5}
"""Largest mean divergence, in nats, by the kind of the weights; a user who knows the model sets a tighter one.

Trained models lose about 0.001 at 8 bits and 0.01 to 0.1 at 4; tiny models of random weights lost 0.0004 to 0.0025 and
0.03 to 0.15 (23 of them). What is beyond is broken and not merely coarse: at half a nat the text is another.
"""

Progress = Callable[[str, int, int], None]
Logits = npt.NDArray[np.floating]


def measure_quality(
    session: Session, original: Oracle, *, text: str | Path | None, seed: int, progress: Progress | None = None
) -> Quality:
    """Run both on the text in the file `text` (None: written by the engine). The session is reset.

    Raises what `read_text` raises.
    """
    import torch

    row = _written(session, seed) if text is None else read_text(session, text)
    session.reset()
    ours = session.forward([row])[0]
    (truth,) = original.logits([row], torch.float32, progress)
    theirs = truth.numpy()
    return Quality(
        source="the engine's own" if text is None else Path(text).name,
        tokens=len(row),
        kl=float(divergence(theirs, ours).mean()),
        agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        # A text that was drawn from the engine is likelier to the engine than to any other model.
        perplexity_ratio=None if text is None else _ratio(ours, theirs, row),
    )


def divergence(truth_TV: Logits, logits_TV: Logits) -> npt.NDArray[np.float64]:
    """Σ p (log p − log q) at each position, in nats, float64 [T]: p by the truth's logits, q by the others."""
    found = []
    for first in range(0, len(truth_TV), _AT_ONCE):
        log_p, log_q = (_log_softmax(side[first : first + _AT_ONCE]) for side in (truth_TV, logits_TV))
        found.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
    return np.concatenate(found)


def _log_softmax(logits_TV: Logits) -> npt.NDArray[np.float64]:
    wide = logits_TV.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def _ratio(ours_TV: Logits, theirs_TV: Logits, row: Sequence[int]) -> float:
    following = np.array(row[1:], np.int64)
    return perplexity(ours_TV[:-1], following) / perplexity(theirs_TV[:-1], following)


def quality_check(quality: Quality, kind: str, max_kl: float | None) -> Check:
    """Holds the divergence against `max_kl`, or the default of the kind of weights."""
    most = max_kl if max_kl is not None else MOST_KL.get(kind, max(MOST_KL.values()))
    ratio = "" if quality.perplexity_ratio is None else f", perplexity × {quality.perplexity_ratio:.3f}"
    detail = (
        f"KL {quality.kl:.2g} nats (at most {most:g}), the same best token at {quality.agreement:.1%} of "
        f"{quality.tokens} positions{ratio}, on this text: {quality.source}"
    )
    return Check("quality against the original", quality.kl <= most, detail)


def _cut(session: Session, tokens: int) -> int:
    """At most `tokens`, and no more than a row may hold."""
    end = last_position(session)
    return tokens if end is None else min(tokens, end)


def _written(session: Session, seed: int) -> list[int]:
    tokens = _cut(session, MOST_TOKENS)
    session.reset()
    model = session.manifest.model
    first = model.bos_token_id if model.bos_token_id is not None else 0
    if tokens < 2:
        return [first]
    row = [first, *session.generate([first], max_new_tokens=tokens - 1, temperature=1.0, seed=seed, stop_ids=())]
    return row[:tokens]


def read_text(session: Session, file: str | Path) -> list[int]:
    """The token ids of the beginning of a text.

    Raises TokenizerError when the bundle has no tokenizer, InputError for a file that is no text of two tokens or more.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The text {file} cannot be read: {error}.") from error
    row = list(session.tokenizer.encode(text))[: _cut(session, MOST_READ)]
    if len(row) < 2:
        raise InputError(f"The text {file} has {len(row)} tokens, and a comparison takes at least 2.")
    return row
