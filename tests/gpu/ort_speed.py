"""Speed and memory of engines of ONNX graphs at published shapes, with random weights.

A step is timed as its caller sees it: from the token that went in to the token that came out, on the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from runtime.errors import BackendError
from runtime.loading import load
from runtime.session import Session
from tests.gpu.bench import COPY, READ, Bench
from tests.gpu.findings import Timing
from tests.gpu.kernel_trace import tell_kernels
from tests.gpu.ort_models import BACKEND, kv_bytes_of_a_token, weight_bytes_of_a_token
from tests.gpu.ort_weights import Shape, made

SECTION = "onnxruntime"
DENSE, MIXTURE = "mistral-7b", "mixtral-8x7b-int4"


def figure_name(shape: str, what: str) -> str:
    """Of the fact that the other side of a comparison looks for."""
    return f"{shape}, {what}, tok/s"


DECODE, PREFILL = "decode", "prefill"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens. prompt, warm, decode: fed first, not timed, timed. prefill: of a prompt. far: to which memory is watched.

    crossing: a text that ends behind the window; compared: its last ones, of which `singles` are fed one by one.
    """

    prompt: int = 64
    warm: int = 16
    decode: int = 128
    prefill: int = 4096
    far: int = 131_072
    crossing: int = 4216
    compared: int = 64
    singles: int = 8


LARGE, SMALL = Lengths(), Lengths(4, 3, 6, 32, 96, 29, 8, 3)


def lengths_of(bench: Bench) -> Lengths:
    """Small ones for testing the script."""
    return SMALL if bench.small else LARGE


def random_tokens(shape: Shape, count: int, seed: int) -> list[int]:
    """[count] ids."""
    ids: list[int] = np.random.default_rng(seed).integers(3, shape.config["vocab_size"], count).tolist()
    return ids


class Loaded:
    """The session of a shape, loaded when it is first asked for, and only once even if that fails."""

    def __init__(self, bench: Bench, folder: Path, shape: Shape, work: Path) -> None:
        self._bench, self._folder, self.shape, self._work = bench, folder, shape, work
        self._session: Session | None = None
        self._error: Exception | None = None

    def session(self) -> Session:
        """Raises what loading raises, and BackendError if a process before this one did not survive it."""
        if self._error is not None:
            raise self._error
        if self._session is None:
            mark = self._work / f"{self.shape.name}.loading"
            if mark.exists():
                raise BackendError(f"Loading {self.shape.name} ended a process before this one.")
            mark.touch()
            try:
                self._session = self._load()
            except Exception as error:
                self._error = error
                raise
            finally:
                mark.unlink()
        return self._session

    def _load(self) -> Session:
        book, name = self._bench.book, self.shape.name
        begun = time.perf_counter()
        bundle = made(self._bench, self._folder, self.shape, self._work)
        at = time.perf_counter()
        session = load(bundle, backend=BACKEND)
        book.fact(f"{name}: random weights made in, s", at - begun)
        book.fact(f"{name}: loaded in, s", time.perf_counter() - at)
        for note in session.notes:
            book.fact(f"{name}: a note of the session", note)
        return session


def measure_dense(bench: Bench, folder: Path, shape: Shape, work: Path) -> None:
    """Mistral 7B's shape: decode, prefill, memory far behind the window, and logits for the comparison."""
    loaded = Loaded(bench, folder, shape, work)
    if not _loads(bench, loaded):
        return
    name, book = shape.name, bench.book
    book.check(f"{name}: computes", partial(_computes, bench, loaded))
    book.attempt(f"{name}: decode", partial(_decode, bench, loaded))
    book.attempt(f"{name}: prefill", partial(_prefill, bench, loaded))
    book.attempt(f"{name}: logits behind the window", partial(_save_logits, bench, loaded, work))
    lengths = lengths_of(bench)
    book.check(f"{name}: KV bytes are constant to {lengths.far} tokens", partial(_watch_memory, bench, loaded))
    book.attempt(f"{name}: kernels", partial(_trace, bench, loaded))


def measure_mixture(bench: Bench, folder: Path, shape: Shape, work: Path) -> None:
    """Mixtral 8x7B's shape in 4 bits, on one GPU."""
    loaded = Loaded(bench, folder, shape, work)
    if not _loads(bench, loaded):
        return
    bench.book.check(f"{shape.name}: computes", partial(_computes, bench, loaded))
    bench.book.attempt(f"{shape.name}: decode", partial(_decode, bench, loaded))
    bench.book.attempt(f"{shape.name}: prefill", partial(_prefill, bench, loaded))
    bench.book.attempt(f"{shape.name}: kernels", partial(_trace, bench, loaded))


def _loads(bench: Bench, loaded: Loaded) -> bool:
    def run() -> None:
        loaded.session()

    return bench.book.check(f"{loaded.shape.name}: loads", run)


def _computes(bench: Bench, loaded: Loaded) -> None:
    session = loaded.session()
    session.reset()
    logits = session.forward_last([random_tokens(loaded.shape, 5, 1)])
    assert np.isfinite(logits).all(), "a logit is not finite"
    assert float(logits.std()) > 0, "all logits are the same"
    if bench.where == "cuda":
        free, whole = bench.torch.cuda.mem_get_info()
        bench.book.fact(f"{loaded.shape.name}: memory of the GPU in use, GB", (whole - free) / 1e9)


