"""Faults that show only in some rows of a batch, at some widths, at some ids, or where a head gives one token each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from exporter.gate import checks_batches
from exporter.gate.plan import random_tokens
from exporter.validate import validate
from exporter.validation_report import QUICK, ValidationReport
from runtime.bundle import read_bundle
from runtime.errors import CheckpointError
from tests.support.bundles import Exported, exported
from tests.support.engine_doubles import embedded
from tests.support.planted import planted
from tests.support.top_engine import open_top

Change = Callable[[onnx.ModelProto], None]


def failed(report: ValidationReport) -> list[str]:
    return [check.name for check in report.checks if check.passed is False]


def constant(model: onnx.ModelProto, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def put_before(model: onnx.ModelProto, value: str, other: str, nodes: list[onnx.NodeProto]) -> None:
    """Whoever read the graph's input `value` reads `other`, which the nodes make of it."""
    for node in model.graph.node:
        node.input[:] = [other if name == value else name for name in node.input]
    for number, node in enumerate(nodes):
        model.graph.node.insert(number, node)


def one_head(model: onnx.ModelProto) -> None:
    """The head reads the first row's tokens in every row: as long as all are asked for, these are the same."""
    first = constant(model, "planted.first", np.array([0]))
    put_before(
        model,
        "logit_positions",
        "planted.positions",
        [helper.make_node("Gather", ["logit_positions", first], ["planted.positions"], axis=0)],
    )


def last_id(model: onnx.ModelProto) -> None:
    """The vocabulary's last id is taken for the one before it."""
    most = constant(model, "planted.most", np.array(62))
    put_before(model, "input_ids", "planted.ids", [helper.make_node("Min", ["input_ids", most], ["planted.ids"])])


def positions_from(row: int) -> Change:
    """From this row on, every step begins at position 0."""

    def change(model: onnx.ModelProto) -> None:
        zero, one, limit = (constant(model, f"planted.{n}", np.array(n)) for n in (0, 1, row + 100))
        base = constant(model, "planted.100", np.array(100))
        put_before(
            model,
            "start_positions",
            "planted.starts",
            [
                helper.make_node("Size", ["start_positions"], ["planted.rows"]),
                helper.make_node("Range", [zero, "planted.rows", one], ["planted.row"]),
                helper.make_node("Add", ["planted.row", base], ["planted.numbered"]),
                helper.make_node("Less", ["planted.numbered", limit], ["planted.right"]),
                helper.make_node("Where", ["planted.right", "start_positions", zero], ["planted.starts"]),
            ],
        )

    return change


def steps_of(width: int) -> Change:
    """Steps of so many tokens give logits that are a hundredth larger."""

    def change(model: onnx.ModelProto) -> None:
        (last,) = [node for node in model.graph.node if "logits" in node.output]
        last.output[0] = "planted.logits"
        width_name = constant(model, "planted.width", np.array([width]))
        one, more = (constant(model, f"planted.{n}", np.float32(n)) for n in (1, 1.01))
        model.graph.node.extend(
            [
                helper.make_node("Shape", ["input_ids"], ["planted.shape"], start=1),
                helper.make_node("Equal", ["planted.shape", width_name], ["planted.here"]),
                helper.make_node("Where", ["planted.here", more, one], ["planted.factor"]),
                helper.make_node("Mul", ["planted.logits", "planted.factor"], ["logits"]),
            ]
        )

    return change


@pytest.mark.parametrize("max_batch", [2, 4])
def test_a_head_that_reads_another_row(max_batch: int, tmp_path: Path) -> None:
    case = exported(max_batch=max_batch)
    report = validate(planted(case.bundle, tmp_path / "wrong", one_head), case.checkpoint, suite=QUICK)
    assert failed(report) == ["ragged batch, last tokens"]
    (check,) = [check for check in report.checks if check.passed is False]
    assert check.detail.endswith("over budget in row 1" if max_batch == 2 else "over budget in row 1, 2")


