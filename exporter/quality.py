"""What quantising the weights cost: the engine beside the original checkpoint, on one text, with teacher forcing.

Random tokens would tell little, as a model is not trained for them. Without a text of the user's, the engine writes one:
it begins with the beginning of a text and draws every token from its own distribution, so that the text is of the kind
that the model was trained for, whatever that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from exporter.borders import last_position
from exporter.validation_report import Check, Quality
from reference.oracle import Oracle
from reference.parity import perplexity
from runtime.errors import InputError
from runtime.session import Session

MOST_TOKENS = 512
"""Length of the text: the means below are known to a few per cent then."""

MOST_KL: Mapping[str, float] = {"int8": 0.05, "int4": 0.5}
"""Largest mean divergence, in nats, by the kind of the weights; a user who knows the model sets a tighter one.

Trained models lose about 0.001 at 8 bits and 0.01 to 0.1 at 4; random weights, whose errors nothing evens out, ten times
as much. What is beyond is broken and not merely coarse: at half a nat the text is another.
"""

Progress = Callable[[str, int, int], None]


def measure_quality(
    session: Session, original: Oracle, *, text: str | Path | None, seed: int, progress: Progress | None = None
) -> Quality:
    """Run both on the text in the file `text` (None: written by the engine). The session is reset.

    Raises TokenizerError when a file is given and the bundle has no tokenizer, InputError for one that cannot be read.
    """
    import torch

    end = last_position(session)
    most = MOST_TOKENS if end is None else min(MOST_TOKENS, end)
    row = _written(session, most, seed) if text is None else _read(session, Path(text), end)
    session.reset()
    ours = session.forward([row])[0].astype(np.float64)
    (truth,) = original.logits([row], torch.float32, progress)
    theirs = truth.numpy().astype(np.float64)
    log_p, log_q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
                    for x in (theirs, ours))  # fmt: skip
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    following = np.array(row[1:], np.int64)
    ratio = perplexity(ours[:-1], following) / perplexity(theirs[:-1], following) if len(row) > 1 else 1.0
    return Quality(
        source="the engine's own" if text is None else Path(text).name,
        tokens=len(row),
        kl=float(divergence.mean()),
        agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        perplexity_ratio=float(ratio),
    )


def quality_check(quality: Quality, kind: str, max_kl: float | None) -> Check:
    """Holds the divergence against `max_kl`, or the default of the kind of weights."""
    most = max_kl if max_kl is not None else MOST_KL.get(kind, max(MOST_KL.values()))
    detail = (
        f"KL {quality.kl:.2g} nats (at most {most:g}), the same best token at {quality.agreement:.1%} of "
        f"{quality.tokens} positions, perplexity × {quality.perplexity_ratio:.3f}, on this text: {quality.source}"
    )
    return Check("quality against the original", quality.kl <= most, detail)


def _written(session: Session, tokens: int, seed: int) -> list[int]:
    session.reset()
    model = session.manifest.model
    first = model.bos_token_id if model.bos_token_id is not None else 0
    row = [first, *session.generate([first], max_new_tokens=tokens - 1, temperature=1.0, seed=seed, stop_ids=())]
    return row[:tokens]


def _read(session: Session, file: Path, end: int | None) -> list[int]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The text {file} cannot be read: {error}.") from error
    row = list(session.tokenizer.encode(text))[:end]
    if len(row) < 2:
        raise InputError(f"The text {file} has {len(row)} tokens, and a comparison takes at least 2.")
    return row
