"""engine.json: round trip, and damage of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from runtime.engine_info import (
    DECODE,
    INPUT,
    PREFILL,
    REFIT,
    WEIGHTLESS,
    EngineInfo,
    EngineWeight,
    PlanInfo,
    PlanProfile,
    engine_to_json,
    parse_engine,
)
from runtime.errors import BundleError
from runtime.json_files import MOST_BYTES, open_regular_file
from runtime.weight_expression import Cast, Concat, Rows, Signed, Stored
from tests.support.fuzz import Target, assert_kept_the_rule, fuzz
from tests.support.mutate import Mutator, mutate_json, mutate_sizes

STORED = Stored("model.safetensors", 64, "BF16", (4, 8))
PACKED = Stored("weights.safetensors", 0, "U8", (4, 4))
INFO = EngineInfo(
    name="one",
    backend="tensorrt",
    flavor="tensorrt-rtx",
    version="1.7.1.116",
    compute_capability="8.9",
    arithmetic="bfloat16",
    kv="float16",
    plugins=("RollingAttention", "MoEGate"),
    weights=WEIGHTLESS,
    max_batch=4,
    chunk=64,
    graph_sha256="0123456789abcdef" * 4,
    plans={
        PREFILL: PlanInfo("prefill.plan", 1234, "a" * 64, (PlanProfile(1, 4, 1, 64),)),
        DECODE: PlanInfo("decode.plan", 999, "b" * 64, (PlanProfile(1, 1, 1, 1), PlanProfile(1, 4, 1, 1))),
    },
    tensors=(
        EngineWeight("plain", "BF16", (4, 8), INPUT, STORED),
        EngineWeight("merged", "F16", (8, 8), INPUT, Cast(Concat((Rows(STORED, "half"), STORED)), "F16")),
        EngineWeight("packed", "I4", (4, 8), REFIT, Signed(PACKED, "I4")),
    ),
    orders={"half": (0, 2, 1, 3)},
)


def content(info: EngineInfo = INFO) -> bytes:
    return json.dumps(engine_to_json(info)).encode()


def test_it_reads_back_as_it_was() -> None:
    assert parse_engine("one", content()) == INFO


def damaged(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(content())
    change(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda e: e.update(schema_version=2), "written with schema 2"),
        (lambda e: e.pop("flavor"), "flavor"),
        (lambda e: e.update(version="1\n2"), "no name"),
        (lambda e: e.update(version="1" * 501), "no name"),
        (lambda e: e.update(weights="lost"), "lost"),
        (lambda e: e.update(chunk=0), "chunk"),
        (lambda e: e.update(graph_sha256="xyz"), "graph_sha256"),
        (lambda e: e["plans"].pop("decode"), "decode"),
        (lambda e: e["plans"]["decode"].update(file="../decode.plan"), "outside"),
        (lambda e: e["plans"]["decode"].update(file=".."), "outside"),
        (lambda e: e["plans"]["decode"]["profiles"][0].update(max_batch=True), "max_batch"),
        (lambda e: e["plans"]["decode"]["profiles"][1].update(min_batch=5), "no shape"),
        (lambda e: e["plans"]["decode"].update(profiles=[7]), r"profiles\[0\]` must be an object"),
        (lambda e: e["orders"].update(half=[0, "1"]), "order 'half'"),
        (lambda e: e["orders"].update(half=[0, -1]), "order 'half'"),
        (lambda e: e["orders"].clear(), "order 'half', which is not there"),
        (lambda e: e["tensors"][0].update(role="spare"), "spare"),
        (lambda e: e["tensors"][0].update(shape=[4, -8]), "shape"),
        (lambda e: e["tensors"][0].update(shape=[1] * 65), "shape"),
        (lambda e: e["tensors"][0].update(shape=[10**39] * 8), "shape"),
        (lambda e: e["tensors"][0]["expression"].update(shape=[1] * 65), "shape"),
        (lambda e: e["tensors"][0]["expression"].update(shape=[0, 1 << 62, 1 << 62]), "shape"),
        (lambda e: e["tensors"][0].update(dtype="F32"), "'F32', and what it is made of is BF16"),
        (lambda e: e["tensors"][0].update(expression={}), "in no way"),
        (lambda e: e["tensors"].append(7), r"tensors\[3\]` must be an object"),
    ],
)
def test_damage_is_refused(change: Callable[[dict[str, Any]], object], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        parse_engine("one", damaged(change))


@pytest.mark.parametrize(
    "change, remedy",
    [
        (lambda e: e["plans"]["decode"].pop("bytes"), "Build the engine again."),
        (lambda e: e["plans"]["decode"]["profiles"][0].pop("max_batch"), "Build the engine again."),
        (lambda e: e["plans"]["decode"].update(sha256="xyz"), "Build the engine again."),
        (lambda e: e["tensors"][1]["expression"]["cast"]["concat"][1].pop("offset"), "Build the engine again."),
        (lambda e: e["tensors"][1]["expression"].update(to="I8"), "or build the engine again"),
    ],
)
def test_the_file_and_the_way_out_are_the_engines(change: Callable[[dict[str, Any]], object], remedy: str) -> None:
    with pytest.raises(BundleError, match=r"^The engine\.json's `engine one: ") as caught:
        parse_engine("one", damaged(change))
    assert remedy in str(caught.value)
    assert "xport" not in str(caught.value)


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(BundleError, match="not described by readable JSON"):
        parse_engine("one", b"[]")


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
        parse_engine("one", found)

    mutators: list[Mutator] = [mutate_json, mutate_json, mutate_json, mutate_sizes]
    targets = [Target(folder, "engine.json", mutator) for mutator in mutators]
    outcome = fuzz(targets, read, tmp_path / "cases", first=9_000_000, count=500)
    assert_kept_the_rule(outcome, accepted=50, BundleError=200)
