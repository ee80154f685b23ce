"""A decode step as a CUDA graph, replayed while positions move on, against the same launches one by one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from runtime.kernels.cuda.launch import Launcher
from runtime.kernels.cuda.mixture_of_experts import (
    MixtureProblem,
    MixtureTensors,
    launch_mixture_of_experts,
    mixture_workspace_bytes,
)
from runtime.kernels.cuda.moe_gate import GateProblem, GateTensors, launch_moe_gate
from runtime.kernels.cuda.rolling_attention import launch_rolling_attention, rolling_attention_workspace_bytes
from runtime.kernels.cuda.rolling_problem import RollingTensors
from runtime.kernels.cuda.top_logits import (
    TopProblem,
    TopTensors,
    launch_top_logits,
    top_logits_workspace_bytes,
)
from tests.gpu.device import Array, CheckedDevice
from tests.kernels.cuda.moe_cases import mixture
from tests.kernels.cuda.rolling_cases import TYPES, RollingCase, RollingInputs, inputs_of
from tests.support.kernel_devices import Buffer

EXPERTS, CHOSEN, VOCABULARY, TOP = 4, 2, 5000, 8


@dataclass(frozen=True, slots=True)
class _Step:
    """One step: attention, gate, mixture and the best logits, at fixed addresses."""

    device: CheckedDevice
    case: RollingCase
    mixed: MixtureProblem
    inputs: dict[str, Buffer]
    results: dict[str, Buffer]
    workspaces: tuple[Buffer, ...]

    def launch(self, launcher: Launcher) -> None:
        at = {name: buffer.address for name, buffer in (self.inputs | self.results).items()}
        attention, mixture_space, top_space = (buffer.address for buffer in self.workspaces)
        names = (field.name for field in fields(RollingTensors) if field.name != "workspace")
        rolling = RollingTensors(**{name: at[name] for name in names}, workspace=attention)
        launch_rolling_attention(launcher, self.case.problem, rolling)
        tokens = self.mixed.tokens
        gate = GateTensors(at["router"], at["weight"], at["expert"])
        launch_moe_gate(launcher, GateProblem(tokens, EXPERTS, CHOSEN), gate)
        stacks = (at[name] for name in ("x", "weight", "expert", "gate", "up", "down", "y"))
        mixed = MixtureTensors(*stacks, workspace=mixture_space)  # type: ignore[misc]
        launch_mixture_of_experts(launcher, self.mixed, mixed)
        top = TopTensors(at["logits"], at["values"], at["ids"], top_space)
        launch_top_logits(launcher, TopProblem(tokens, VOCABULARY, TOP), top)

    def feed(self, arrays: dict[str, Array]) -> None:
        for name, array in arrays.items():
            self.device.write(self.inputs[name], array)

    def download(self) -> dict[str, Array]:
        for buffer in (*self.inputs.values(), *self.workspaces):
            self.device.download(buffer)  # looks at what is around it
        return {name: self.device.download(buffer) for name, buffer in self.results.items()}


def check_graph(device: CheckedDevice, case: RollingCase, steps: int, seed: int) -> None:
    """Equal in every bit after each of `steps` steps, rings included. case: of one token a row; its starts go up."""
    eager, replayed = (_made(device, case, seed) for _ in range(2))
    first = _numbers(case, seed, 0)
    for step in (eager, replayed):
        step.feed(first)
    step_again = replayed.device.captured(replayed.launch)
    step_again()  # a step that runs twice or three times writes the same
    eager.launch(device.launcher)
    _compare(eager, replayed, 0)
    for number in range(1, steps):
        numbers = _numbers(case, seed, number)
        eager.feed(numbers)
        replayed.feed(numbers)
        eager.launch(device.launcher)
        step_again()
        _compare(eager, replayed, number)


def _compare(eager: _Step, replayed: _Step, number: int) -> None:
    left, right = eager.download(), replayed.download()
    for name, array in left.items():
        same = array.tobytes() == right[name].tobytes()
        assert same, f"{name} after step {number} is not what the launches one by one give"
    shown = [name for name in ("attended", "y", "values") if np.isnan(left[name].astype(np.float32)).any()]
    assert not shown, f"{', '.join(shown)} after step {number}: something was not written"


def _made(device: CheckedDevice, case: RollingCase, seed: int) -> _Step:
    given = inputs_of(replace(case, seed=seed))
    rows = len(case.starts)
    mixed = mixture(rows, CHOSEN, EXPERTS, 64, 104, seed=seed)
    stacks = {name: _without_nan(getattr(mixed, field)) for name, field in _STACKS.items()}
    arrays = {**_named(given), **_numbers(case, seed, 0), "x": mixed.x_NC, **stacks}
    inputs = {name: device.upload(array) for name, array in arrays.items()}
    results = {
        "attended": device.empty(given.query_BTHD.shape, given.query_BTHD.dtype),
        "key_ring": device.upload(_without_nan(given.key_ring_BGSD)),
        "value_ring": device.upload(_without_nan(given.value_ring_BGSD)),
        "weight": device.empty((rows, CHOSEN), np.float32),
        "expert": device.empty((rows, CHOSEN), np.int64),
        "y": device.empty(mixed.x_NC.shape, mixed.x_NC.dtype),
        "values": device.empty((rows, TOP), np.float32),
        "ids": device.empty((rows, TOP), np.int32),
    }
    limits = device.launcher.limits
    sizes = (
        rolling_attention_workspace_bytes(case.problem, limits),
        mixture_workspace_bytes(mixed.problem, limits),
        top_logits_workspace_bytes(TopProblem(rows, VOCABULARY, TOP), limits),
    )
    return _Step(device, case, mixed.problem, inputs, results, tuple(device.empty((size,), np.uint8) for size in sizes))


_STACKS = {"gate": "gate_EIC", "up": "up_EIC", "down": "down_ECI"}


def _named(inputs: RollingInputs) -> dict[str, Array]:
    return {
        "query": inputs.query_BTHD,
        "key": inputs.key_BTGD,
        "value": inputs.value_BTGD,
        "cos": inputs.cos_BTd,
        "sin": inputs.sin_BTd,
    }


def _numbers(case: RollingCase, seed: int, number: int) -> dict[str, Array]:
    """What changes from step to step. Rows leave now and then: those have a count of 0."""
    rng = np.random.default_rng([seed, number])
    rows = len(case.starts)
    return {
        **_named(inputs_of(replace(case, seed=seed + 1 + number))),
        "start": np.array([start + number for start in case.starts], np.int64),
        "count": (rng.random(rows) < 0.9).astype(np.int64),
        "router": rng.standard_normal((rows, EXPERTS), dtype=np.float32),
        "x": rng.standard_normal((rows, 64)).astype(TYPES["bfloat16"]),
        "logits": rng.standard_normal((rows, VOCABULARY), dtype=np.float32),
    }


def _without_nan(array: Array) -> Array:
    """Zeros in its place."""
    cleared = array.copy()
    cleared[np.isnan(array.astype(np.float32))] = 0
    return cleared
