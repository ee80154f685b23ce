"""Engines of ONNX graphs on the GPU at hand, against logits that a CPU computed when their bundles were prepared."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import read_bundle
from runtime.engine_files import read_engine_document
from runtime.errors import BackendError
from runtime.loading import load
from runtime.session import Session
from runtime.step_engine_info import parse_step_engine
from tests.gpu.findings import Notebook
from tests.gpu.ort_models import BACKEND, FOLDER, Text, read_texts, text_file

PREPARE = "`python -m tests.gpu.prepare FOLDER` makes them"
_NEW_TOKENS, _ROUNDS = 12, 2
Opened = Callable[[], Session]
Logits = NDArray[np.float32]


def prepared(book: Notebook, folder: Path | None, kind: str) -> Path | None:
    """The folder of the prepared bundles of this kind; None, and said so, where there are none."""
    if folder is None:
        book.skip(kind, f"no bundles were given (--bundle); {PREPARE}")
    elif not (folder / FOLDER / kind).is_dir():
        book.skip(kind, f"{folder} holds none for {BACKEND}; {PREPARE}")
    else:
        return folder / FOLDER / kind
    return None


def tell_library(book: Notebook) -> None:
    """Which onnxruntime Python finds, and what of it is installed: two distributions bring the same package."""
    import onnxruntime

    named = [name for name in ("onnxruntime-gpu", "onnxruntime") if _installed(name)]
    providers = ", ".join(onnxruntime.get_available_providers())
    book.fact("onnxruntime", f"{onnxruntime.__version__} with {providers}; installed: {', '.join(named)}")


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_twins(book: Notebook, folder: Path | None) -> None:
    """Every engine of every prepared twin."""
    twins = prepared(book, folder, "twins")
    if twins is None:
        return
    book.attempt("the library", lambda: tell_library(book))
    bundles = sorted(path.parent for path in twins.glob("*/manifest.json"))
    if not bundles:
        book.skip("twins", f"{twins} is empty; {PREPARE}")
    for bundle in bundles:
        for name in read_bundle(bundle).manifest.engines:
            _check_engine(book, bundle, name)


def _check_engine(book: Notebook, bundle: Path, name: str) -> None:
    arithmetic = arithmetic_of(bundle, name)
    texts = read_texts(text_file(bundle.parent, bundle.name, arithmetic))
    opened: list[Session] = []

    def session() -> Session:  # one for all checks, and another one in a process that goes on behind a check
        if not opened:
            opened.append(load(bundle, backend=BACKEND, engine=name))
        return opened[0]

    def loads() -> None:
        session()

    what = f"{bundle.name}, {arithmetic}"
    if not book.check(f"{what}: loads", loads):
        return
    for text in texts:
        book.check(f"{what}: {text.name}", partial(_check_text, session, text))
    book.check(f"{what}: the same text twice gives the same bits", partial(_check_repeat, session, texts[-1]))
    book.check(f"{what}: generation", partial(_check_generation, session, texts[-1]))


def arithmetic_of(bundle: Path, engine: str) -> str:
    """In what an engine computes."""
    document = read_engine_document(read_bundle(bundle), engine)
    if document.backend != BACKEND:
        raise BackendError(f"The engine {engine} of {bundle} is one for {document.backend}, not for {BACKEND}.")
    return parse_step_engine(document.name, document.root).arithmetic


def _check_text(session: Opened, text: Text) -> float:
    return share_of_budget(session(), text)


def share_of_budget(session: Session, text: Text) -> float:
    """The largest distance from the reference and from transformers, as a share of what is allowed."""
    logits = fed(session, text.feeds)
    worst = 0.0
    for own, truth, other in zip(logits, text.truth, text.transformers, strict=True):
        assert np.isfinite(own).all(), "a logit is not finite"
        assert len(own) >= len(truth), (own.shape, truth.shape)
        for expected in (truth, other):
            worst = max(worst, float(np.abs(own[: len(expected)] - expected).max(initial=0)) / text.allowed)
    return worst


def fed(session: Session, feeds: list[list[list[int]]]) -> list[Logits]:
    """Logits [T, V] of each row, after a reset."""
    session.reset()
    pieces: list[list[Logits]] = [[] for _ in feeds[0]]
    for rows in feeds:
        logits_BTV = session.forward(rows)
        for index, row in enumerate(rows):
            pieces[index].append(logits_BTV[index, : len(row)].copy())
    return [np.concatenate(row) for row in pieces]


def _check_repeat(session: Opened, text: Text) -> None:
    """Also that a reset leaves nothing behind, and that graphs that were captured are the steps they stand for."""
    first, *others = (fed(session(), text.feeds) for _ in range(1 + _ROUNDS))
    for other in others:
        for mine, yours in zip(first, other, strict=True):
            np.testing.assert_array_equal(mine, yours)


def _check_generation(session: Opened, text: Text) -> None:
    """Greedy tokens, chosen on the device, are the session's own highest logits, up to what rounding decides."""
    opened, allowed = session(), text.allowed
    prompt = [token for feed in text.feeds for token in feed[0]]
    opened.reset()
    chosen = list(opened.generate(prompt, max_new_tokens=_NEW_TOKENS, temperature=0.0, stop_ids=()))
    assert len(chosen) == _NEW_TOKENS
    (logits_TV,) = fed(opened, [[[*prompt, *chosen]]])
    for offset, token in enumerate(chosen):
        row = logits_TV[len(prompt) - 1 + offset]
        short = float(row.max() - row[token])
        assert short <= 2 * allowed, f"token {offset} is {token}, {short} below the highest logit"
