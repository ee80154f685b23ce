"""Weights out of a bundle's files: on the GPU, in the plans, and refused where they do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.bundle_graph import load_graph
from exporter.compile import export
from exporter.recipes import parameters, value_of
from runtime import BackendError, BundleError
from runtime.bundle import Bundle, read_bundle
from runtime.engine_info import INPUT, REFIT, EngineWeight
from runtime.engine_weights import LOADING, nbytes_of
from runtime.tensorrt import weights as module
from runtime.tensorrt.weights import refit, upload_weights
from runtime.weight_expression import Signed, Stored
from tests.support.bundles import Exported, checkpoint, exported, shared_traces
from tests.support.engine_doubles import Doubled, engine_info, weightless, with_tensors
from tests.support.gpu_double import HostDevice
from tests.support.native import as_native
from tests.support.parity import Judge, random_rows
from tests.support.plan_double import PlanDouble, RefitterDouble
from tests.support.toy_bundle import write_toy_bundle

MISTRAL: dict[str, Any] = {"dtype": "bfloat16"}
MIXTRAL: dict[str, Any] = {"dtype": "bfloat16", "architecture": "mixtral"}
QUANTIZED = {"block_size": 16, "keep": ("lm_head",)}
NUMPY: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8}


def whole(bundle: Bundle, name: str) -> NDArray[Any]:
    """What the graph of the bundle has under the name of an engine's weight: "a.q_proj+k_proj.weight" has two."""
    found = parameters(load_graph(bundle))
    head, _, last = name.rpartition("+")
    if not head:
        return value_of(found[name])
    suffix = last[last.index(".") :]
    before, _, joined = f"{head}+{last.removesuffix(suffix)}".rpartition(".")
    return np.concatenate([value_of(found[f"{before}.{part}{suffix}"]) for part in joined.split("+")])


def on_the_gpu(doubled: Doubled, weight: EngineWeight) -> bytes:
    """What the engine's memory holds of a weight."""
    address = doubled.engine._weights.addresses[weight.name]
    return doubled.device.view(address, nbytes_of(weight.dtype, weight.shape)).tobytes()


def in_the_plans(doubled: Doubled, weight: EngineWeight) -> bytes:
    (content,) = {plan.filled[weight.name] for plan in doubled.plans.values()}
    return content


def expected(bundle: Bundle, weight: EngineWeight) -> bytes:
    array = whole(bundle, weight.name)
    if weight.dtype == "I8":
        return (array.astype(np.int16) - 128).astype(np.int8).tobytes()
    if weight.dtype == "I4":
        low, high = ((array >> shift & 15).astype(np.int16) - 8 for shift in (0, 4))
        return ((low & 15) | (high & 15) << 4).astype(np.uint8).tobytes()
    return array.astype(np.float32).astype(NUMPY[weight.dtype]).tobytes()


def assert_whole(doubled: Doubled) -> None:
    """Every weight is where its role says, and what the bundle's graph makes of its files."""
    bundle, tensors = doubled.session.bundle, doubled.engine._info.tensors
    assert tensors
    for weight in tensors:
        found = on_the_gpu(doubled, weight) if weight.role == INPUT else in_the_plans(doubled, weight)
        assert found == expected(bundle, weight), weight.name


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model", [MISTRAL, MIXTRAL], ids=["mistral", "mixtral"])
def test_every_weight_is_what_the_graph_makes_of_the_files(model: dict[str, Any], arithmetic: str) -> None:
    assert_whole(weightless(exported(**model).bundle, arithmetic=arithmetic))


@pytest.mark.parametrize("model", [MISTRAL, MIXTRAL], ids=["mistral", "mixtral"])
def test_a_session_holds_the_reference_and_generates_the_same_ids(model: dict[str, Any]) -> None:
    case = exported(**model)
    doubled, judge = weightless(case.bundle), Judge(case)
    rows = random_rows([19, 7, 5], judge.vocab_size, 3)
    judge.hold(doubled.session, rows, 1)
    doubled.session.reset()
    ids = [session.generate_batch(rows, max_new_tokens=6, stop_ids=[]) for session in (doubled.session, case.session())]
    assert ids[0] == ids[1]


def test_rows_of_a_native_checkpoint_change_places(tmp_path: Path) -> None:
    with shared_traces():
        native = as_native(checkpoint(**MISTRAL), tmp_path / "native", shards=2)
        bundle = export(native, tmp_path / "bundle", chunk=4, prove=False)
    doubled = weightless(bundle, arithmetic="bfloat16")
    assert doubled.engine._info.orders
    assert_whole(doubled)


