"""The engines' environments: one virtual environment each, since their dependencies contradict each other.

Cierzo and transformers run in the environment that runs the benchmark; every other engine gets its own below
`workdir`/environments, made with the same Python and installed with pip at first use.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass, field
from pathlib import Path

HERE = "cierzo"
"""The environment that runs the benchmark."""

_DONE = "installed.json"
_LIST = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"


@dataclass(frozen=True, slots=True)
class Environment:
    """requirements: what pip installs. unwanted: what those pull in and then fail over. source: a distribution that is
    compiled here for this machine's instruction set, and whose sources hold its converter as well. told: the
    distributions whose versions the report names."""

    name: str
    requirements: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    source: str | None = None
    told: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(HERE, told=("onnxruntime", "torch", "transformers")),
        Environment(
            "llama_cpp",
            ("gguf", "torch", "transformers", "sentencepiece", "protobuf"),
            source="llama-cpp-python",
            told=("llama_cpp_python",),
            variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
        ),
        Environment(
            "onnxruntime_genai",
            ("onnxruntime-genai", "onnx", "onnx-ir", "torch", "transformers"),
            told=("onnxruntime-genai", "onnxruntime"),
        ),
        Environment("openvino_genai", ("openvino-genai",), told=("openvino-genai", "openvino")),
        Environment(
            "openvino_convert",
            ("torch", "optimum-intel", "nncf", "openvino"),
            unwanted=("torchvision",),  # it is optional, and its wheel is for another build of torch
            told=("optimum-intel", "nncf"),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Environments:
    """The environments below one working folder."""

    workdir: Path

    def python(self, name: str) -> Path:
        """The interpreter of an environment."""
        return Path(sys.executable) if name == HERE else self._folder(name) / "bin" / "python"

    def source(self, name: str) -> Path:
        """The unpacked sources of what an environment compiled."""
        return next((self._folder(name) / "source").iterdir())

    def versions(self, name: str) -> dict[str, str]:
        """The distributions that the report names, with their versions."""
        listed = subprocess.run([str(self.python(name)), "-c", _LIST], check=True, capture_output=True, text=True)
        found = {key.lower().replace("_", "-"): value for key, value in json.loads(listed.stdout).items()}
        told = (key.replace("_", "-") for key in ENVIRONMENTS[name].told)
        return {key: found.get(key, "not installed") for key in told}

    def install(self, name: str) -> None:
        """Make the environment unless it is there; minutes where something is compiled."""
        folder = self._folder(name)
        if name == HERE or (folder / _DONE).exists():
            return
        environment = ENVIRONMENTS[name]
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {name}: {', '.join(environment.requirements)}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, symlinks=True)
        if environment.source is not None:
            download = folder / "download"
            self._pip(environment, "download", "--no-deps", f"--no-binary={environment.source}", "-d", str(download),
                      environment.source)  # fmt: skip
            with tarfile.open(next(download.glob("*.tar.gz"))) as archive:
                archive.extractall(folder / "source", filter="data")
            self._pip(environment, "install", str(self.source(name)))
        self._pip(environment, "install", *environment.requirements)
        if environment.unwanted:
            self._pip(environment, "uninstall", "-y", *environment.unwanted)
        (folder / _DONE).write_text(json.dumps(self.versions(name)), encoding="utf-8")

    def _folder(self, name: str) -> Path:
        return self.workdir / "environments" / name

    def _pip(self, environment: Environment, *arguments: str) -> None:
        log = self.workdir / "logs" / f"install-{environment.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [str(self.python(environment.name)), "-m", "pip", *arguments]
        with log.open("ab") as file:
            variables = {**os.environ, **environment.variables}
            status = subprocess.run(command, stdout=file, stderr=file, env=variables).returncode
        if status != 0:
            raise SystemExit(f"Installing {environment.name} ended with status {status}; {log} says why.")
