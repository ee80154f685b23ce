"""Block hashes against the definition spelled out, with threads, with holes, and with files that change meanwhile."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

import runtime.hashing
from runtime.hashing import blocks_sha256_of, sha256_of

BLOCK = 1 << 16


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.hashing, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(runtime.hashing, "_READ_AT_ONCE", 5000)  # divides nothing


def by_definition(content: bytes) -> str:
    digests = [hashlib.sha256(content[at : at + BLOCK]).digest() for at in range(0, len(content), BLOCK)]
    return hashlib.sha256(b"".join(digests)).hexdigest()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [None, 1, 3])
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 123])
def test_both_hashes_are_as_defined(tmp_path: Path, size: int, threads: int | None) -> None:
    content = bytes(number * number % 251 for number in range(size))
    (tmp_path / "file").write_bytes(content)
    assert blocks_sha256_of(tmp_path / "file", threads=threads) == by_definition(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_of_the_real_block_size(tmp_path: Path) -> None:
    content = bytes(range(256)) * (80 << 10)  # 20 MiB: two blocks
    (tmp_path / "file").write_bytes(content)
    first, second = content[: 16 << 20], content[16 << 20 :]
    expected = hashlib.sha256(hashlib.sha256(first).digest() + hashlib.sha256(second).digest()).hexdigest()
    assert blocks_sha256_of(tmp_path / "file") == expected


@pytest.mark.usefixtures("small_blocks")
def test_a_sparse_file_has_the_hash_of_its_zeros_and_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 40 * BLOCK + 77
    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)
        file.seek(7 * BLOCK + 3)
        file.write(b"data")
    read = []
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(offset // BLOCK)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    content = bytearray(size)
    content[7 * BLOCK + 3 : 7 * BLOCK + 7] = b"data"
    assert blocks_sha256_of(tmp_path / "file") == by_definition(bytes(content))
    assert set(read) == {7}


@pytest.mark.usefixtures("small_blocks")
def test_a_file_system_that_knows_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(3 * BLOCK)

    def refuse(*arguments: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "lseek", refuse)
    assert blocks_sha256_of(tmp_path / "file") == by_definition(bytes(3 * BLOCK))


@pytest.mark.usefixtures("small_blocks")
def test_progress_ends_with_all_bytes_and_comes_in_the_calling_thread(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 2000)
    done: list[int] = []
    blocks_sha256_of(tmp_path / "file", done.append)
    assert done == sorted(done)
    assert done[-1] == 512_000
    done.clear()
    sha256_of(tmp_path / "file", done.append)
    assert done == sorted(done)
    assert done[-1] == 512_000


@pytest.mark.usefixtures("small_blocks")
def test_an_exception_in_the_progress_stops_the_workers(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        raise Stop

    (tmp_path / "file").write_bytes(bytes(BLOCK))
    with pytest.raises(Stop):
        blocks_sha256_of(tmp_path / "file", stop)


@pytest.mark.usefixtures("small_blocks")
def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 1000)
    monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
    with pytest.raises(OSError, match="became shorter"):
        blocks_sha256_of(tmp_path / "file")
