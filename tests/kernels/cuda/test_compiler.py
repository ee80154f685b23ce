"""NVRTC compiles kernels for every architecture, once; what it cannot do is refused with its reasons."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda import compiler
from runtime.kernels.cuda.compiler import SUPPORTED_ARCHITECTURES, architecture, cache_folder, compile_kernel
from runtime.kernels.cuda.launch import Kernel

SOURCE = """
#include "factor.cuh"
struct Scale { float* to; int count; };
CIERZO_KERNEL(scale, Scale, 128) {
    if (int(thread_x()) < params.count) params.to[thread_x()] *= FACTOR * OWN;
}
"""
KERNEL = Kernel("scale.cu", "scale", {"OWN": 2})


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "scale.cu").write_text(SOURCE)
    (folder / "factor.cuh").write_text('#pragma once\n#include "device.cuh"\n#define FACTOR 3.0f\n')
    return folder


def entries(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


@pytest.mark.parametrize("capability", SUPPORTED_ARCHITECTURES, ids=architecture)
def test_each_architecture_gets_its_machine_code(capability: tuple[int, int], sources: Path, tmp_path: Path) -> None:
    made = compile_kernel(KERNEL, capability, sources=sources, cache=tmp_path / "cache")
    assert made.cubin.startswith(b"\x7fELF")
    assert 0 < made.registers < 32
    assert (made.spilled_bytes, made.stack_bytes) == (0, 0)


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (10, 0), (12, 1)])
def test_other_architectures_are_refused(capability: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"8\.0, 8\.6, 8\.9, 9\.0, 12\.0, not " + "{}.{}".format(*capability)):
        compile_kernel(KERNEL, capability, cache=tmp_path)


def test_it_is_compiled_once(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_kernel(KERNEL, (8, 9), sources=sources, cache=tmp_path / "cache")
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("it was compiled again"))
    assert compile_kernel(KERNEL, (8, 9), sources=sources, cache=tmp_path / "cache") == first


def test_whatever_changes_the_code_makes_another_entry(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    codes = [compile_kernel(KERNEL, (9, 0), sources=sources, cache=cache).cubin]
    codes.append(compile_kernel(KERNEL, (8, 0), sources=sources, cache=cache).cubin)
    codes.append(compile_kernel(Kernel("scale.cu", "scale", {"OWN": 5}), (9, 0), sources=sources, cache=cache).cubin)
    header = sources / "factor.cuh"
    header.write_text(header.read_text().replace("3.0f", "7.0f"))
    codes.append(compile_kernel(KERNEL, (9, 0), sources=sources, cache=cache).cubin)
    (sources / "scale.cu").write_text(SOURCE.replace("*= FACTOR", "+= FACTOR"))
    codes.append(compile_kernel(KERNEL, (9, 0), sources=sources, cache=cache).cubin)
    assert len(set(codes)) == len(entries(cache)) == 5


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_entry_is_made_again(damage: str, sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made = compile_kernel(KERNEL, (9, 0), sources=sources, cache=cache)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    flipped = whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:]
    entry.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "flipped": flipped}[damage])
    assert compile_kernel(KERNEL, (9, 0), sources=sources, cache=cache) == made
    assert entry.read_bytes() == whole
    assert entries(cache) == {entry.name}


def test_several_at_once_leave_one_whole_entry(sources: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(compile_kernel, KERNEL, (8, 6), sources=sources, cache=tmp_path / "c") for _ in range(8)]
        assert len({done.result().cubin for done in asked}) == 1
    assert len(entries(tmp_path / "c")) == 1


def test_messages_of_the_compiler_reach_the_reader(sources: Path, tmp_path: Path) -> None:
    (sources / "scale.cu").write_text(SOURCE.replace("params.count", "params.number"))
    with pytest.raises(BackendError, match=r'scale .*for sm_90 with \{.OWN.: 2\}(.|\n)*scale\.cu\(5\).*"number"'):
        compile_kernel(KERNEL, (9, 0), sources=sources, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_kernel_that_its_source_does_not_hold_is_refused(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"scale\.cu holds no kernel shrink"):
        compile_kernel(Kernel("scale.cu", "shrink", {"OWN": 1}), (9, 0), sources=sources, cache=tmp_path)


def test_a_cache_that_cannot_be_written_is_named(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(BackendError, match=r"cannot be kept in .*cache.*CIERZO_CACHE"):
        compile_kernel(KERNEL, (9, 0), sources=sources, cache=tmp_path / "cache")


def test_the_cache_lies_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CIERZO_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "kernels"
    monkeypatch.delenv("CIERZO_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "cierzo" / "kernels"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "cierzo" / "kernels"


@pytest.mark.parametrize("missing", ["cuda.bindings", "cuda.core", "the library"])
def test_without_nvrtc_it_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if missing == "the library":

        def version() -> None:
            raise RuntimeError("\nno libnvrtc here")

        bindings = ModuleType("cuda.bindings")
        bindings.nvrtc = ModuleType("cuda.bindings.nvrtc")  # type: ignore[attr-defined]
        bindings.nvrtc.nvrtcVersion = version
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.setitem(sys.modules, f"{missing}.experimental", None)
    with pytest.raises(BackendError, match="Install cuda-core, cuda-bindings and nvidia-cuda-nvrtc"):
        compile_kernel(KERNEL, (9, 0), cache=tmp_path)
