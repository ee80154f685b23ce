"""Hashes of files: plain SHA-256 for what a bundle wrote itself, a block hash for the checkpoint's own large files.

The block hash of a file is the SHA-256 of the SHA-256 digests (32 bytes each) of its consecutive blocks of BLOCK_BYTES,
the last of which may be shorter. Blocks are independent, so that several threads can work on one file (hashlib lets
go of the interpreter), and holes of a sparse file need not be read: every block of zeros has the same digest.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

BLOCK_BYTES = 16 << 20
_READ_AT_ONCE = 1 << 20
_MOST_THREADS = 4
_REPORTED_EVERY = 0.1  # seconds

Report = Callable[[int], None]
"""Called in the thread that asked for the hash, with the bytes of the file that are done."""


def sha256_of(path: Path, report: Report | None = None) -> str:
    """The SHA-256 of a file in lower-case hex. Raises OSError as the file system does."""
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_READ_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            if report is not None:
                report(done)
    return digest.hexdigest()


def blocks_sha256_of(path: Path, report: Report | None = None, *, threads: int | None = None) -> str:
    """The block hash of a file in lower-case hex (see the module). Raises OSError as the file system does.

    threads: None takes one per core that this process may use, four at most.
    """
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = min(_MOST_THREADS, cores)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _Blocks(descriptor, os.fstat(descriptor).st_size, threads).digest(report)
    finally:
        os.close(descriptor)


class _Blocks:
    """The blocks of one open file, which several workers take one after the other."""

    def __init__(self, descriptor: int, nbytes: int, threads: int) -> None:
        self._descriptor, self._nbytes, self._threads = descriptor, nbytes, threads
        self._digests = [b""] * -(-nbytes // BLOCK_BYTES)
        self._next: Iterator[int] = iter(range(len(self._digests)))
        self._lock = threading.Lock()
        self._done = 0
        self._stopped = False

    def digest(self, report: Report | None) -> str:
        with ThreadPoolExecutor(max(1, min(self._threads, len(self._digests)))) as pool:
            pending = {pool.submit(self._work) for _ in range(max(1, self._threads))}
            try:
                while pending:
                    finished, pending = wait(pending, timeout=_REPORTED_EVERY)
                    for worker in finished:
                        worker.result()
                    if report is not None:
                        report(self._done)
            except BaseException:
                self._stopped = True  # leaving the pool waits for its workers
                raise
        return hashlib.sha256(b"".join(self._digests)).hexdigest()

    def _work(self) -> None:
        buffer = bytearray(_READ_AT_ONCE)
        while not self._stopped:
            with self._lock:
                number = next(self._next, None)
            if number is None:
                return
            begin = number * BLOCK_BYTES
            size = min(BLOCK_BYTES, self._nbytes - begin)
            self._digests[number] = _zeros(size) if self._is_hole(begin, size) else self._read(buffer, begin, size)
            with self._lock:
                self._done += size

    def _is_hole(self, begin: int, size: int) -> bool:
        """Whether the file system says that the block was never written. One that cannot say has no holes."""
        if not hasattr(os, "SEEK_DATA"):
            return False
        with self._lock:  # the position belongs to the descriptor, which the workers share
            try:
                return os.lseek(self._descriptor, begin, os.SEEK_DATA) >= begin + size
            except OSError as error:
                return error.errno == errno.ENXIO  # no data from here to the end

    def _read(self, buffer: bytearray, begin: int, size: int) -> bytes:
        digest, at, end = hashlib.sha256(), begin, begin + size
        while at < end:
            view = memoryview(buffer)[: min(len(buffer), end - at)]
            count = os.preadv(self._descriptor, [view], at)
            if count == 0:
                raise OSError(errno.EIO, "the file became shorter while it was read")
            digest.update(view[:count])
            at += count
        return digest.digest()


@cache
def _zeros(size: int) -> bytes:
    """The digest of `size` zero bytes."""
    digest, piece = hashlib.sha256(), bytes(_READ_AT_ONCE)
    for begin in range(0, size, len(piece)):
        digest.update(piece[: size - begin])
    return digest.digest()
