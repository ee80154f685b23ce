"""One plan: a network, its profiles, the library's configuration, and the serialized engine that comes out.

Letters: B batch rows, T tokens of a step, R rows of logits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporter.build.job import BuildJob
from exporter.build.kernels import HEADING, KernelCall, read_kernels
from exporter.build.network import Network, parse_network
from exporter.build.progress import Percent, Report, progress_monitor
from runtime.engine_info import PlanProfile
from runtime.errors import BackendError
from runtime.tensorrt.flavor import Flavor
from runtime.tensorrt.kept import kept_file, read_kept, write_kept
from runtime.tensorrt_plugins import Registration

_SERIOUS = ("INTERNAL_ERROR", "ERROR")


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """content: the library's buffer, to be written as it is. seconds: that the library took."""

    content: Any
    kernels: tuple[KernelCall, ...]
    seconds: float


class BuildLog:
    """What the library says: its errors, and the list of kernels; whatever is at least a warning goes to stderr too."""

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self.kernels: tuple[KernelCall, ...] = ()
        log = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                log.take(severity.name, message)

        self.logger = Logger()

    def take(self, severity: str, message: str) -> None:
        if severity in _SERIOUS:
            self.errors.append(" ".join(message.split()))
        if severity in (*_SERIOUS, "WARNING"):
            os.write(2, f"{severity}: {message}\n".encode(errors="replace"))  # at once: the process may end here
        elif message.startswith(HEADING):
            self.kernels = read_kernels(message)


def build_plan(flavor: Flavor, job: BuildJob, name: str, registration: Registration, report: Report) -> BuiltPlan:
    """Build the job's plan `name`. Raises BackendError with the plugin's, the parser's or the library's reason."""
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, SetDecomposableAttentions
    from polygraphy.exception import PolygraphyException

    trt, log = flavor.trt, BuildLog(flavor.trt)
    try:
        network = parse_network(flavor, log.logger, job)
    except BackendError:
        registration.raise_failure()
        raise
    parsed = network.builder, network.definition, network.parser
    SetDecomposableAttentions(parsed)()
    profiles = [_polygraphy_profile(job, profile) for profile in job.plans[name]]
    monitor = progress_monitor(trt, Percent(report))

    timings = kept_file("timings", f"{flavor.name}-{flavor.version}-sm{job.compute_capability}")
    configurations: list[Any] = []

    def configured(builder: Any, definition: Any) -> Any:
        verbosity = trt.ProfilingVerbosity.DETAILED
        config = CreateConfig(profiles=profiles, profiling_verbosity=verbosity, progress_monitor=monitor)(
            builder, definition
        )
        _configure(flavor, config, job, network)
        flavor.use_timings(config, read_kept(timings))
        configurations.append(config)
        return config

    begun = time.perf_counter()
    try:
        content = EngineBytesFromNetwork(parsed, configured)()
    except PolygraphyException as error:
        registration.raise_failure()
        said = "; ".join(dict.fromkeys(log.errors[-3:])) or str(error)
        raise BackendError(
            f"{flavor.name} {flavor.version} does not build the {name} plan for compute capability "
            f"{job.compute_capability}: {said}"
        ) from error
    registration.raise_failure()
    timed = flavor.timings(configurations[-1])
    if timed is not None:
        write_kept(timings, timed)
    return BuiltPlan(content, log.kernels, time.perf_counter() - begun)


def _configure(flavor: Flavor, config: Any, job: BuildJob, network: Network) -> None:
    trt = flavor.trt
    flavor.set_compute_capability(config, job.compute_capability)
    for flag in flavor.build_flags():
        config.set_flag(flag)
    if network.stripped:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    if job.plugins:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)


def _polygraphy_profile(job: BuildJob, profile: PlanProfile) -> Any:
    """Shapes of the dynamic inputs: the least, those to be fast at, and the most. R is 1 where speed matters."""
    from polygraphy.backend.trt import Profile

    # Many tokens of one row is what a prompt looks like; several rows is what a profile beyond the first is for.
    rows = profile.max_batch if profile.max_tokens == 1 else profile.min_batch
    low, best, high = (
        {"B": profile.min_batch, "T": profile.min_tokens, "R": 1},
        {"B": rows, "T": profile.max_tokens, "R": 1},
        {"B": profile.max_batch, "T": profile.max_tokens, "R": profile.max_tokens},
    )
    made = Profile()
    for name, axes in job.inputs.items():
        made.add(name, *(_shape(axes, letters) for letters in (low, best, high)))
    return made


def _shape(axes: Sequence[str | int], letters: dict[str, int]) -> tuple[int, ...]:
    return tuple(letters[axis] if isinstance(axis, str) else axis for axis in axes)
