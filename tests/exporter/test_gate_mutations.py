"""The gate on whole bundles: every fault of the mutation suite is caught, and no right bundle is ever refused.

The faults are those that the passes' proofs must kill; here they are planted in finished bundles, as if there were no
proofs. A bundle counts as caught when its validation fails, or when it cannot even be run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.torch import load_file, save_file

from exporter.compile import export
from exporter.validate import validate
from runtime.errors import CierzoError
from tests.graph_passes import faults
from tests.graph_passes.layer_faults import LAYER_FAULTS, LAYER_PLACES
from tests.support.bundles import Exported, exported, shared_traces
from tests.support.checkpoints import make_checkpoint
from tests.support.pass_faults import planted_pass
from tests.support.planted import planted
from tests.support.planted_ops import plant

FAULTS = faults.FAULTS | LAYER_FAULTS
PLACES = faults.PLACES | LAYER_PLACES

MODELS: dict[str, dict[str, Any]] = {
    "window": {"window": 5},
    "no window": {"window": None, "context": 24},
    "window 1": {"window": 1},
    "mixture": {"architecture": "mixtral", "window": 5},
}
MODEL_OF = {
    "no window": "no window",
    "layer without window": "no window",
    "window 1": "window 1",
    "gate": "mixture",
    "gate, top-k first": "mixture",
    "experts": "mixture",
    "padding is written": "no window",
    "one padding token is written": "no window",
    "padding of the layer is written": "no window",
}
"""By the place of a fault, or by the fault; others are planted in the first model.

A ring of a window and a chunk more has room for the padding of a step, where nobody sees it. The buffer of a layer that
sees everything has not, at the end of the context.
"""


def faint(tensors: dict[str, Any]) -> None:
    """Hidden states so small that the epsilon of a norm outweighs them."""
    for name in tensors:
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            tensors[name] *= 1e-3


def tied(tensors: dict[str, Any]) -> None:
    """Routers that find all experts equal."""
    for name in tensors:
        if name.endswith(".gate.weight"):
            tensors[name][:] = tensors[name][0]


ABSORBED = {"heads grouped round robin", "no mask", "mask upside down", "soft-capped scores"}
"""Faults in the function body of an op that no bundle holds, since a later fusion has a body of its own for all of it:
the bundle computes the same, node for node."""

SPECIAL: dict[str, Callable[[dict[str, Any]], None]] = {
    "epsilon of another model": faint,
    "epsilon a thousandth larger": faint,
    "epsilon outside the root": faint,
    "weight moved away from one": faint,
    "ties go to the higher expert": tied,
}
"""Faults that a model of ordinary numbers does not show."""


def computation(bundle: Path) -> list[bytes]:
    """The nodes of a bundle's graph, without what is written beside them for a reader, and its function bodies."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        del node.metadata_props[:]
    return [part.SerializeToString(deterministic=True) for part in (*model.graph.node, *model.functions)]


@pytest.fixture(scope="module")
def altered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[dict[str, Any]], None]], Exported]:
    made: dict[str, Exported] = {}

    def make(model: str, change: Callable[[dict[str, Any]], None]) -> Exported:
        key = f"{model}, {change.__name__}"
        if key not in made:
            folder = tmp_path_factory.mktemp("altered")
            source = make_checkpoint(folder / "checkpoint", **MODELS[model])
            tensors = load_file(source / "model.safetensors")
            change(tensors)
            save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
            with shared_traces():
                made[key] = Exported(source, export(source, folder / "bundle", chunk=4))
        return made[key]

    return make


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_bundle_is_caught(
    fault: str,
    altered: Callable[[str, Callable[[dict[str, Any]], None]], Exported],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setenv("CIERZO_KERNELS", "off")  # native kernels do not read the bodies that are changed here
    place, change = FAULTS[fault]
    model = MODEL_OF.get(fault) or MODEL_OF.get(place, "window")
    case = altered(model, SPECIAL[fault]) if fault in SPECIAL else exported(**MODELS[model])
    rule = PLACES[place].rules[-1]
    here: list[bool] = []

    def wrong(graph: onnx.ModelProto) -> None:
        here.append(plant(graph, rule.op.name, change))

    bundle = planted(case.bundle, tmp_path / "wrong", wrong)
    if here == [False]:  # a later fusion has taken the node in, body and all, so the pass itself is made to err
        with planted_pass(rule.name, change), shared_traces():
            try:
                bundle = export(case.checkpoint, tmp_path / "misled", chunk=4, max_batch=4, prove=False)
            except CierzoError as error:
                record_property("gate", (fault, str(error)))
                return
        if computation(bundle) == computation(case.bundle):
            assert fault in ABSORBED
            return
        assert fault not in ABSORBED
    try:
        report = validate(bundle, case.checkpoint)
    except CierzoError as error:
        record_property("gate", (fault, str(error)))
        return
    record_property("gate", (fault, report.largest_error / report.budget))
    assert not report.passed, f"{fault}: largest error {report.largest_error / report.budget:.2f} of the budget"
