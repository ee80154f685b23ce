"""docs/validation.schema.json describes what `cierzo validate --json` prints, and every key of it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner

from exporter.cli import cli
from exporter.validation_report import SCHEMA_VERSION, SUITES, ValidationReport
from tests.layout.imports import ROOT
from tests.support import reports
from tests.support.bundles import Exported, exported

SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "validation.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def complaints(document: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(document)]


def test_the_schema_is_one_of_this_version() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema_version"]["const"] == SCHEMA_VERSION
    assert SCHEMA["properties"]["suite"]["enum"] == list(SUITES)


def printed(case: Exported, folder: Path, *options: str) -> dict[str, Any]:
    bundle = shutil.copytree(case.bundle, folder / case.bundle.name)  # a receipt is written into it
    result = CliRunner().invoke(cli, ["validate", str(bundle), *options, "--json"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_what_is_printed_is_as_described(tmp_path: Path) -> None:
    dense = exported(num_layers=1, seed=5)
    by_module = printed(dense, tmp_path, "--suite", "quick", "--layers")
    assert complaints(by_module) == []
    assert set(by_module) == set(SCHEMA["properties"]), "every key that is described is printed"
    quantised = exported(dtype="bfloat16", options={"weights": "int4"})
    found = printed(quantised, tmp_path, "--suite", "full", "--verify", "--no-receipt")
    assert complaints(found) == []
    assert found["quality"] is not None
    assert found["receipt"] is None
    assert by_module["receipt"]["suite"] == "quick"


MADE: dict[str, ValidationReport] = {
    "right": reports.report(),
    "wrong": reports.failing(),
    "nothing compared": reports.empty(),
    "some positions": reports.report(positions=tuple(range(0, 400, 10)), windows=(8, None)),
}


@pytest.mark.parametrize("name", MADE)
def test_reports_of_all_kinds_are_as_described(name: str) -> None:
    for layers in (None, reports.layers(), reports.layers(passed=False)):
        extra: dict[str, Any] = {} if layers is None else {"layers": layers.to_json()}
        document = json.loads(json.dumps(MADE[name].to_json() | {"receipt": None} | extra, allow_nan=False))
        assert complaints(document) == []


def walk(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for key, inner in schema.get("properties", {}).items():
        yield from walk(inner, f"{path}.{key}")
    if isinstance(schema.get("items"), dict):
        yield from walk(schema["items"], f"{path}[]")


def test_every_key_has_a_description_and_no_other_is_let_in() -> None:
    for path, schema in walk(SCHEMA, "report"):
        assert schema.get("description"), path
        if "properties" in schema:
            assert schema["additionalProperties"] is False, path
            optional = set(schema["properties"]) - set(schema["required"])
            assert optional == ({"layers"} if path == "report" else set()), path


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a key less": lambda d: d.pop("speed"),
    "a key more": lambda d: d["checks"][0].update(share=0.5),
    "another version": lambda d: d.update(schema_version=SCHEMA_VERSION + 1),
    "another status": lambda d: d["checks"][0].update(status="skipped"),
    "a negative error": lambda d: d["checks"][0].update(error=-1.0),
    "an error as text": lambda d: d.update(budget="1e-6"),
    "half a token": lambda d: d["quality"].update(tokens=1.5),
    "a window without tokens": lambda d: d.update(windows=[0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_anything_else_is_not(name: str) -> None:
    document = copy.deepcopy(reports.report().to_json()) | {"receipt": None}
    assert complaints(document) == []
    CHANGES[name](document)
    assert complaints(document) != []
