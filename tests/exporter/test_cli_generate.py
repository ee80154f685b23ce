"""`cierzo generate` on a toy bundle: text and ids, from an argument, a file or a pipe, streaming, JSON, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from exporter.cli import cli
from runtime import generate_text, load
from tests.support.toy_bundle import ToyModel, write_toy_bundle
from tests.support.toy_tokenizers import CHAT_TEMPLATE, byte_level, config_json

TOY = ToyModel(windows=(4, 4), eos_token_ids=())
TEXT = ToyModel(windows=(4, 4), vocab_size=320, eos_token_ids=())
PROMPT = [1, 5, 7, 9, 11, 3]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A bundle without a tokenizer, whose every logit the toy's oracle knows."""
    return write_toy_bundle(tmp_path / "toy", TOY)


@pytest.fixture
def speaker(tmp_path: Path) -> Path:
    """A bundle with a byte-level tokenizer and a chat template."""
    files = {
        "tokenizer.json": byte_level(),
        "tokenizer_config.json": config_json(),
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    return write_toy_bundle(tmp_path / "speaker", TEXT, files)


def generate(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    """Runs `cierzo generate` in this process with one thread and twelve new tokens."""
    fixed = ["--threads", "1", "--max-new-tokens", "12"]
    return CliRunner().invoke(cli, ["generate", *map(str, arguments), *fixed], input=stdin)


def words(token_ids: list[int]) -> str:
    return " ".join(map(str, token_ids))


def test_ids_in_and_out_far_past_the_window(toy: Path) -> None:
    result = generate(toy, words(PROMPT), "--ids")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == words(TOY.greedy(PROMPT, 12)) + "\n"
    assert result.stderr.startswith("6 prompt and 12 new tokens in ")
    assert result.stderr.endswith(" tokens/s\n")


def test_a_session_that_is_slow_for_lack_of_memory_says_so(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(toy, threads=1).notes == ()
    monkeypatch.setattr("runtime.backends.onnxruntime.folds_weights", lambda info, available, native: False)
    result = generate(toy, words(PROMPT), "--ids")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == words(TOY.greedy(PROMPT, 12)) + "\n"
    note, speed = result.stderr.splitlines()
    assert note.startswith("cierzo: Making the weights in float32 once takes about ")
    assert speed.startswith("6 prompt and 12 new tokens in ")


def test_ids_as_json(toy: Path) -> None:
    result = generate(toy, words(PROMPT), "--ids", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["token_ids"] == TOY.greedy(PROMPT, 12)
    assert (answer["prompt_tokens"], answer["new_tokens"]) == (6, 12)
    assert 0 < answer["first_seconds"] < answer["total_seconds"]
    assert answer["tokens_per_second"] > 0
    assert result.stderr == ""


def expected_text(bundle: Path, prompt: str, *, chat: bool = False, **options: Any) -> str:
    """What the runtime generates, without the command."""
    request = [{"role": "user", "content": prompt}] if chat else prompt
    return "".join(generate_text(load(bundle, threads=1), request, max_new_tokens=12, **options))


def test_text_from_the_argument_a_file_and_a_pipe(speaker: Path, tmp_path: Path) -> None:
    expected = expected_text(speaker, "the wind – café") + "\n"
    file = tmp_path / "prompt.txt"
    file.write_text("the wind – café\n", encoding="utf-8")
    for result in (
        generate(speaker, "the wind – café"),
        generate(speaker, "--prompt-file", file),
        generate(speaker, "--prompt-file", "-", stdin="the wind – café\n"),
        generate(speaker, stdin="the wind – café\n"),
    ):
        assert result.exit_code == 0, result.stderr
        assert result.stdout == expected


def test_chat_uses_the_template(speaker: Path) -> None:
    plain, chat = expected_text(speaker, "wind"), expected_text(speaker, "wind", chat=True)
    assert plain != chat
    assert generate(speaker, "wind", "--chat").stdout == chat + "\n"


def test_sampling_options_reach_the_sampler(speaker: Path) -> None:
    options: dict[str, Any] = {"temperature": 3.0, "top_k": 50, "top_p": 0.95, "min_p": 0.001, "seed": 7}
    options["repetition_penalty"] = 1.3
    arguments = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    expected = expected_text(speaker, "wind", **options)
    assert expected != expected_text(speaker, "wind")
    assert generate(speaker, "wind", *arguments).stdout == expected + "\n"


def test_stop_ends_before_its_text(speaker: Path) -> None:
    whole = expected_text(speaker, "wind", temperature=1.0, seed=1)
    stop = whole[len(whole) // 2 :][:2]
    result = generate(speaker, "wind", "--temperature", "1", "--seed", "1", "--stop", "\0", "--stop", stop, "--json")
    answer = json.loads(result.stdout)
    assert answer["finish_reason"] == "stop_string"
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["new_tokens"] == len(answer["token_ids"])


@pytest.mark.parametrize(
    ("arguments", "stdin", "words_of_the_error"),
    [
        (["wind", "--prompt-file", "-"], "x", "not both"),
        (["1 2", "--ids", "--chat"], None, "exclude each other"),
        (["1 two", "--ids"], None, "whole numbers"),
        ([], b"\xff\xfe", "not UTF-8"),
    ],
)
def test_wrong_usage(toy: Path, arguments: list[str], stdin: str | bytes | None, words_of_the_error: str) -> None:
    result = generate(toy, *arguments, stdin=stdin)
    assert result.exit_code == 2
    assert words_of_the_error in result.stderr
    assert "Usage: " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words_of_the_error"),
    [
        (["wind"], "no tokenizer"),
        (["1 37", "--ids"], "37"),
        (["", "--ids"], "empty"),
        (["1", "--ids", "--temperature", "-1"], "temperature"),
        (["1", "--ids", "--backend", "abacus"], "abacus"),
        (["1", "--ids", "--engine", "one"], "not an engine that was built of it such as 'one'"),
    ],
)
def test_refusals_of_the_runtime_are_one_paragraph(toy: Path, arguments: list[str], words_of_the_error: str) -> None:
    result = generate(toy, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("cierzo: ")
    assert result.stderr.count("\n") == 1
    assert words_of_the_error in result.stderr


def test_a_bundle_runs_where_the_export_packages_are_not_installed(toy: Path) -> None:
    """What an install of cierzo, numpy, onnxruntime, tokenizers, jinja2, click and rich can do."""
    code = f"""
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "transformers"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
from exporter.cli import cli
for arguments in (["generate", {str(toy)!r}, "1 5 7", "--ids", "--threads", "1"], ["inspect", {str(toy)!r}]):
    try:
        cli(arguments)
    except SystemExit as error:
        assert not error.code, error.code
cli(["export", {str(toy.parent)!r}, {str(toy.parent / "out")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(words(TOY.greedy([1, 5, 7], 128)) + "\n"), done.stderr
    assert done.returncode == 2
    assert "which is not installed here" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_that_were_moved_and_hashes_that_are_compared(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    weights = (toy / "weights.bin").rename(tmp_path / "moved" / "weights.bin")
    arguments = (toy, words(PROMPT), "--ids", "--verify", "--weights-folder", tmp_path / "moved")
    result = generate(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == words(TOY.greedy(PROMPT, 12)) + "\n"
    manifest = json.loads((toy / "manifest.json").read_text())
    manifest["weights"]["files"]["weights.bin"]["sha256"] = None
    (toy / "manifest.json").write_text(json.dumps(manifest))
    result = generate(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("cierzo: the manifest has no hash of weights.bin, so only the size was compared.")
    graph = bytearray((toy / "model.onnx").read_bytes())
    graph[-1] ^= 1
    (toy / "model.onnx").write_bytes(graph)
    result = generate(*arguments)
    assert result.exit_code == 2
    assert "model.onnx" in result.stderr
    assert "has the SHA-256" in result.stderr
    assert weights.is_file()