def _decode(bench: Bench, loaded: Loaded) -> None:
    lengths, shape = lengths_of(bench), loaded.shape
    taken = min(decode_seconds(loaded.session(), shape, lengths, seed) for seed in range(1 if bench.small else 3))
    bench.book.fact(figure_name(shape.name, DECODE), 1 / taken)
    position = lengths.prompt + lengths.warm + lengths.decode // 2
    nbytes = weight_bytes_of_a_token(shape.config, shape.bits) + kv_bytes_of_a_token(shape.config, position)
    for ceiling, against in ((COPY, "the copy's bandwidth"), (READ, "the read bandwidth")):
        measured = bench.ceiling(ceiling)
        share = nbytes / taken / 1e9 / measured if measured else None
        name = f"{shape.name}, {shape.arithmetic}, decode at batch 1"
        timing = Timing(SECTION, name, 1e6 * taken, 1 / taken, "tok/s", share, against, shape.target)
        bench.book.add(timing)


def decode_seconds(session: Session, shape: Shape, lengths: Lengths, seed: int) -> float:
    """Of one greedy token: the median of many."""
    session.reset()
    prompt, count = random_tokens(shape, lengths.prompt, seed), lengths.warm + lengths.decode
    taken, before = [], time.perf_counter()
    for _ in session.generate(prompt, max_new_tokens=count, temperature=0.0, stop_ids=()):
        now = time.perf_counter()
        taken.append(now - before)
        before = now
    return statistics.median(taken[lengths.warm :])


def _prefill(bench: Bench, loaded: Loaded) -> None:
    lengths, shape = lengths_of(bench), loaded.shape
    session, prompt = loaded.session(), [random_tokens(shape, lengths.prefill, 2)]

    def run() -> float:
        session.reset()
        begun = time.perf_counter()
        logits = session.forward_last(prompt)
        taken = time.perf_counter() - begun
        assert np.isfinite(logits).all(), "a logit is not finite"
        return taken

    taken = timed(run, bench.small)
    speed = lengths.prefill / taken
    bench.book.fact(figure_name(shape.name, PREFILL), speed)
    name = f"{shape.name}, {shape.arithmetic}, prefill of {lengths.prefill}"
    bench.book.add(Timing(SECTION, name, 1e6 * taken, speed, "tok/s"))


def timed(run: Callable[[], float], small: bool) -> float:
    """The median of some runs in seconds, after two that do not count: kernels are loaded and chosen in them."""
    count = 1 if small else 7
    for _ in range(1 if small else 2):
        run()
    return statistics.median(run() for _ in range(count))


def crossing_text(shape: Shape, lengths: Lengths) -> list[int]:
    """The text whose last logits are compared."""
    return random_tokens(shape, lengths.crossing, 3)


def logits_file(work: Path, shape: str) -> Path:
    """Where an engine's logits [compared, V] of the end of that text are kept."""
    return work / f"{shape}.logits.npy"


def _save_logits(bench: Bench, loaded: Loaded, work: Path) -> None:
    lengths, session = lengths_of(bench), loaded.session()
    text = crossing_text(loaded.shape, lengths)
    session.reset()
    begin, single = lengths.crossing - lengths.compared, lengths.crossing - lengths.singles
    session.forward_last([text[:begin]])
    pieces = [session.forward([text[begin:single]])[0].copy()]
    pieces += [session.forward([[token]])[0].copy() for token in text[single:]]
    np.save(logits_file(work, loaded.shape.name), np.concatenate(pieces))


def _watch_memory(bench: Bench, loaded: Loaded) -> None:
    lengths, session = lengths_of(bench), loaded.session()
    session.reset()
    text = random_tokens(loaded.shape, lengths.far, 4)
    kv, used = {session.kv_bytes}, list[int]()
    for begin in range(0, lengths.far, lengths.prefill):
        logits = session.forward_last([text[begin : begin + lengths.prefill]])
        assert np.isfinite(logits).all(), f"a logit after {begin + lengths.prefill} tokens is not finite"
        kv.add(session.kv_bytes)
        if bench.where == "cuda":
            used.append(bench.torch.cuda.mem_get_info()[0])
    chosen = list(session.generate(text[:1], max_new_tokens=lengths.decode, temperature=0.0, stop_ids=()))
    kv.add(session.kv_bytes)
    bench.book.fact(f"{loaded.shape.name}: KV bytes after {int(session.position[0])} tokens", session.kv_bytes)
    assert len(chosen) == lengths.decode
    assert len(kv) == 1, f"KV bytes were {sorted(kv)}"
    assert not used or max(used[1:]) - min(used[1:]) < 1 << 26, (
        f"free memory of the GPU went from {used[1]} to {used[-1]}"
    )


def _trace(bench: Bench, loaded: Loaded) -> None:
    lengths, session, shape = lengths_of(bench), loaded.session(), loaded.shape
    session.reset()
    session.forward_last([random_tokens(shape, lengths.prompt, 5)])
    tokens = iter(range(3, 1 << 30))

    def step() -> None:
        for _ in session.generate([next(tokens)], max_new_tokens=1, temperature=0.0, stop_ids=()):
            pass

    def chunk() -> None:
        session.reset()
        session.forward_last([random_tokens(shape, min(lengths.prefill, session.manifest.kv.chunk), 6)])

    for what, run, rounds in (("a token", step, 8), ("a chunk", chunk, 1)):
        run()
        run()  # captured by now
        tell_kernels(bench, f"{shape.name}: kernels of {what}", run, rounds)
