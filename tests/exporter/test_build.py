"""`build`: what lies in an engine's folder, what the manifest says of it, and that builds are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import exporter
from exporter.build import plan_engine
from exporter.build.engine_folder import engine_folder
from exporter.defaults import BUILDING, COMPILING
from runtime.bundle import Bundle, read_bundle
from runtime.engine_info import DECODE, EMBEDDED, INPUT, PREFILL, REFIT, PlanProfile
from runtime.errors import BackendError
from runtime.hashing import sha256_of
from runtime.kernels.cuda.compiler import cache_folder
from runtime.tensorrt.engine_choice import read_engine
from runtime.tensorrt.flavor import load_flavor
from runtime.weight_expression import pieces
from tests.support.engines import CHUNK, ROWS, Engine, built_plans, bundle_of, engine, kernels_compiled

KILLED_AT = ("lowered.onnx", "prefill.plan", "decode.plan")


def bundle(built: Engine) -> Bundle:
    return read_bundle(built.built.folder.parents[1], verify=True)


def test_an_engine_says_what_it_was_built_as() -> None:
    built = engine("window")
    opened, info = bundle(built), built.info
    flavor = load_flavor("tensorrt-rtx")
    assert (info.backend, info.flavor, info.version) == ("tensorrt", "tensorrt-rtx", flavor.version)
    assert (info.compute_capability, info.arithmetic, info.kv) == ("8.9", "bfloat16", "bfloat16")
    assert (info.max_batch, info.chunk) == (ROWS, CHUNK)
    assert info.plugins == ("PackedRollingAttention",)
    assert info.graph_sha256 == sha256_of(opened.file("model.onnx"))
    assert info.plans[PREFILL].profiles == (PlanProfile(1, ROWS, 1, CHUNK),)
    assert info.plans[DECODE].profiles == (PlanProfile(1, 1, 1, 1), PlanProfile(1, ROWS, 1, 1))
    assert info.name.startswith(f"tensorrt-rtx-{flavor.version}-sm89-bfloat16-")


def test_what_is_written_is_what_the_manifest_lists() -> None:
    built = engine("window")
    opened = bundle(built)
    assert read_engine(opened, built.info.name) == built.info
    folder = opened.path / "engines" / built.info.name
    assert {path.name for path in folder.iterdir()} == {"engine.json", "kernels.json", "prefill.plan", "decode.plan"}
    assert sorted(path.name for path in opened.path.iterdir()) == [
        *("engines", "manifest.json", "model.onnx", "model.safetensors"),
    ]
    for plan in built.info.plans.values():
        assert plan.bytes == (folder / plan.file).stat().st_size
        assert plan.sha256 == sha256_of(folder / plan.file)
    assert os.stat(folder).st_mode & 0o777 == 0o755


@pytest.mark.parametrize("model", ["window", "mixtral", "int4"])
def test_weightless_plans_hold_no_weight(model: str) -> None:
    built = engine(model, plugins="all", max_batch=1)
    opened, roles = bundle(built), {INPUT: 0, REFIT: 0}
    contents = [(built.built.folder / plan.file).read_bytes() for plan in built.info.plans.values()]
    for weight in built.info.tensors:
        data = np.concatenate(list(pieces(weight.expression, opened.file, built.info.orders))).tobytes()
        roles[weight.role] += 1
        assert not [content for content in contents if data[:64] in content]
        # By its name it is given to the engine: as an input, or as a constant to be filled in.
        assert all(weight.name.encode() in content for content in contents), weight.name
    assert bool(roles[REFIT]) == (model == "int4")
    assert roles[INPUT] > 0


@pytest.mark.parametrize("model", ["window", "int4"])
def test_embedded_plans_hold_them_all(tmp_path: Path, model: str) -> None:
    opened = bundle_of(model, tmp_path / "bundle", max_batch=1)
    weightless = engine(model, plugins="all", max_batch=1)
    with kernels_compiled():
        built = built_plans(opened.path, compute_capability="8.9", weights=EMBEDDED)
    assert (built.info.weights, built.info.tensors, dict(built.info.orders)) == (EMBEDDED, (), {})
    norm = next(weight for weight in weightless.info.tensors if weight.name == "norm.weight")
    data = np.concatenate(list(pieces(norm.expression, opened.file, {}))).tobytes()
    for plan in built.info.plans.values():
        assert data in (built.folder / plan.file).read_bytes()
    assert built.kernels == weightless.built.kernels


def test_the_kernels_that_plugins_launch_are_compiled_for_that_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIERZO_CACHE", str(tmp_path / "cache"))
    told: list[tuple[str, int, int]] = []
    opened = bundle_of("window", tmp_path / "bundle", max_batch=1)
    folder = exporter.build_engine(opened.path, compute_capability="8.6", progress=lambda *report: told.append(report))
    assert read_engine(read_bundle(opened.path), folder.name).compute_capability == "8.6"
    compiled = sorted(path.name.split("-sm_")[0] for path in cache_folder().iterdir())
    assert sorted({name for name in compiled if not name.startswith("top")}) == [
        "rolling_decode",
        "rolling_prefill",
        "rolling_write",
    ]
    assert {name for name in compiled if name.startswith("top")}
    assert all("-sm_86-" in path.name for path in cache_folder().iterdir())
    for stage, total in ((BUILDING.format(PREFILL), 100), (BUILDING.format(DECODE), 100), (COMPILING, len(compiled))):
        reports = [(done, of) for name, done, of in told if name == stage]
        assert reports == sorted(reports)
        assert reports[-1] == (total, total)


def test_engines_lie_side_by_side_and_the_same_one_is_replaced(tmp_path: Path) -> None:
    opened = bundle_of("window", tmp_path / "bundle", max_batch=1)
    before = json.loads((opened.path / "manifest.json").read_text(encoding="utf-8"))
    with kernels_compiled():
        first = built_plans(opened.path, compute_capability="8.9")
        second = built_plans(opened.path, compute_capability="8.9", kv="float16")
        (first.folder / "left").touch()
        again = built_plans(opened.path, compute_capability="8.9")
    assert again.folder == first.folder
    assert not (first.folder / "left").exists()
    assert set(read_bundle(opened.path).manifest.engines) == {first.info.name, second.info.name}
    assert {path.name for path in first.folder.parent.iterdir()} == {first.info.name, second.info.name}
    after = json.loads((opened.path / "manifest.json").read_text(encoding="utf-8"))
    assert after.pop("engines")
    assert after == before


def test_rings_have_the_type_that_was_asked_for() -> None:
    built = engine("window", max_batch=1, kv="float8")
    (attending, *_) = [kernel for kernel in built.of(DECODE) if kernel.kind == "plugin"]
    assert [tensor for tensor in attending.inputs if tensor.startswith("past.")] == [
        *(f"past.0.{part} FP8[1,2,10,16]" for part in ("key", "value")),
    ]


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = bundle_of("window", tmp_path / "bundle", max_batch=1)
    before = {path.name: path.read_bytes() for path in opened.path.iterdir()}

    def fail(*_: object) -> None:
        raise BackendError("no")

    monkeypatch.setattr(plan_engine, "run_job", fail)
    with pytest.raises(BackendError, match=r"^no$"):
        built_plans(opened.path, compute_capability="8.9")
    assert {path.name: path.read_bytes() for path in opened.path.iterdir()} == before


def test_a_bundle_that_cannot_be_written_to_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    opened = bundle_of("window", tmp_path / "bundle", max_batch=1)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(BackendError, match=r"cannot be written into .*: Permission denied\."):
        built_plans(opened.path, compute_capability="8.9")


def test_an_engine_that_cannot_be_listed_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = bundle_of("window", tmp_path / "bundle", max_batch=1)
    replaced = os.replace

    def full(source: str, target: Path) -> None:
        if Path(target).name == "manifest.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replaced(source, target)

    with engine_folder(opened, "first") as folder:
        (folder / "engine.json").write_text("{}")
    before = (opened.path / "manifest.json").read_bytes()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BackendError, match="No space left"), engine_folder(opened, "second") as folder:
        (folder / "engine.json").write_text("{}")
    assert (opened.path / "manifest.json").read_bytes() == before
    assert [path.name for path in (opened.path / "engines").iterdir()] == ["first"]
    assert {path.name for path in opened.path.iterdir()} == {
        *("engines", "manifest.json", "model.onnx", "model.safetensors"),
    }


def test_deleted_engines_are_listed_no_more(tmp_path: Path) -> None:
    opened = bundle_of("window", tmp_path / "bundle", max_batch=1)
    for name in ("first", "second", "third"):
        with engine_folder(opened, name) as folder:
            (folder / "engine.json").write_text("{}")
        shutil.rmtree(opened.path / "engines" / "first", ignore_errors=True)
    assert list(read_bundle(opened.path).manifest.engines) == ["second", "third"]


def test_an_engine_that_is_listed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = bundle_of("window", tmp_path / "bundle", max_batch=1)
    replaced = os.replace

    def interrupted(source: str, target: Path) -> None:
        replaced(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), engine_folder(opened, "engine") as folder:
        (folder / "engine.json").write_text("{}")
    assert list(read_bundle(opened.path).manifest.engines) == ["engine"]
    assert [path.name for path in (opened.path / "engines").iterdir()] == ["engine"]


def test_what_killed_builds_of_any_engine_left_is_removed(tmp_path: Path) -> None:
    opened = bundle_of("window", tmp_path / "bundle", max_batch=1)
    engines = opened.path / "engines"
    (engines / ".other.partial-abcd1234").mkdir(parents=True)
    (engines / ".other.partial-abcd1234" / "prefill.plan").touch()
    (engines / "kept.partial-abcd1234").mkdir()
    with engine_folder(opened, "running") as other, engine_folder(opened, "engine") as folder:
        for made in (other, folder):
            (made / "engine.json").write_text("{}")
        names = sorted(path.name.split("partial-")[0] for path in engines.iterdir())
    assert names == [".engine.", ".running.", "kept."]


@pytest.mark.parametrize("moment", KILLED_AT)
def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path: Path, moment: str) -> None:
    opened = bundle_of("window", tmp_path / "bundle", max_batch=1)
    script = "import sys, exporter; exporter.build_engine(sys.argv[1], compute_capability='8.9', plugins='none')"
    engines = opened.path / "engines"
    process = subprocess.Popen([sys.executable, "-c", script, str(opened.path)])
    try:
        deadline = time.monotonic() + 120
        while not list(engines.glob(f".*/{moment}")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert all(path.name.startswith(".tensorrt-rtx-") for path in engines.iterdir())
    assert read_bundle(opened.path, verify=True).manifest.engines == {}
    with kernels_compiled():
        built = built_plans(opened.path, compute_capability="8.9", plugins="none")
    assert [path.name for path in engines.iterdir()] == [built.info.name], "what the killed one left is gone"
    assert list(read_bundle(opened.path).manifest.engines) == [built.info.name]


def test_an_engine_has_one_name_however_its_plugins_are_asked_for(tmp_path: Path) -> None:
    opened = bundle_of("window", tmp_path / "bundle", max_batch=1)
    with kernels_compiled():
        built = [
            built_plans(opened.path, compute_capability="8.9", plugins=asked).folder
            for asked in (None, "all", "PackedRollingAttention")
        ]
    assert len(set(built)) == 1
    assert list(read_bundle(opened.path).manifest.engines) == [built[0].name]