@pytest.mark.parametrize(("row", "max_batch"), [(1, 2), (3, 4)])
def test_the_last_of_all_rows(row: int, max_batch: int, tmp_path: Path) -> None:
    case = exported(max_batch=max_batch)
    report = validate(planted(case.bundle, tmp_path / "wrong", positions_from(row)), case.checkpoint, suite=QUICK)
    assert failed(report) == (["all rows"] if row == 3 else ["ragged batch, row 1", "ragged batch, last tokens"])


def test_rows_whose_buffers_are_too_large_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_batches, "MOST_BATCH_BYTES", 1000)
    report = validate(exported().bundle, suite=QUICK)
    (check,) = [check for check in report.checks if check.name == "all rows"]
    assert check.passed is None
    assert check.detail.startswith("the KV buffers of 4 rows would take 0.0 GB")


@pytest.mark.parametrize("width", [1, 3, 7, 12, 16])
def test_every_width_of_a_step_is_fed(width: int, tmp_path: Path) -> None:
    case = exported(chunk=16)
    report = validate(planted(case.bundle, tmp_path / "wrong", steps_of(width)), case.checkpoint)
    assert any(name.startswith("uneven pieces") for name in failed(report))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_last_id_of_the_vocabulary(seed: int, tmp_path: Path) -> None:
    case = exported()
    report = validate(planted(case.bundle, tmp_path / "wrong", last_id), case.checkpoint, suite=QUICK, seed=seed)
    assert "one at a time" in failed(report) or "last tokens" in failed(report)
    assert not report.passed


@pytest.mark.parametrize(("vocabulary", "count"), [(1, 4), (3, 1), (5, 40), (32000, 24)])
def test_tokens_are_spread_over_the_vocabulary(vocabulary: int, count: int) -> None:
    ids = random_tokens(np.random.default_rng(1), vocabulary, count)
    assert ids.shape == (count,)
    assert ids.dtype == np.int64
    assert (ids.min() >= 0, ids.max()) == (True, vocabulary - 1)
    if count > 1:
        assert ids.min() == 0
    if count > 2:
        assert np.diff(np.sort(ids)).max(initial=0) <= 2 * vocabulary / count + 1


@pytest.fixture(scope="module")
def plain() -> Exported:
    return exported(options={"copy": True})


def test_the_engine_that_ran_is_named(plain: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    here = validate(exported().bundle, suite=QUICK)
    assert (here.engine, here.device) == (None, "cpu")
    monkeypatch.setattr("exporter.gate.run.load", lambda *_, **__: embedded(plain.bundle).session)
    report = validate(plain.bundle, plain.checkpoint, suite=QUICK, backend="tensorrt")
    assert (report.engine, report.device) == ("double", "a double")


@pytest.mark.parametrize("wrong", [False, True])
def test_the_highest_logits_of_several_rows(plain: Exported, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong engine gives every row the highest logits of the first one."""
    session, engine = open_top(read_bundle(plain.bundle), 5)
    kind = type(engine.top)
    honest = kind.step

    def step(*inputs: Any, **options: Any) -> Any:
        found = honest(*inputs, **options)
        found.ids_BRK[1:] = found.ids_BRK[:1]
        return found

    if wrong:
        monkeypatch.setattr(kind, "step", step)
    monkeypatch.setattr("exporter.gate.run.load", lambda *_, **__: session)
    report = validate(plain.bundle, plain.checkpoint, suite=QUICK, backend="tensorrt")
    named = {check.name: check.passed for check in report.checks}
    assert named["highest logits"]
    assert named["highest logits, batch"] is not wrong


def test_a_manifest_that_lets_texts_be_longer(tmp_path: Path) -> None:
    case = exported(rope={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=20)
    assert validate(case.bundle).passed, "also where a text can hardly be continued"
    wrong = planted(case.bundle, tmp_path / "wrong", lambda _: None)
    text = (wrong / "manifest.json").read_text()
    assert '"position_limit": 20' in text
    (wrong / "manifest.json").write_text(text.replace('"position_limit": 20', '"position_limit": null'))
    with pytest.raises(CheckpointError, match=r"have any length, .* for 20 tokens"):
        validate(wrong, case.checkpoint)
