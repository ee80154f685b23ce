"""What pyproject.toml builds the native kernels of is all that lies in their folder."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from tests.layout.imports import ROOT

FOLDER = "runtime/kernels/cpu"


def library() -> dict[str, Any]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    (found,) = settings["ext-modules"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("key, suffix", [("sources", ".c"), ("depends", ".h")])
def test_every_file_is_listed_once_and_in_order(key: str, suffix: str) -> None:
    """Without a source the library does not load; without a header a source distribution does not build."""
    assert library()[key] == sorted(str(path.relative_to(ROOT)) for path in (ROOT / FOLDER).glob(f"*{suffix}"))


def test_no_other_files_are_needed() -> None:
    """Headers of the folder or of the system: none of a package that an install would have to bring along."""
    listed = {*library()["sources"], *library()["depends"]}
    for path in (ROOT / FOLDER).iterdir():
        assert path.suffix in {".c", ".h"}, f"{path} is neither source nor header"
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            assert f"{FOLDER}/{name}" in listed, f"{path.name} includes {name}"


def test_the_library_is_found_where_it_is_built() -> None:
    from runtime.kernels import _HERE

    package, name = library()["name"].rsplit(".", 1)
    assert package.replace(".", "/") == str(_HERE.relative_to(ROOT))
    assert name == "_cpu"


def test_an_install_without_a_compiler_succeeds() -> None:
    assert library()["optional"] is True


def test_no_flag_binds_the_library_to_the_machine_that_built_it() -> None:
    """Instructions are chosen at run time; nor may the compiler reorder sums or forget about NaN."""
    assert not re.search(r"-m(arch|tune|avx|fma|cpu)|fast-math|-Ofast", " ".join(library()["extra-compile-args"]))
