"""The command's manners: help, exit codes, one-paragraph errors, JSON, and nothing heavy loaded without need."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from exporter.cli import CierzoGroup, Settings, cli
from exporter.console import explain
from exporter.defaults import RUN_BACKENDS
from runtime.backends import BACKENDS, DEFAULT_BACKEND
from runtime.errors import CheckpointError, ParityError

COMMANDS = ("inspect", "export", "generate", "validate", "bisect", "bench", "build", "demo")


def command_that_raises(error: BaseException) -> click.Group:
    """A group like `cierzo` with one subcommand, `work`, that ends with `error`."""

    @click.group(cls=CierzoGroup)
    @click.option("--debug", is_flag=True)
    @click.pass_obj
    def group(settings: Settings, debug: bool) -> None:
        settings.debug = debug

    @group.command()
    @click.option("--json", "as_json", is_flag=True)
    @click.option("--number", type=int)
    def work(as_json: bool, number: int | None) -> NoReturn:
        raise error

    return group


def run(*arguments: str | Path, group: click.Group = cli) -> Result:
    """Runs the command in this process; a Result keeps stdout and stderr apart."""
    return CliRunner().invoke(group, [str(argument) for argument in arguments])


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_lists_the_commands_and_no_others() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert set(cli.commands) == set(COMMANDS)
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_every_option(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    options = [parameter for parameter in cli.commands[name].params if isinstance(parameter, click.Option)]
    assert all(option.help for option in options)
    assert all(option.opts[0] in result.stdout for option in options)


def test_help_names_every_backend() -> None:
    assert set(RUN_BACKENDS) == set(BACKENDS)
    assert RUN_BACKENDS[0] == DEFAULT_BACKEND


def test_version_is_that_of_the_distribution() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("cierzo ")


def test_help_loads_neither_torch_nor_rich_nor_a_backend() -> None:
    code = "import sys; from exporter.cli import cli; cli(['--help'], standalone_mode=False); print(*sys.modules)"
    done = fresh(code)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "click" in loaded
    assert not loaded & {"torch", "numpy", "onnx", "onnx_ir", "onnxruntime", "rich", "tokenizers", "jinja2"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["inspect"],
        ["inspect", "no/such/path"],
        ["export", ".", "out", "--chunk", "0"],
        ["export", ".", "out", "--weights", "fp7"],
        ["export", ".", "out", "--frontend", "jax"],
        ["export", ".", "out", "--attention", "flash"],
        ["validate", ".", "--no-such-option"],
        ["generate", ".", "text", "--prompt-file", "-"],
    ],
)
def test_wrong_usage_exits_2_with_a_hint(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_refusal_is_one_paragraph() -> None:
    result = run("work", group=command_that_raises(CheckpointError("The tensor is missing.\n  Do   this.")))
    assert result.exit_code == 2
    assert result.stderr == "cierzo: The tensor is missing. Do this.\n"
    assert result.stdout == ""


def test_the_exit_code_is_that_of_the_error() -> None:
    assert run("work", group=command_that_raises(ParityError("off by one"))).exit_code == 1


def test_debug_shows_the_traceback_too() -> None:
    result = run("--debug", "work", group=command_that_raises(CheckpointError("The tensor is missing.")))
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("cierzo: The tensor is missing.\n")


def test_the_unexpected_asks_for_debug_and_never_looks_like_failed_parity() -> None:
    result = run("work", group=command_that_raises(KeyError("surprise")))
    assert result.exit_code == 2
    assert "KeyError: 'surprise'" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_interrupting_says_so_in_one_line() -> None:
    result = run("work", group=command_that_raises(KeyboardInterrupt()))
    assert (result.exit_code, result.stderr) == (130, "cierzo: interrupted.\n")


def test_the_operating_systems_refusal_is_not_called_a_bug() -> None:
    result = run("work", group=command_that_raises(OSError(28, "No space left on device", "out/weights")))
    assert result.exit_code == 2
    assert "No space left on device: 'out/weights'" in result.stderr
    assert "report" not in result.stderr


def test_json_gives_the_error_as_an_object_as_well() -> None:
    result = run("work", "--json", group=command_that_raises(CheckpointError("The tensor is missing.")))
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"error": {"type": "CheckpointError", "message": "The tensor is missing."}}
    assert result.stderr == "cierzo: The tensor is missing.\n"


def test_json_covers_wrong_usage() -> None:
    result = run("work", "--number", "x", "--json", group=command_that_raises(CheckpointError("unused")))
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "BadParameter"


def test_without_the_export_packages_a_command_says_how_to_get_them() -> None:
    text, exit_code = explain(ModuleNotFoundError("No module named 'torch'", name="torch.export"))
    assert exit_code == 2
    assert "pip install cierzo" in text
    assert "--debug" not in text


def test_a_reader_that_leaves_is_no_error() -> None:
    code = """
import click
from exporter.cli import cli

@cli.command()
def flood():
    for _ in range(100_000):
        print("x" * 100)

cli(["flood"])
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


