"""Which of a bundle's engines runs here, and why the others do not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest

from runtime import BackendError, BundleError, load
from runtime.bundle import read_bundle
from runtime.engine_info import DECODE, PREFILL, EngineInfo, engine_to_json
from runtime.tensorrt.engine_choice import BuiltEngine, choose_engine
from runtime.tensorrt.flavor import Flavor
from tests.support.engine_doubles import engine_info
from tests.support.toy_bundle import write_manifest, write_toy_bundle

PLAN = b"not really a plan"
VERSION = "11.0.0"


def flavor(name: str = "tensorrt", version: str = VERSION) -> Flavor:
    return Flavor(name, ModuleType(name), version, None, ("8.9", "9.0"), MappingProxyType({}))


def only_tensorrt(name: str | None) -> Flavor:
    if name == "tensorrt":
        return flavor()
    raise BackendError(f"{name} is not installed. Install it.")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "bundle")


def add(folder: Path, name: str, **changes: Any) -> EngineInfo:
    """Write an engine into the bundle as a build does. Its plans are none."""
    info = engine_info(read_bundle(folder))
    plans = {
        kind: replace(plan, bytes=len(PLAN), sha256=hashlib.sha256(PLAN).hexdigest())
        for kind, plan in info.plans.items()
    }
    info = replace(info, name=name, plans=plans, **changes)
    place = folder / "engines" / name
    place.mkdir(parents=True)
    for kind in (PREFILL, DECODE):
        (place / f"{kind}.plan").write_bytes(PLAN)
    content = json.dumps(engine_to_json(info)).encode()
    (place / "engine.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.setdefault("engines", {})[name] = entry
    write_manifest(folder, manifest)
    return info


def chosen(folder: Path, asked: str | None = None, load: Callable[[str | None], Flavor] = only_tensorrt) -> BuiltEngine:
    return choose_engine(read_bundle(folder), asked, "8.9", "tensorrt", load=load)


def test_the_only_one_that_fits_is_taken(folder: Path) -> None:
    info = add(folder, "this")
    add(folder, "other", compute_capability="9.0")
    found = chosen(folder)
    assert found.folder == folder / "engines" / "this"
    assert found.info == info
    assert found.flavor.version == VERSION


def test_a_bundle_without_engines_says_how_to_build_one(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"No engine was built.*`cierzo build .*--compute-capability 8\.9`"):
        chosen(folder)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "abacus"}, "is for the backend 'abacus'"),
    "graph": ({"graph_sha256": "0" * 64}, r"was built of another model\.onnx: the bundle was exported again since"),
    "chunk": ({"chunk": 2}, "takes 4 rows of 2 tokens at most, and the bundle has 4 of 3"),
    "rows": ({"max_batch": 1}, "takes 1 rows of 3 tokens at most"),
    "unknown": ({"flavor": "tensorrt-nano"}, "is for 'tensorrt-nano', which this Cierzo does not know"),
    "missing": ({"flavor": "tensorrt-rtx"}, r"needs tensorrt-rtx 11\.0\.0 \(tensorrt-rtx is not installed"),
    "version": ({"version": "11.1.0"}, r"is for tensorrt 11\.1\.0, and 11\.0\.0 is installed"),
    "gpu": ({"compute_capability": "9.0"}, r"is for GPUs of compute capability 9\.0, and this one has 8\.9"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_one_that_does_not_fit_is_refused_with_the_reason(folder: Path, name: str) -> None:
    changes, words = MISFITS[name]
    add(folder, "this", **changes)
    with pytest.raises(BackendError, match=f"runs here: this {words}.*`cierzo build"):
        chosen(folder)
    with pytest.raises(BackendError, match=f"this {words}"):
        chosen(folder, "this")


def test_one_whose_folder_was_deleted_is_in_nobody_s_way(folder: Path) -> None:
    add(folder, "this")
    shutil.rmtree(folder / "engines" / "this")
    with pytest.raises(BackendError, match="runs here: this was deleted"):
        chosen(folder)
    add(folder, "other")
    assert chosen(folder).info.name == "other"
    with pytest.raises(BundleError, match=r"this .* cannot be read"):
        chosen(folder, "this")


def test_all_reasons_are_named(folder: Path) -> None:
    for name, (changes, _) in MISFITS.items():
        add(folder, name, **changes)
    with pytest.raises(BackendError) as refused:
        chosen(folder)
    for name in MISFITS:
        assert f" {name} " in str(refused.value)


def test_a_gpu_that_the_library_does_not_run_on(folder: Path) -> None:
    add(folder, "this", compute_capability="10.9")
    with pytest.raises(BackendError, match=r"tensorrt, which does not run on GPUs of compute capability 10\.9"):
        choose_engine(read_bundle(folder), None, "10.9", "tensorrt", load=only_tensorrt)


def test_of_several_that_fit_one_must_be_named(folder: Path) -> None:
    add(folder, "a")
    add(folder, "b", arithmetic="bfloat16")
    with pytest.raises(BackendError, match=r"Several engines .* run here: a, b\. Name one of them with --engine"):
        chosen(folder)
    assert chosen(folder, "b").info.arithmetic == "bfloat16"


def test_two_libraries_may_be_installed(folder: Path) -> None:
    add(folder, "a", flavor="tensorrt-rtx", version="1.7.1")
    found = chosen(folder, load=lambda name: flavor(str(name), "1.7.1" if name == "tensorrt-rtx" else VERSION))
    assert found.flavor.name == "tensorrt-rtx"


def test_a_name_that_is_not_there_is_refused(folder: Path) -> None:
    add(folder, "a")
    with pytest.raises(BackendError, match=r"has no engine 'c'\. It has a\. Name one"):
        chosen(folder, "c")


def test_an_engine_that_was_changed_is_refused(folder: Path) -> None:
    add(folder, "a")
    path = folder / "engines" / "a" / "engine.json"
    content = path.read_bytes()
    for wrong in (content.replace(b"8.9", b"9.0"), content + b" ", b""):
        path.write_bytes(wrong)
        with pytest.raises(BundleError, match=r"damaged or changed\. Delete the engine's folder and build it again"):
            chosen(folder)
    path.unlink()
    with pytest.raises(BundleError, match=r"engine a .* cannot be read"):
        chosen(folder)


def test_plans_are_held_to_their_hash(folder: Path) -> None:
    add(folder, "a")
    found = chosen(folder)
    plan = found.info.plans[DECODE]
    path = found.plan_file(plan)
    assert path.read_bytes() == PLAN
    path.write_bytes(PLAN[:-1] + b"x")
    with pytest.raises(BundleError, match="has another content"):
        found.plan_file(plan)
    path.write_bytes(PLAN[:-1])
    with pytest.raises(BundleError, match=f"has {len(PLAN) - 1} bytes and not {len(PLAN)}"):
        found.plan_file(plan)
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        found.plan_file(plan)


@pytest.mark.parametrize("options", [{"threads": 1}, {"profile": "somewhere"}], ids=str)
def test_options_that_mean_nothing_to_it_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=r"no use for `threads`|no profile of nodes"):
        load(folder, backend="tensorrt", **options)


def test_engines_of_a_backend_that_runs_none(folder: Path) -> None:
    with pytest.raises(BackendError, match="not an engine that was built of it such as 'a'"):
        load(folder, engine="a")
