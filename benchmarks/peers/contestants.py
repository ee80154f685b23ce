"""Who runs: each engine in each number format, and how its own tools make its file from a checkpoint.

Converters are called as their documentation says, with the options that make formats comparable and none besides.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.peers.environments import HERE, Environments

Command = list[str]
Convert = Callable[[Environments, Path, Path], list[Command]]
"""(environments, checkpoint, folder to write into) to the commands that convert."""

FLASH = ", flash attention"
Long = Literal["every", "kept", "once"]
WORKERS = "benchmarks.peers.workers"


@dataclass(frozen=True, slots=True)
class Contestant:
    """One engine with one format.

    environment: where its worker runs. settings: given to the worker's `load`. converter: the environment of the
    converter, whose versions the report names too; file: what of the converted folder is loaded. rounds: how many
    rounds it takes part in, None for all. long: whether the longest text is read in `every` round, or in the first one
    and then `kept` open to go on with, or read `once` and given up. scale_bits: what its scales add to each weight.
    """

    name: str
    worker: str
    environment: str
    convert: Convert
    bits: int
    converter: str = HERE
    file: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    rounds: int | None = None
    long: Long = "kept"
    scale_bits: float = 0.0

    @property
    def ours(self) -> bool:
        """Whether this is Cierzo."""
        return self.worker == "cierzo"

    @property
    def slug(self) -> str:
        """The name as that of a folder; contestants that differ only in settings share what was converted."""
        name = self.name.removesuffix(FLASH).lower()
        return "".join(letter if letter.isalnum() else "-" for letter in name)


def cierzo(weights: str, block: int | None = None) -> Convert:
    """`export(..., weights=, block_size=)` in one process of its own."""

    def commands(environments: Environments, checkpoint: Path, out: Path) -> list[Command]:
        options = {"weights": weights, "max_batch": 1} | ({} if block is None else {"block_size": block})
        code = f"from exporter import export; export({str(checkpoint)!r}, {str(out / 'bundle')!r}, **{options!r})"
        return [[str(environments.python(HERE)), "-c", code]]

    return commands


def gguf(kind: str) -> Convert:
    """llama.cpp's own converter, then its quantiser unless `kind` is a float format."""

    def commands(environments: Environments, checkpoint: Path, out: Path) -> list[Command]:
        python = str(environments.python("llama_cpp"))
        script = environments.source("llama_cpp") / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
        quantised = kind.startswith("Q")
        plain, target = out / "plain.gguf", out / "model.gguf"
        convert = [python, str(script), str(checkpoint), "--outtype", "auto" if quantised else kind, "--outfile"]
        if not quantised:
            return [[*convert, str(target)]]
        return [
            [*convert, str(plain)],
            [python, "-m", f"{WORKERS}.llama_quantize", str(plain), str(target), kind],
        ]

    return commands


def genai(precision: str, *, block: int | None = None, layer_types: bool) -> Convert:
    """onnxruntime-genai's model builder. layer_types: say in config.json that every layer has a sliding window, which
    the builder needs and published checkpoints of Mistral do not say."""

    def commands(environments: Environments, checkpoint: Path, out: Path) -> list[Command]:
        source = _with_layer_types(checkpoint, out / "mended") if layer_types else checkpoint
        python = str(environments.python("onnxruntime_genai"))
        command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out / "model")]
        command += ["-p", precision, "-e", "cpu", "-c", str(out / "cache")]
        if block is not None:
            command += ["--extra_options", f"matmul_block_size={block}", "accuracy_level=4"]
        return [command]

    return commands


def openvino(weights: str, block: int | None = None) -> Convert:
    """optimum-intel with nncf."""

    def commands(environments: Environments, checkpoint: Path, out: Path) -> list[Command]:
        cli = environments.python("openvino_convert").parent / "optimum-cli"
        command = [str(cli), "export", "openvino", "--model", str(checkpoint), "--task", "text-generation-with-past"]
        command += ["--weight-format", weights]
        if block is not None:
            command += ["--group-size", str(block), "--sym", "--ratio", "1.0"]
        return [[*command, str(out / "model")]]

    return commands


def as_it_is(environments: Environments, checkpoint: Path, out: Path) -> list[Command]:
    """transformers reads the checkpoint itself."""
    del environments
    (out / "model").symlink_to(checkpoint, target_is_directory=True)
    return []


def _with_layer_types(checkpoint: Path, target: Path) -> Path:
    """The same checkpoint, linked, whose config.json names the kind of each layer."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def _llama(name: str, kind: str, bits: int, *, flash: bool, rounds: int | None = None) -> Contestant:
    return Contestant(
        name, "llama_cpp", "llama_cpp", gguf(kind), bits, "llama_cpp", "model.gguf", {"flash_attention": flash}, rounds
    )


def _genai(name: str, convert: Convert, bits: int, rounds: int | None = None) -> Contestant:
    environment = "onnxruntime_genai"
    return Contestant(name, environment, environment, convert, bits, environment, "model", rounds=rounds)


def _openvino(name: str, convert: Convert, bits: int) -> Contestant:
    environment = "openvino_genai"
    return Contestant(
        name, environment, environment, convert, bits, "openvino_convert", "model", long="every"
    )  # fmt: skip


def _cierzo(name: str, weights: str, bits: int, block: int | None = None) -> Contestant:
    convert = cierzo(weights, block)
    long: Long = "every" if bits == 4 else "once"
    scale_bits = 0.0 if bits == 32 else 16 / (block or 32)
    return Contestant(f"Cierzo {name}", "cierzo", HERE, convert, bits, file="bundle", long=long, scale_bits=scale_bits)


OURS = "Cierzo int4 block 32"
"""The contestant that all others are compared with."""

MEASURED = (
    _cierzo("int4 block 32", "int4", 4, 32),
    _cierzo("int4 block 128", "int4", 4, 128),
    _cierzo("int8", "int8", 8),
    _cierzo("fp32", "fp32", 32),
    _llama("llama.cpp Q4_0", "Q4_0", 4, flash=False),
    _llama(f"llama.cpp Q4_0{FLASH}", "Q4_0", 4, flash=True),
    _genai("onnxruntime-genai int4, layer_types added", genai("int4", block=32, layer_types=True), 4),
    _genai("onnxruntime-genai int4, as exported", genai("int4", block=32, layer_types=False), 4),
    _openvino("OpenVINO GenAI int4", openvino("int4", 32), 4),
    Contestant("transformers fp32", "transformers", HERE, as_it_is, 32, file="model"),
)

CHECKED = (
    Contestant("transformers fp32", "transformers", HERE, as_it_is, 32, file="model"),
    _cierzo("fp32", "fp32", 32),
    _cierzo("int8", "int8", 8),
    _cierzo("int4 block 32", "int4", 4, 32),
    _cierzo("int4 block 128", "int4", 4, 128),
    _llama("llama.cpp F32", "f32", 32, flash=False),
    _llama(f"llama.cpp F32{FLASH}", "f32", 32, flash=True),
    _llama("llama.cpp Q4_0", "Q4_0", 4, flash=False),
    _genai("onnxruntime-genai fp32, as exported", genai("fp32", layer_types=False), 32),
    _genai("onnxruntime-genai fp32, layer_types added", genai("fp32", layer_types=True), 32),
    _genai("onnxruntime-genai int4, layer_types added", genai("int4", block=32, layer_types=True), 4),
    _openvino("OpenVINO GenAI fp32", openvino("fp32"), 32),
    _openvino("OpenVINO GenAI int4", openvino("int4", 32), 4),
)
"""Who answers whether the window is kept; the first is the reference."""
