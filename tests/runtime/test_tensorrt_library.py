"""From `load` to the library and back: everything but the library and the GPU themselves (tests/support)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime import BackendError, BundleError, Session, load
from runtime.bundle import read_bundle
from runtime.engine_info import DECODE, PREFILL, EngineInfo, PlanInfo, engine_to_json
from runtime.manifest import Manifest
from runtime.tensorrt import engine_choice
from runtime.tensorrt.engine_choice import BuiltEngine
from runtime.tensorrt.library_plan import Library as LoadedLibrary
from runtime.tensorrt.plans import PlanTensor, check_plan
from tests.support.engine_doubles import embedded, engine_info, unbound, unbound_toy
from tests.support.gpu_double import HostDevice
from tests.support.library_double import Library
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


# -- plans that are not what is said of them ---------------------------------------------------------------------------


@dataclass
class Described:
    """A Plan as far as it is checked."""

    tensors: dict[str, PlanTensor]
    profiles: int = 1


def change(name: str, **fields: Any) -> Callable[[Described], None]:
    def apply(plan: Described) -> None:
        plan.tensors[name] = replace(plan.tensors[name], **fields)

    return apply


def test_a_plan_that_is_as_described_passes(tmp_path: Path) -> None:
    doubled = embedded(write_toy_bundle(tmp_path, MODEL))
    for kind in (PREFILL, DECODE):
        check_plan(doubled.session.manifest, doubled.engine._info, kind, doubled.plans[kind])
    fixed = Described(dict(doubled.plans[PREFILL].tensors))  # where a range has one member, its extent is known
    change("input_ids", shape=(1, 1))(fixed)
    check_plan(doubled.session.manifest, doubled.engine._info, PREFILL, fixed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (lambda plan: setattr(plan, "profiles", 2), BundleError, "has 2 profiles and not 1"),
        (lambda plan: plan.tensors.pop("past.1.key"), BundleError, r"inputs of .* differ in past\.1\.key"),
        (lambda plan: plan.tensors.pop("present.0.key"), BundleError, r"outputs of .* differ in present\.0\.key"),
        (lambda plan: plan.tensors.update(more=PlanTensor("F32", (1,), True)), BundleError, "differ in more"),
        (change("past.0.value", dtype="F16"), BundleError, r"past\.0\.value in .* is F16 .* describe F32"),
        (change("past.0.value", shape=(-1, 2, 7, 3)), BundleError, r"\[-1, 2, 7, 3\].* describe F32 \[-1, 2, 6, 3\]"),
        (change("present.1.key", shape=(-1, 2, 8)), BundleError, r"\[-1, 2, 8\].* describe F32 \[-1, 2, 8, 3\]"),
        (change("logits", shape=(-1, -1, 38)), BundleError, "logits in"),
        (change("logits", dtype="BF16"), BundleError, "logits in .* is BF16"),
        (change("token_counts", dtype="I32"), BundleError, "token_counts in .* is I32"),
        (change("token_counts", on_device=False), BackendError, "must lie in the host's memory"),
    ],
)
def test_a_plan_that_is_not_is_refused(
    tmp_path: Path, damage: Callable[[Described], Any], error: type[Exception], words: str
) -> None:
    doubled = embedded(write_toy_bundle(tmp_path, MODEL))
    plan = Described(dict(doubled.plans[PREFILL].tensors))
    damage(plan)
    manifest: Manifest = doubled.session.manifest
    with pytest.raises(error, match=words):
        check_plan(manifest, doubled.engine._info, PREFILL, plan)  # type: ignore[arg-type]


def test_rings_of_a_type_that_nobody_knows(tmp_path: Path) -> None:
    doubled = embedded(write_toy_bundle(tmp_path, MODEL))
    info = replace(doubled.engine._info, kv="int3")
    with pytest.raises(BundleError, match="rings of the type 'int3'"):
        check_plan(doubled.session.manifest, info, PREFILL, doubled.plans[PREFILL])
