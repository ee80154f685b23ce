"""The k best of each row of logits on a GPU, which is all that sampling has to copy from it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher

MOST_KEPT = 64
MOST_IDS = 1 << 22
MOST_ROWS = 65535
_CHUNK = 4096
_THREADS = 256
_SELECTION_BYTES = MOST_KEPT * 8 + 256 * 4 + 4 * 4


@dataclass(frozen=True, slots=True)
class TopProblem:
    """The `k` largest of `vocabulary` logits in each of `rows` rows.

    Raises BackendError for what the kernel does not compute: k beyond 64 or the vocabulary, a vocabulary beyond 2^22.
    """

    rows: int
    vocabulary: int
    k: int

    def __post_init__(self) -> None:
        if not 1 <= self.k <= min(MOST_KEPT, self.vocabulary) or self.vocabulary > MOST_IDS:
            raise BackendError(
                f"The best logits are found on the GPU for up to {MOST_KEPT} of up to {MOST_IDS}, not {self.k} of "
                f"{self.vocabulary}. Ask for fewer, or sample on the CPU."
            )
        if not 0 <= self.rows <= MOST_ROWS:
            raise BackendError(f"The best logits are found for up to {MOST_ROWS} rows at once, not {self.rows}.")


@dataclass(frozen=True, slots=True)
class TopTensors:
    """Device addresses. logits float32 [N, V], read; values float32 [N, k] and ids int32 [N, k], written. workspace:
    as many bytes as the launcher asks for, aligned to 256.
    """

    logits: int
    values: int
    ids: int
    workspace: int


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "keys", "kept", "values", "ids")),
        *((name, ctypes.c_uint32) for name in ("count", "chunk", "k")),
    ]


@dataclass(frozen=True, slots=True)
class _Level:
    """One launch: rows of `count` entries in `chunks` pieces of `chunk`, the last one a little shorter."""

    count: int
    chunks: int
    chunk: int
    kernel: Kernel


def _levels(problem: TopProblem) -> Iterator[_Level]:
    """Pieces are alike in size, so that none has fewer than k entries."""
    count, first = problem.vocabulary, True
    while True:
        chunks = -(-count // _CHUNK)
        definitions = {"FROM_LOGITS": int(first), "LAST": int(chunks == 1)}
        yield _Level(count, chunks, -(-count // chunks), Kernel("top_logits.cu", "top_logits", definitions))
        if chunks == 1:
            return
        count, first = chunks * problem.k, False


def _places(problem: TopProblem) -> tuple[int, ...]:
    """Where each level but the last keeps its keys in the workspace, and the end."""
    places = [0]
    for level in list(_levels(problem))[:-1]:
        size = problem.rows * level.chunks * problem.k * 8
        places.append(places[-1] + -(-size // 256) * 256)
    return tuple(places)


def top_logits_workspace_bytes(problem: TopProblem, limits: DeviceLimits) -> int:
    """Keys of 8 bytes that pieces of a row keep; what the workspace holds before does not matter."""
    return _places(problem)[-1]


def top_logits_kernels(problem: TopProblem) -> tuple[Kernel, ...]:
    """What `launch_top_logits` launches, in order: two for common vocabularies. They do not depend on `rows`."""
    return tuple(level.kernel for level in _levels(problem))


def launch_top_logits(launcher: Launcher, problem: TopProblem, tensors: TopTensors) -> None:
    """The k largest of each row, best first; of equals the lower id first.

    NaN counts as larger than every number: a row that has one anywhere gets NaN as its first value. -0 comes as 0.
    """
    if problem.rows == 0:
        return
    source = 0
    for level, place in zip(_levels(problem), _places(problem), strict=True):
        kept = tensors.workspace + place
        launcher.launch(
            level.kernel,
            grid=(level.chunks, problem.rows, 1),
            threads=_THREADS,
            shared_bytes=level.chunk * 8 + _SELECTION_BYTES,
            params=_Params(
                *(tensors.logits, source, kept, tensors.values, tensors.ids),
                *(level.count, level.chunk, problem.k),
            ),
        )
        source = kept
