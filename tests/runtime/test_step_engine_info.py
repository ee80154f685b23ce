"""engine.json of step graphs: round trip, and damage of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from runtime.engine_files import engine_section
from runtime.engine_info import DECODE, INPUT, PREFILL, EngineWeight
from runtime.errors import BundleError
from runtime.json_files import MOST_BYTES, open_regular_file
from runtime.step_engine_info import (
    CONSTANT,
    PAGE,
    TOP,
    GraphFile,
    Scratch,
    StepEngineInfo,
    StepRing,
    parse_step_engine,
    step_engine_to_json,
)
from runtime.weight_expression import Cast, Concat, Rows, Stored
from tests.support.fuzz import Target, assert_kept_the_rule, fuzz
from tests.support.mutate import Mutator, mutate_json, mutate_sizes

STORED = Stored("model.safetensors", 64, "BF16", (4, 8))
PLACEMENT = {"CUDAExecutionProvider": {"Gemm": 64, "Attention": 2}, "CPUExecutionProvider": {"Shape": 1}}
INFO = StepEngineInfo(
    name="one",
    backend="onnxruntime-cuda",
    version="1.31.1",
    arithmetic="bfloat16",
    kv="bfloat16",
    max_batch=4,
    chunk=64,
    graph_sha256="0123456789abcdef" * 4,
    graphs={
        PREFILL: GraphFile("prefill.onnx", 1234, "a" * 64, PLACEMENT),
        DECODE: GraphFile("decode.onnx", 999, "b" * 64, {}),
        TOP: GraphFile("top.onnx", 99, "c" * 64, {}),
    },
    rings=(
        StepRing("past.0.key", "past.0.value", "present.0.key", "present.0.value", 16, 16),
        StepRing("past.1.key", "past.1.value", "present.1.key", "present.1.value", 1088, None),
    ),
    scratch=Scratch(2 * PAGE, ("scratch.0.key",), ("scratch.0.value",)),
    tensors=(
        EngineWeight("plain", "BF16", (4, 8), INPUT, STORED),
        EngineWeight("merged", "F16", (8, 8), CONSTANT, Cast(Concat((Rows(STORED, "half"), STORED)), "F16")),
    ),
    orders={"half": (0, 2, 1, 3)},
)


def content(info: StepEngineInfo = INFO) -> bytes:
    return json.dumps(step_engine_to_json(info)).encode()


def parsed(text: bytes) -> StepEngineInfo:
    return parse_step_engine("one", engine_section("one", text))


@pytest.mark.parametrize("info", [INFO, replace(INFO, scratch=None)], ids=["window", "no window"])
def test_it_reads_back_as_it_was(info: StepEngineInfo) -> None:
    assert parsed(content(info)) == info


def damaged(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(content())
    change(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda e: e.update(schema_version=2), "written with schema 2"),
        (lambda e: e.pop("version"), "version"),
        (lambda e: e.update(backend="1\n2"), "no name"),
        (lambda e: e.update(chunk=0), "chunk"),
        (lambda e: e.update(graph_sha256="xyz"), "graph_sha256"),
        (lambda e: e["graphs"].pop("top"), "top"),
        (lambda e: e["graphs"]["decode"].update(file="../decode.onnx"), "outside"),
        (lambda e: e["graphs"]["decode"].update(file=".."), "outside"),
        (lambda e: e["graphs"]["decode"].update(bytes=0), "bytes"),
        (lambda e: e["graphs"]["prefill"]["placement"].update(elsewhere=7), "elsewhere"),
        (lambda e: e["graphs"]["prefill"]["placement"]["CPUExecutionProvider"].update(Shape="1"), "Shape"),
        (lambda e: e["rings"][0].update(slots=17), "17 slots for the window 16"),
        (lambda e: e["rings"][0].update(window=True), "for the window True"),
        (lambda e: e["rings"][1].update(slots=0), "slots"),
        (lambda e: e["rings"][1].pop("present_key"), "present_key"),
        (lambda e: e["scratch"].update(slots=PAGE + 1), "no multiple of 256"),
        (lambda e: e["scratch"].update(keys="scratch.0.key"), "keys"),
        (lambda e: e.update(scratch=7), "scratch"),
        (lambda e: e["orders"].update(half=[0, -1]), "order 'half'"),
        (lambda e: e["tensors"][0].update(role="refit"), "refit"),
        (lambda e: e["tensors"][0].update(dtype="F32"), "'F32', and what it is made of is BF16"),
    ],
)
def test_damage_is_refused(change: Callable[[dict[str, Any]], object], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        parsed(damaged(change))


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(BundleError, match="not described by readable JSON"):
        parsed(b"[]")


def test_thousands_of_damaged_ones_are_read_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "engine.json").write_bytes(content())

    def read(case: Path, random: Random) -> None:
        try:
            with open_regular_file(case / "engine.json") as stream:
                found = stream.read(MOST_BYTES + 1)
        except OSError as error:
            raise BundleError("The file is gone.") from error
        parsed(found)

    mutators: list[Mutator] = [mutate_json, mutate_json, mutate_json, mutate_sizes]
    targets = [Target(folder, "engine.json", mutator) for mutator in mutators]
    outcome = fuzz(targets, read, tmp_path / "cases", first=12_000_000, count=500)
    assert_kept_the_rule(outcome, accepted=50, BundleError=200)