def test_export_passes_every_option_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, object] = {}

    def export(checkpoint: Path, out: Path, **options: object) -> Path:
        seen.update(options, checkpoint=checkpoint, out=out)
        out.mkdir()
        files = {"model.safetensors": {"bytes": 1000}}
        weights = {"kind": "stored", "placement": "linked", "folder": None, "files": files}
        (out / "manifest.json").write_text(json.dumps({"fusion": {}, "weights": weights}))
        (out / "model.safetensors").write_bytes(bytes(1000))
        return out

    monkeypatch.setattr("exporter.export", export)
    weights = ["--weights", "int4", "--copy", "--no-hash", "--kv", "int8", "--block-size", "128", "--zero-points"]
    weights += ["--scales", "float32", "--quantizer", "rtn", "--keep", "lm_head=int8", "--keep", "first"]
    sizes = ["--chunk", "16", "--max-batch", "2", "--context", "64", "--no-prove"]
    keys = ["--ignore-config-key", "a", "--ignore-config-key", "b"]
    source = ["--frontend", "transformers", "--attention", "eager", "--layout", "native", "--text-only"]
    dump = tmp_path / "dump"
    result = run(
        "export", tmp_path, tmp_path / "out", *weights, *sizes, *keys, *source, "--dump-passes", dump, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {
        "bundle": str(tmp_path / "out"),
        "bytes": (tmp_path / "out" / "manifest.json").stat().st_size,
        "referenced_bytes": 1000,
        "weights": {"kind": "stored", "placement": "linked", "folder": None},
        "fusion": {},
    }
    assert seen == {
        "checkpoint": tmp_path,
        "out": tmp_path / "out",
        "weights": "int4",
        "block_size": 128,
        "zero_points": True,
        "scales": "float32",
        "quantizer": "rtn",
        "keep": ("lm_head=int8", "first"),
        "kv": "int8",
        "copy": True,
        "hashes": False,
        "layout": "native",
        "text_only": True,
        "chunk": 16,
        "max_batch": 2,
        "context": 64,
        "prove": False,
        "dump_passes": dump,
        "progress": None,
        "ignore_config_keys": ("a", "b"),
        "frontend": "transformers",
        "attention": "eager",
    }


@dataclass(frozen=True, slots=True)
class Verdict:
    """A validation report as far as the command looks at it."""

    passed: bool
    unverified: tuple[str, ...] = ("model.safetensors",)

    def to_json(self) -> dict[str, object]:
        return {"passed": self.passed}


@pytest.mark.parametrize(("passed", "exit_code"), [(True, 0), (False, 1)])
@pytest.mark.parametrize("as_json", [False, True])
def test_validate_exits_with_the_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, passed: bool, exit_code: int, as_json: bool
) -> None:
    seen: list[object] = []

    def validate(bundle: Path, checkpoint: Path | None, **options: object) -> Verdict:
        seen.extend([bundle, checkpoint, options])
        return Verdict(passed)

    def render(report: Verdict, console: Console) -> None:
        console.print(f"passed: {report.passed}")

    monkeypatch.setattr("exporter.validate.validate", validate)
    monkeypatch.setattr("exporter.validate.render", render)
    text = tmp_path / "text"
    text.touch()
    arguments = ["--backend", "abacus", "--engine", "one", "--seed", "3", "--verify", "--weights-folder", str(tmp_path)]
    arguments += ["--text", str(text), "--max-kl", "0.25", "--suite", "quick", "--no-receipt"]
    result = run("validate", tmp_path, *arguments, *(["--json"] if as_json else []))
    assert result.exit_code == exit_code
    options = {"backend": "abacus", "engine": "one", "seed": 3, "verify": True, "weights_folder": tmp_path}
    options |= {"progress": None, "text": text, "max_kl": 0.25, "suite": "quick"}
    assert seen == [tmp_path, None, options]
    assert "has no hash of model.safetensors, so only the size was compared" in result.stderr
    if as_json:
        assert json.loads(result.stdout) == {"passed": passed, "receipt": None}
    else:
        assert result.stdout == f"passed: {passed}\n"


def test_validate_that_could_not_run_exits_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def validate(*_arguments: object, **_options: object) -> NoReturn:
        raise CheckpointError("The checkpoint has moved.")

    monkeypatch.setattr("exporter.validate.validate", validate)
    result = run("validate", tmp_path, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "CheckpointError"


@pytest.mark.parametrize(("choice", "models"), [("both", ("mistral", "mixtral")), ("mixtral", ("mixtral",))])
def test_demo_runs_the_models_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, choice: str, models: tuple[str, ...]
) -> None:
    seen: dict[str, object] = {}

    def run_demo(console: Console, **options: object) -> None:
        seen.update(options)

    monkeypatch.setattr("exporter.demo.run_demo", run_demo)
    result = run("demo", "--model", choice, "--keep", tmp_path / "kept")
    assert result.exit_code == 0, result.stderr
    assert seen == {"models": models, "keep": tmp_path / "kept", "progress": None}
