"""The examples in docs/parity.md can be read, and name commands and options that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest
import yaml  # type: ignore[import-untyped]

from exporter.cli import cli
from exporter.pytest_plugin import pytest_addoption
from tests.layout.imports import ROOT

PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)


def texts(value: object) -> Iterator[str]:
    """Every string in a document that was read from YAML."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


def commands(program: str) -> list[list[str]]:
    """What the page's examples call `program` with."""
    scripts = [text for block in blocks("yaml") for text in texts(yaml.safe_load(block))] + blocks("sh")
    found = []
    for line in (line for script in scripts for line in script.splitlines()):
        for part in re.split(r"\|\||&&|;", line):
            words = shlex.split(part, comments=True)
            if words[:1] == [program]:
                found.append(words[1:])
    return found


def test_github_s_example_has_jobs_with_steps() -> None:
    github, _ = (yaml.safe_load(block) for block in blocks("yaml"))
    for job in github["jobs"].values():
        assert job["runs-on"]
        assert all(("uses" in step) is not ("run" in step) for step in job["steps"])
        assert job["steps"][-1]["if"] == "always()", "the report is uploaded when parity fails too"
    assert github["jobs"]["engine"]["needs"] in github["jobs"]


def test_gitlab_s_example_has_jobs_of_its_stages() -> None:
    _, gitlab = (yaml.safe_load(block) for block in blocks("yaml"))
    jobs = {name: job for name, job in gitlab.items() if name not in ("stages", "variables", "default")}
    assert {job["stage"] for job in jobs.values()} == set(gitlab["stages"])
    assert all(job["script"] for job in jobs.values())
    assert all(job["artifacts"]["when"] == "always" for job in jobs.values() if "reports" in job["artifacts"])


def test_every_command_exists_with_these_options() -> None:
    called = commands("cierzo")
    assert {words[0] for words in called} == {"export", "build", "validate", "generate", "bench"}
    for words in called:
        command = cli.commands[words[0]]
        parser = command.make_parser(click.Context(command, info_name=words[0]))
        values, rest, _ = parser.parse_args(list(words[1:]))  # raises for an option that is not there
        assert not rest, words
        for parameter in command.params:
            if isinstance(parameter.type, click.Choice) and isinstance(values.get(parameter.name or ""), str):
                assert values[parameter.name or ""] in parameter.type.choices, words


def test_every_option_of_the_plugin_exists() -> None:
    options: list[str] = []

    class Parser:
        def getgroup(self, *_: str) -> Parser:
            return self

        def addoption(self, name: str, **_: object) -> None:
            options.append(name)

        def addini(self, name: str, *_: object, **__: object) -> None:
            options.append(name)

    pytest_addoption(Parser())  # type: ignore[arg-type]
    assert set(options) == set(re.findall(r"(?:--cierzo-[\w-]+|\bcierzo_(?!(?:parity|version)\b)\w+)", PAGE))
    named = {word for words in commands("pytest") for word in words if word.startswith("--cierzo")}
    assert named <= set(options)
    assert len(named) >= 3


@pytest.mark.parametrize("name", ["parity", "engine"])
def test_what_is_uploaded_is_what_is_written(name: str) -> None:
    for block in blocks("yaml"):
        document = yaml.safe_load(block)
        job = document.get("jobs", document)[name]
        written = [word for text in texts(job) for word in text.split() if word.startswith("reports/")]
        assert f"reports/{name}.html" in written
        assert f"reports/{name}.xml" in written
