"""Builds an ONNX graph with plugins in a process of its own, and says what became of it.

In a process of its own since the library's registry is one for the process, and one failed build can spoil the next.
Run as a program it takes one job as JSON on its standard input and prints one JSON object, the BuildResult.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

ROOT = Path(__file__).resolve().parents[2]
Range = tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class BuildResult:
    """parsed, built: how far it came. layers: kind and name of each, in the order of execution. errors: TensorRT's.

    failure: our sentence, if there is one. outputs: their shapes after parsing, -1 where dynamic. kernels: names of
    those that the plugins may launch. serialized: how many plugins the plan holds with all their fields.
    """

    parsed: bool
    built: bool
    layers: list[tuple[str, str]]
    outputs: dict[str, list[int]]
    errors: list[str]
    failure: str | None
    kernels: list[str]
    serialized: int

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.layers]


def build_with_plugins(
    model: onnx.ModelProto,
    profiles: Sequence[Mapping[str, Range]],
    *,
    plugins: Sequence[str] = ("RollingAttention", "PackedRollingAttention", "MoEGate", "MixtureOfExperts"),
    compute_capability: str = "8.9",
    prelude: str = "",
) -> BuildResult:
    """profiles: least, usual and largest shape of each dynamic input. prelude: Python run first in the process."""
    job = {
        "model": base64.b64encode(model.SerializeToString()).decode(),
        "profiles": [dict(profile) for profile in profiles],
        "plugins": list(plugins),
        "compute_capability": compute_capability,
        "prelude": prelude,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.plugin_builds"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, f"the build ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return BuildResult(**{**said, "layers": [(kind, name) for kind, name in said["layers"]]})


def _build(job: Mapping[str, Any]) -> BuildResult:
    exec(job["prelude"], {})
    from runtime.errors import BackendError
    from runtime.tensorrt.flavor import load_flavor
    from runtime.tensorrt_plugins import register

    flavor = load_flavor("tensorrt-rtx")
    trt = flavor.trt
    messages: list[tuple[str, str]] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.append((severity.name, message))

    log = Log()
    with register(flavor, job["plugins"], compute_capability=job["compute_capability"]) as plugins:
        builder = trt.Builder(log)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        parsed = bool(parser.parse(base64.b64decode(job["model"])))
        plan = None
        outputs: dict[str, list[int]] = {}
        if parsed:
            tensors = [network.get_output(index) for index in range(network.num_outputs)]
            outputs = {tensor.name: list(tensor.shape) for tensor in tensors}
            config = builder.create_builder_config()
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
            config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
            flavor.set_compute_capability(config, job["compute_capability"])
            for ranges in job["profiles"]:
                profile = builder.create_optimization_profile()
                for name, (least, usual, largest) in ranges.items():
                    profile.set_shape(name, least, usual, largest)
                config.add_optimization_profile(profile)
            plan = builder.build_serialized_network(network, config)
        failure = None
        try:
            plugins.raise_failure()
        except BackendError as error:
            failure = str(error)
        return BuildResult(
            parsed=parsed,
            built=plan is not None,
            layers=_layers(messages),
            outputs=outputs,
            errors=[text for severity, text in messages if severity in ("ERROR", "INTERNAL_ERROR")],
            failure=failure,
            kernels=sorted({kernel.name for kernel in plugins.kernels}),
            serialized=0 if plan is None else bytes(plan).count(b"planned_multiprocessors"),
        )


def _layers(messages: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """From the list of kernels that a verbose build with detailed profiling writes into its log."""
    for _, text in messages:
        if text.startswith("Layers:"):
            found = (re.match(r"Name: (.*?), LayerType: (\S+),", line) for line in text.splitlines()[1:])
            return [(match[2], match[1]) for match in found if match is not None]
    return []


if __name__ == "__main__":
    print("\n" + json.dumps(asdict(_build(json.load(sys.stdin)))))
