"""`cierzo bench`: what the report holds, that its parts add up, and what is refused. No time is held to anything."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from exporter.bench import run
from exporter.cli import cli
from runtime import load
from runtime.kernels import kernels, why_none
from tests.support.bundles import exported
from tests.support.toy_bundle import ToyModel, write_toy_bundle

TOY = ToyModel(windows=(4, 5), chunk=3, eos_token_ids=())
RATES = {"bandwidth": 1e9, "float_peak": 2e10, "int8_peak": 1e11}
OPTIONS = ("--threads", "1", "--decode-tokens", "3", "--prompt", "7")


class FixedLimits:
    """A machine with known limits, which takes no time to measure."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def measure(self, limit: str) -> float | None:
        return RATES[limit]


@pytest.fixture(autouse=True)
def fixed_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def limits(threads: int) -> Iterator[FixedLimits]:
        yield FixedLimits(threads)

    monkeypatch.setattr(run, "MachineLimits", limits)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "toy", TOY)


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


def report(*arguments: str | Path) -> dict[str, Any]:
    result = bench(*arguments, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def is_spread(value: dict[str, Any], samples: int) -> bool:
    return len(value["samples"]) == samples and 0 < value["least"] <= value["median"] <= value["most"]


def test_the_report_has_every_part(toy: Path) -> None:
    found = report(toy, *OPTIONS, "--rounds", "2")
    assert [at["context"] for at in found["contexts"]] == [5, 20, 128, 160], "128, W, 4 W and 32 W for W = 5"
    for at in found["contexts"]:
        assert at["prefill"]["tokens"] == at["context"]
        assert is_spread(at["prefill"]["seconds"], 2)
        assert is_spread(at["decode"]["tokens_per_second"], 2)
        assert at["decode"]["milliseconds"] > 0
    assert found["first_token"]["tokens"] == 7
    assert is_spread(found["first_token"]["seconds"], 2)
    assert is_spread(found["load_seconds"], 2)
    assert found["limits"]["read_bandwidth"]["samples"] == [1e9, 1e9]
    assert found["memory"]["kv_bytes"] == load(toy, threads=1).kv_bytes
    assert 0 < found["memory"]["before"] <= found["memory"]["peak"]
    assert found["machine"]["versions"]["onnxruntime"]
    assert found["model"]["windows"] == [4, 5]
    assert found["options"]["threads"] == 1
    assert found["left_out"] == []
    assert found["profile"] == {}
    active = kernels()
    assert found["kernels"] == {"isa": active.isa if active else None, "ops": [], "reason": why_none()}


def test_rates_and_shares_follow_from_the_seconds_and_the_limits(toy: Path) -> None:
    found = report(toy, *OPTIONS, "--rounds", "1", "--contexts", "11", "--batch", "2")
    sizes = [array.size for name, array in TOY.weights.items() if name != "embed"]
    head = TOY.weights["lm_head"].size
    step = found["step"]
    assert step["weight_bytes"] == 4 * sum(sizes) == sum(read["bytes"] for read in step["reads"])
    assert step["float_operations"] == 2 * (sum(sizes) - head)
    assert step["logit_operations"] == 2 * head
    assert step["int8_operations"] == 0
    (at,) = found["contexts"]
    prefill, decode = at["prefill"], at["decode"]
    assert prefill["tokens_per_second"] == pytest.approx(2 * 11 / prefill["seconds"]["median"])
    operations = 2 * 11 * step["float_operations"] + 2 * step["logit_operations"]
    assert prefill["share_of_matmul_peak"] == pytest.approx(operations / 2e10 / prefill["seconds"]["median"])
    steps_per_second = decode["tokens_per_second"]["median"] / 2
    assert decode["share_of_read_bandwidth"] == pytest.approx(step["weight_bytes"] * steps_per_second / 1e9)


def test_the_parts_of_a_profile_add_up_and_name_the_plugin_ops() -> None:
    bundle = exported(architecture="mixtral", window=5).bundle
    assert bool(kernels()) == bool(load(bundle, threads=1).kernels)
    found = report(bundle, *OPTIONS, "--rounds", "1", "--contexts", "2w", "--profile")
    assert set(found["profile"]) == {"decode", "prefill"}
    for profile in found["profile"].values():
        rows = profile["rows"]
        total = sum(row["milliseconds"] for row in rows) + profile["between_milliseconds"]
        assert math.isclose(total, profile["milliseconds"], rel_tol=1e-9)
        assert all(math.isclose(row["share"], row["milliseconds"] / profile["milliseconds"]) for row in rows)
        assert len({(row["op"], row["kind"]) for row in rows}) == len(rows)
        assert {row["op"] for row in rows if row["kind"] == "kernel"} == set(found["kernels"]["ops"])
    assert found["profile"]["decode"]["tokens"] == 1
    assert found["profile"]["prefill"]["tokens"] == 4, "the chunk"


def test_a_model_without_a_window_is_measured_up_to_its_context(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "full", ToyModel(windows=(None,), context=40, chunk=3))
    found = report(bundle, *OPTIONS, "--rounds", "2")
    assert [at["context"] for at in found["contexts"]] == [10, 37]
    assert report(bundle, *OPTIONS, "--rounds", "1", "--profile")["profile"]["decode"]["context"] <= 37


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "full", ToyModel(windows=(None,), context=40, chunk=3))
    arguments = (bundle, *OPTIONS[:4], "--rounds", "1", "--contexts", "8,38", "--prompt", "40")
    found = report(*arguments)
    assert [at["context"] for at in found["contexts"]] == [8]
    assert found["first_token"] is None
    assert [item["what"] for item in found["left_out"]] == ["first token", "context 38"]
    text = bench(*arguments).stdout
    assert "Left out: first token. A prompt of 40 tokens leaves no room for another in 40 positions." in text
    assert "Left out: context 38. 38 tokens and 3 to decode are more than the 40 positions" in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--contexts", "many"), "'many' is no context length."),
        (("--contexts", "8,,9"), "'' is no context length."),
        (("--contexts", "0"), "'0' is no context length."),
        (("--contexts", "20000000"), "There is no context to measure at: 20,000,000 tokens and 3 to decode"),
        (("--batch", "5"), "The bundle was exported for at most 4 rows, so 5 cannot be measured."),
        (("--backend", "abacus"), "There is no backend 'abacus'."),
        (("--engine", "one"), "The backend onnxruntime runs a bundle's graph as it is, not an engine"),
    ],
)
def test_refusals_are_one_paragraph(toy: Path, arguments: tuple[str, ...], words: str) -> None:
    result = bench(toy, *OPTIONS[:4], "--rounds", "1", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"cierzo: {words}")


def test_windows_as_a_unit_need_a_window(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "full", ToyModel(windows=(None,), context=40, chunk=3))
    result = bench(bundle, "--contexts", "4w")
    assert result.exit_code == 2
    assert "'4w' is a number of windows, but no layer of this model has one." in result.stderr


def test_tables_fit_a_page_and_show_every_part(toy: Path) -> None:
    result = bench(toy, *OPTIONS, "--rounds", "1", "--contexts", "1w,4w", "--profile")
    assert result.exit_code == 0, result.output
    assert result.stderr == "", "no progress bar where nobody sees it"
    for title in ("The machine's limits on 1 thread", "Speed", "Memory", "Read by a decode step", "First token"):
        assert title in result.stdout
    for phase in ("decode, 1 token after", "prefill, 3 tokens after"):
        assert f"Where the time goes: {phase}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_what_only_the_report_needs_does_not_count_as_the_engine_s_memory() -> None:
    heavy = ("onnx", "onnx_ir", "torch", "rich")
    code = f"import sys, exporter.bench.run; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_install_that_cannot_read_graphs_says_so_at_once(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx_ir" else find(name))
    result = bench(toy, *OPTIONS)
    assert result.exit_code == 2
    assert "this command needs the Python package onnx_ir" in result.stderr
