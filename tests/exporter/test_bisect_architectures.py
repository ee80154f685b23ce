"""Faults in what other architectures add to a layer are located as all others are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

import exporter.bisect.stages
from exporter.bisect.search import bisect
from tests.support import bundles
from tests.support.bundles import exported
from tests.support.planted import planted, with_weights

QWEN3: dict[str, Any] = {"architecture": "qwen3", "attention_bias": True, "tie": True}
MINISTRAL3: dict[str, Any] = {"architecture": "ministral3"}


@pytest.fixture(autouse=True)
def shared_traces() -> Iterator[None]:
    with mock.patch.object(exporter.bisect.stages, "trace_template", bundles.trace_once), bundles.shared_traces():
        yield


@pytest.mark.parametrize("settings", [QWEN3, MINISTRAL3], ids=["qwen3", "ministral3"])
def test_an_intact_bundle_has_no_culprit(tmp_path: Path, settings: dict[str, Any]) -> None:
    case = exported(**settings)
    assert bisect(case.bundle, case.checkpoint, tmp_path / "out").culprit is None


@pytest.mark.parametrize("parameter", ["layers.1.self_attn.k_norm.weight", "layers.0.self_attn.v_proj.bias"])
def test_a_changed_weight_is_named(tmp_path: Path, parameter: str) -> None:
    case = exported(**QWEN3)
    changed = with_weights(case.bundle, tmp_path / "bundle", parameter, [3], 0.5)
    culprit = bisect(changed, case.checkpoint, tmp_path / "out").culprit
    assert culprit is not None
    assert culprit.weight == parameter


def test_a_changed_query_scaling_is_found(tmp_path: Path) -> None:
    """It is computed once, before the layers, for all of them."""

    def weaker(model: onnx.ModelProto) -> None:
        (log,) = [node for node in model.graph.node if node.op_type == "Log"]
        (scaled,) = [node for node in model.graph.node if log.output[0] in node.input]
        (beta,) = [init for init in model.graph.initializer if init.name in scaled.input]
        beta.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.2) * onnx.numpy_helper.to_array(beta), beta.name))

    case = exported(**MINISTRAL3)
    changed = planted(case.bundle, tmp_path / "bundle", weaker)
    culprit = bisect(changed, case.checkpoint, tmp_path / "out").culprit
    assert culprit is not None
    assert culprit.kind == "constant"