@pytest.mark.parametrize("model", [MISTRAL, MIXTRAL], ids=["mistral", "mixtral"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_quantised_weights(kind: str, model: dict[str, Any]) -> None:
    case = exported(**model, options={"weights": kind, **QUANTIZED})
    doubled = weightless(case.bundle, arithmetic="float16")
    roles = {weight.role for weight in doubled.engine._info.tensors}
    assert roles == ({INPUT, REFIT} if kind == "int4" else {INPUT})
    assert_whole(doubled)


def test_a_session_with_weights_filled_into_both_plans_holds_the_reference() -> None:
    case: Exported = exported(**MISTRAL, options={"weights": "int4", **QUANTIZED})
    judge = Judge(case, arithmetic="float16")
    judge.hold(weightless(case.bundle, arithmetic="float16").session, random_rows([19, 7], judge.vocab_size, 3), 1)


# -- a toy, where weights can be of any kind ---------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(write_toy_bundle(tmp_path / "toy"))


def stored(nbytes: int, *, offset: int = 0, role: str = INPUT, name: str = "w") -> EngineWeight:
    return EngineWeight(name, "U8", (nbytes,), role, Stored("weights.bin", offset, "U8", (nbytes,)))


def content(bundle: Bundle) -> bytes:
    return (bundle.path / "weights.bin").read_bytes()


def test_pieces_larger_than_the_staging_buffer_stream_through_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STAGING_BYTES", 100)
    lengths = [1000, 1, 99, 100, 101, 300, 7]
    weights = [stored(n, offset=13 * i, name=f"w{i}") for i, n in enumerate(lengths)]
    seen: list[tuple[str, int, int]] = []
    device = HostDevice()
    made = upload_weights(bundle, engine_info(bundle, tensors=weights), device, lambda *report: seen.append(report))
    for i, n in enumerate(lengths):
        assert made.addresses[f"w{i}"] % 256 == 0
        assert device.view(made.addresses[f"w{i}"], n).tobytes() == content(bundle)[13 * i : 13 * i + n]
    assert made.nbytes == sum(lengths)
    assert {stage for stage, _, _ in seen} == {LOADING}
    assert {total for _, _, total in seen} == {sum(lengths)}
    done = [count for _, count, _ in seen]
    assert done == sorted(done)
    assert done[-1] == sum(lengths)
    assert len(done) > sum(lengths) / 100


def test_an_engine_without_weights_of_its_own_loads_none(bundle: Bundle) -> None:
    made = upload_weights(bundle, engine_info(bundle), HostDevice(), None)
    assert (made.addresses, made.nbytes) == ({}, 0)


def test_weights_that_the_gpu_has_no_memory_for(bundle: Bundle) -> None:
    info = engine_info(bundle, tensors=[stored(1000)])
    with pytest.raises(BackendError, match="too little memory for the weights of the engine double"):
        upload_weights(bundle, info, HostDevice(capacity=900), None)


PACKED = Stored("weights.bin", 0, "U8", (8,))


@pytest.mark.parametrize(
    "weight, words",
    [
        (replace(stored(8), shape=(9,)), "takes 9 bytes, and what it is made of has 8"),
        (replace(stored(8), shape=(7,)), "takes 7 bytes, and what it is made of has more"),
        (EngineWeight("w", "I4", (8,), INPUT, Signed(PACKED, "I4")), "takes 4 bytes.*has more"),
        (replace(stored(8), dtype="F64"), "type 'F64'"),
        (replace(stored(8), expression=Stored("/etc/passwd", 0, "U8", (8,))), "'/etc/passwd', which is no file"),
        (replace(stored(8), expression=Stored("manifest.json", 0, "U8", (8,))), "is no file of the bundle"),
        (replace(stored(8), expression=Stored("weights.bin", 1 << 40, "U8", (8,))), "cannot be read"),
    ],
)
@pytest.mark.parametrize("role", [INPUT, REFIT])
def test_weights_that_do_not_fit_are_refused(bundle: Bundle, weight: EngineWeight, words: str, role: str) -> None:
    info = engine_info(bundle, tensors=[replace(weight, role=role)])
    load = (
        partial(upload_weights, bundle, info, HostDevice(), None) if role == INPUT else partial(refit, bundle, info, [])
    )
    with pytest.raises(BundleError, match=words):
        load()


class Refitter(RefitterDouble):
    """One that may refuse. has: the plan's weights."""

    def __init__(self, has: dict[str, tuple[str, int]], *, takes: bool = True, fills: bool = True) -> None:
        self.has, self.takes, self.fills, self.given = has, takes, fills, {}

    def prototype(self, name: str) -> tuple[str, int] | None:
        return self.has.get(name)

    def set(self, name: str, dtype: str, count: int, address: int) -> bool:
        return self.takes and super().set(name, dtype, count, address)

    def missing(self) -> Sequence[str]:
        return sorted(self.has.keys() - self.given.keys())

    def refit(self) -> bool:
        return self.fills


@pytest.mark.parametrize(
    "refitter, error, words",
    [
        (Refitter({}), BundleError, "has none of that name"),
        (Refitter({"w": ("U8", 7)}), BundleError, "has 7 numbers of U8"),
        (Refitter({"w": ("I8", 8)}), BundleError, "has 8 numbers of I8"),
        (Refitter({"w": ("U8", 8), "v": ("U8", 1)}), BackendError, "lacks 1 weights .* such as 'v'"),
        (Refitter({"w": ("U8", 8)}, takes=False), BackendError, "does not take the weight w"),
        (Refitter({"w": ("U8", 8)}, fills=False), BackendError, "could not be filled"),
    ],
)
def test_a_plan_that_is_not_filled_completely_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, refitter: Refitter, error: type[Exception], words: str
) -> None:
    plan = PlanDouble(HostDevice(), "prefill", str(bundle.path / "model.onnx"), ())
    monkeypatch.setattr(PlanDouble, "refitter", lambda self: refitter)
    with pytest.raises(error, match=words):
        refit(bundle, engine_info(bundle, tensors=[stored(8, role=REFIT)]), [plan])


def test_both_plans_are_filled(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    refitters = [Refitter({"w": ("U8", 8)}), Refitter({"w": ("U8", 8)})]
    left = iter(refitters)
    monkeypatch.setattr(PlanDouble, "refitter", lambda self: next(left))
    plan = PlanDouble(HostDevice(), "prefill", str(bundle.path / "model.onnx"), ())
    refit(bundle, with_tensors(engine_info(bundle), [stored(8, role=REFIT)]), [plan, plan])
    assert [refitter.given for refitter in refitters] == [{"w": content(bundle)[:8]}] * 2
