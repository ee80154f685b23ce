"""Which library of native kernels a process takes, what the environment may say about it, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from numpy.random import mtrand

import runtime.kernels as subject
from runtime import load
from runtime.errors import BackendError
from runtime.kernels import LEVELS, counters, kernels, library_path, why_none
from tests.support.bundles import exported
from tests.support.kernels import ROOT, levels

SWITCH, OTHER = "CIERZO_KERNELS", "CIERZO_KERNEL_LIBRARY"


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv(OTHER, raising=False)


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder in the place of the package's."""
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(subject, "_HERE", folder)
    return folder


def in_a_process(**environment: str) -> str:
    """What a new process prints of its level and library, or of the refusal."""
    code = (
        "from runtime.errors import BackendError\n"
        "from runtime.kernels import kernels\n"
        "try:\n    found = kernels()\n    print(found and found.isa, found and found.library)\n"
        "except BackendError as error:\n    print('refused:', error)\n"
    )
    unset = {name: value for name, value in os.environ.items() if name not in (SWITCH, OTHER)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env={**unset, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_built_library_is_taken() -> None:
    found = kernels()
    assert found is not None
    assert found.library == library_path()
    assert found.library.parent == Path(subject.__file__).parent
    assert found.isa in LEVELS
    assert {"QuantizedMatMul", "RollingAttention", "RMSNorm", "GatedActivation"} <= set(found.ops)
    assert len(set(found.ops)) == len(found.ops)
    assert why_none() is None
    assert {counter.op for counter in counters()} >= set(found.ops)


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    assert (kernels(), library_path(), counters()) == (None, None, ())
    assert (why_none() or "").startswith("CIERZO_KERNELS=off switches the native kernels off")


def test_an_empty_wish_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels()
    monkeypatch.setenv(SWITCH, "")
    monkeypatch.setenv(OTHER, "")
    assert kernels() == found


@pytest.mark.parametrize("level", levels())
def test_levels_of_this_machine(level: str) -> None:
    assert in_a_process(CIERZO_KERNELS=level).split()[0] == level


@pytest.mark.parametrize("level", sorted(set(LEVELS) - set(levels())))
def test_a_level_that_this_machine_lacks_is_refused(level: str) -> None:
    printed = in_a_process(CIERZO_KERNELS=level)
    assert printed.startswith(f"refused: CIERZO_KERNELS={level} asks for a level of instructions that this machine")
    assert f"its kernels run with {levels()[-1]}" in printed


def test_a_level_that_comes_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels() is not None
    other = "portable" if levels()[-1] != "portable" else "avx512"
    monkeypatch.setenv(SWITCH, other)
    with pytest.raises(BackendError, match=f"CIERZO_KERNELS={other} asks for a level"):
        kernels()


@pytest.mark.parametrize("wish", ["OFF", "avx", "avx-512", "0", "none", " off"])
def test_an_unknown_wish_is_refused(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv(SWITCH, wish)
    for ask in (library_path, kernels, why_none, counters):
        with pytest.raises(BackendError, match="is unknown: set it to off") as refused:
            ask()
        assert f"CIERZO_KERNELS={wish} " in str(refused.value)
        assert all(level in str(refused.value) for level in LEVELS)
    with pytest.raises(BackendError, match="is unknown"):
        load(exported().bundle, threads=1)


def test_another_library(tmp_path: Path) -> None:
    built = library_path()
    assert built is not None
    other = tmp_path / "other.so"
    shutil.copyfile(built, other)
    assert in_a_process(CIERZO_KERNEL_LIBRARY=str(other)) == f"{levels()[-1]} {other}"


def test_another_library_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name is a file here, and not one that the loader looks for in the system's folders."""
    built = library_path()
    assert built is not None
    shutil.copyfile(built, tmp_path / "libm.so.6")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(OTHER, "libm.so.6")
    found = kernels()
    assert found is not None
    assert found.library == tmp_path / "libm.so.6"


@pytest.mark.parametrize("name", ["missing.so", "."])
def test_a_named_library_that_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(OTHER, str(tmp_path / name))
    for ask in (library_path, kernels, why_none, counters):
        with pytest.raises(BackendError, match="which is not a file; name a file that is one") as refused:
            ask()
        assert str(tmp_path / name) in str(refused.value)


def test_a_named_file_that_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    monkeypatch.setenv(OTHER, str(text))
    for ask in (kernels, why_none):
        with pytest.raises(BackendError, match="is not a library of Cierzo's kernels") as refused:
            ask()
        assert str(text) in str(refused.value)


def test_a_library_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OTHER, str(mtrand.__file__))
    with pytest.raises(BackendError, match="is not a library of Cierzo's kernels"):
        kernels()


def test_without_a_library_the_bodies_run_and_a_sentence_says_why(nothing_built: Path) -> None:
    assert (library_path(), kernels(), counters()) == (None, None, ())
    assert (why_none() or "").startswith("The native kernels were not built, since no C compiler was found")
    session = load(exported().bundle, threads=1)
    assert session.kernels == ()
    assert session.notes[0] == why_none()


def test_a_build_for_another_machine_is_not_used(nothing_built: Path) -> None:
    """The package's own file, damaged or of another architecture: nobody asked for it by name, so the bodies run."""
    damaged = nothing_built / f"_cpu{EXTENSION_SUFFIXES[0]}"
    damaged.write_bytes(b"\x7fELF of another machine")
    assert library_path() == damaged
    assert (kernels(), counters()) == (None, ())
    assert why_none() == (
        f"The native kernels in {damaged} cannot be loaded on this machine; the nodes' portable bodies run."
    )


def test_an_earlier_interpreters_build_is_not_taken(nothing_built: Path) -> None:
    (nothing_built / "_cpu.cpython-38-x86_64-linux-gnu.so").touch()
    assert library_path() is None
