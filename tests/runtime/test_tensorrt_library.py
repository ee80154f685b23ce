"""From `load` to the library and back: everything but the library and the GPU themselves (tests/support)."""

from __future__ import annotations

import gc
import hashlib
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime import BackendError, BundleError, Session, load
from runtime.bundle import read_bundle
from runtime.engine_info import DECODE, PREFILL, EngineInfo, PlanInfo, engine_to_json
from runtime.tensorrt import engine_choice
from runtime.tensorrt.engine_choice import BuiltEngine
from runtime.tensorrt.library_plan import Library as LoadedLibrary
from tests.support.engine_doubles import engine_info, unbound, unbound_toy
from tests.support.gpu_double import HostDevice
from tests.support.library_double import Engine, Library
from tests.support.toy_bundle import ToyModel, write_manifest, write_toy_bundle

MODEL = ToyModel(windows=(4, 6), chunk=3, seed=3)
REFITTED = ("embed", "0.q")


@dataclass
class Case:
    """A bundle with an engine, and what is installed."""

    folder: Path
    device: HostDevice
    library: Library
    info: EngineInfo

    def load(self, **options: Any) -> Session:
        return load(self.folder, backend="tensorrt", **options)


def write_engine(folder: Path, info: EngineInfo, plan: bytes) -> EngineInfo:
    """Write an engine into a bundle, with the same content in both plans."""
    place = folder / "engines" / info.name
    place.mkdir(parents=True, exist_ok=True)
    plans = {}
    for kind in (PREFILL, DECODE):
        file = f"{kind}.plan"
        (place / file).write_bytes(plan)
        plans[kind] = PlanInfo(file, len(plan), hashlib.sha256(plan).hexdigest(), info.plans[kind].profiles)
    info = replace(info, plans=plans)
    content = json.dumps(engine_to_json(info)).encode()
    (place / "engine.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["engines"] = manifest.get("engines", {}) | {info.name: entry}
    write_manifest(folder, manifest)
    return info


@pytest.fixture(params=[False, True], ids=["plain", "caching"])
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    folder = write_toy_bundle(tmp_path / "bundle", MODEL)
    model, weights = unbound_toy(folder, REFITTED)
    info = write_engine(folder, engine_info(read_bundle(folder), plugins=(), tensors=weights), model)
    device = HostDevice()
    profiles = {kind: plan.profiles for kind, plan in info.plans.items()}
    library = Library(device, profiles, refittable=REFITTED, caches=request.param)
    monkeypatch.setattr("runtime.tensorrt.cuda_device.open_device", lambda: device)
    monkeypatch.setattr(engine_choice.choose_engine, "__kwdefaults__", {"load": lambda name: library.flavor()})
    monkeypatch.setenv("CIERZO_CACHE", str(tmp_path / "cache"))
    return Case(folder, device, library, info)


def tokens(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(count).integers(0, MODEL.vocab_size, count)]


def test_a_session_computes_what_its_plans_do(case: Case) -> None:
    ours, other = case.load(), unbound(case.folder, REFITTED).session
    for feed in (tokens(11), tokens(1), tokens(1), tokens(1), tokens(4)):
        assert np.array_equal(ours.forward(feed), other.forward(feed))
    ours.reset()
    prompts = [tokens(5), tokens(9), tokens(2)]
    assert ours.generate_batch(prompts, max_new_tokens=9) == [MODEL.greedy(prompt, 9) for prompt in prompts]


def test_it_can_be_named_and_shows_its_progress(case: Case) -> None:
    seen: list[tuple[str, int, int]] = []
    case.load(engine="double", progress=lambda *report: seen.append(report))
    total = sum(4 * array.size for name, array in MODEL.weights.items() if name not in REFITTED)
    assert seen[-1] == ("weights to the GPU", total, total)
    with pytest.raises(BackendError, match="no engine 'other'"):
        case.load(engine="other")


def test_contexts_are_opened_for_the_profiles_that_are_needed(case: Case) -> None:
    session = case.load()
    session.forward(tokens(4))
    session.reset()
    session.forward([[1], [2]])
    session.forward([[1], [2]])
    prefill, decode = session._engine._contexts, case.library.engines  # type: ignore[attr-defined]
    assert sorted(prefill) == [("decode", 0), ("decode", 1), ("prefill", 0)]
    assert len(decode) == 2


def test_what_was_compiled_is_kept_for_the_next_time(case: Case, tmp_path: Path) -> None:
    case.load().forward(tokens(4))
    files = sorted((tmp_path / "cache").rglob("*.cache"))
    if not hasattr(case.library, "IRuntimeCache"):
        assert files == []
        return
    assert {file.read_bytes() for file in files} == {b"compiled"}
    case.library.given_caches.clear()
    case.library.compiled = b"compiled more"
    case.load().forward(tokens(4))
    assert case.library.given_caches[0] == b"compiled"
    assert b"compiled more" in {file.read_bytes() for file in sorted((tmp_path / "cache").rglob("*.cache"))}


def test_a_cache_that_cannot_be_kept_is_no_error(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CIERZO_CACHE", str(tmp_path / "file"))
    assert case.load().forward(tokens(4)).shape == (1, 4, MODEL.vocab_size)


def test_a_plan_that_does_not_load_says_why(case: Case) -> None:
    case.library.says = ["Serialization failed:\n  wrong magic tag", "and more"]
    words = r"tensorrt 11\.0\.0 could not load .*prefill\.plan: Serialization failed: wrong magic tag and more$"
    with pytest.raises(BackendError, match=words):
        case.load()


def test_a_context_that_cannot_be_made_says_so(case: Case) -> None:
    session = case.load()
    case.library.says = ["out of memory"]
    with pytest.raises(BackendError, match=r"could not open an engine: out of memory"):
        session.forward([1])


def test_what_the_bindings_raise_is_told_and_holds_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def ill(engine: Engine, how: Any) -> None:
        raise RuntimeError("an ill mood")

    monkeypatch.setattr(Engine, "create_execution_context", ill)
    session = case.load()
    with pytest.raises(BackendError, match=r"could not open an engine: an ill mood$"):
        session.forward([1])
    gone: list[str] = []
    weakref.finalize(session._engine, gone.append, "engine")
    gc.disable()
    try:
        del session
        assert gone == ["engine"], "it went without a collection of cycles"
    finally:
        gc.enable()


@pytest.mark.parametrize("feed", [[1], [1, 2]], ids=["decode", "prefill"])
def test_a_step_that_fails_says_why_and_a_reset_mends_it(case: Case, feed: Sequence[int]) -> None:
    session = case.load()
    before = session.forward(feed)
    session.reset()
    case.library.when_running = ["an illegal step"]
    with pytest.raises(BackendError, match="could not run a step: an illegal step"):
        session.forward(feed)
    session.reset()
    assert np.array_equal(session.forward(feed), before)


def test_a_step_that_fails_while_it_is_captured_runs_without_a_graph(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, other = case.load(), unbound(case.folder, REFITTED).session
    begin = HostDevice.begin_capture

    def with_trouble(device: HostDevice) -> None:
        begin(device)
        if device is case.device:
            case.library.when_running = ["cannot be captured"]

    monkeypatch.setattr(HostDevice, "begin_capture", with_trouble)
    for token in range(6):
        assert np.array_equal(session.forward([token]), other.forward([token]))
    (note,) = session.notes
    assert note.endswith("could not run a step: cannot be captured")
    assert "graph" not in case.device.log


def test_weights_that_cannot_be_filled_in(case: Case) -> None:
    case.library.refittable = (*REFITTED, "1.q")
    with pytest.raises(BundleError, match=r"inputs of the plan .* differ in 1\.q"):
        case.load()
    case.library.refittable = REFITTED[:1]
    with pytest.raises(BundleError, match=r"inputs of the plan .* differ in 0\.q"):
        case.load()


def test_a_plugin_that_is_not_there_is_an_error_of_its_own(case: Case) -> None:
    built = BuiltEngine(case.folder, replace(case.info, plugins=("RollingAttention", "Abacus")), case.library.flavor())
    with pytest.raises(BackendError, match="needs the plugin Abacus, and this Cierzo has only RollingAttention,"):
        LoadedLibrary(built, case.device)


def test_plugins_are_registered_before_anything_is_loaded_and_asked_what_failed(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    failures = iter([None, "RollingAttention of node 'a' has no kernel."])

    def raise_failure() -> None:
        if (said := next(failures)) is not None:
            raise BackendError(said)

    def register(flavor: Any, names: Any) -> Any:
        seen.append((flavor.name, tuple(names), len(case.library.engines)))
        return SimpleNamespace(raise_failure=raise_failure)

    monkeypatch.setattr("runtime.tensorrt_plugins.register", register)
    monkeypatch.setattr("runtime.tensorrt_plugins.deregister", lambda registration: seen.append("gone"))
    built = BuiltEngine(case.folder, replace(case.info, plugins=("RollingAttention",)), case.library.flavor())
    library = LoadedLibrary(built, case.device)
    plan = library.load(case.folder / "engines/double/prefill.plan", "0" * 64)
    with pytest.raises(BackendError, match="has no kernel"):
        library.checked("do anything", lambda: True)
    assert seen == [("tensorrt", ("RollingAttention",), 0)]
    del library, plan
    assert seen[1:] == ["gone"]


@pytest.mark.parametrize("kind, words", [("on_host", "host's memory"), ("packed", "order of the library's own")])
def test_where_and_how_tensors_lie_is_asked_of_the_library(
    case: Case, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    made = Engine.__init__

    def with_another(engine: Engine, *arguments: Any) -> None:
        made(engine, *arguments)
        getattr(engine, kind).add("start_positions")

    monkeypatch.setattr(Engine, "__init__", with_another)
    with pytest.raises(BackendError, match=f"start_positions in the plan prefill.plan .*{words}"):
        case.load()


def test_an_engine_goes_before_its_plugins_and_its_stream(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[Any] = []
    monkeypatch.setattr("runtime.tensorrt_plugins.register", lambda *_: SimpleNamespace(raise_failure=lambda: None))
    monkeypatch.setattr("runtime.tensorrt_plugins.deregister", lambda registration: gone.append("plugins"))
    for held in ("plan", "context"):
        gone.clear()
        built = BuiltEngine(case.folder, replace(case.info, plugins=("RollingAttention",)), case.library.flavor())
        library = LoadedLibrary(built, case.device)
        plan = library.load(case.folder / "engines/double/prefill.plan", "0" * 64)
        last: Any = plan if held == "plan" else plan.open(0, 256, 2000)
        if held == "context":
            weakref.finalize(last._context, gone.append, "context")
        weakref.finalize(case.library.engines.pop(), gone.append, "engine")
        del library, plan
        assert gone == []
        del last
        assert gone == [*(["context"] if held == "context" else []), "engine", "plugins"]
