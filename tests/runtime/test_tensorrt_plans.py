"""Plans that are not what the manifest and engine.json say of them are refused, each with its own sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from runtime import BackendError, BundleError
from runtime.engine_info import DECODE, PREFILL
from runtime.manifest import Manifest
from runtime.tensorrt.plans import PlanTensor, check_plan
from tests.support.engine_doubles import embedded
from tests.support.toy_bundle import ToyModel, write_toy_bundle

MODEL = ToyModel(windows=(4, 6), chunk=3, seed=3)


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
        (change("past.0.key", is_linear=False), BackendError, "in an order of the library's own"),
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
