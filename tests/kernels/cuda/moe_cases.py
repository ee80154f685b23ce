"""Cases of the kernels for mixtures of experts, on any device: against the operators' definitions in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from runtime.kernels.cuda.mixture_of_experts import (
    FEW_TOKENS,
    MixtureProblem,
    MixtureTensors,
    PackedMatrices,
    launch_mixture_of_experts,
    mixture_workspace_bytes,
)
from runtime.kernels.cuda.moe_gate import GateProblem, GateTensors, launch_moe_gate
from tests.support.activations import ACTIVATIONS
from tests.support.kernel_budgets import UNIT_ROUNDOFF, budget_of
from tests.support.kernel_devices import Device

Wide = npt.NDArray[np.float64]
Array = npt.NDArray[Any]
TYPES: dict[str, npt.DTypeLike] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


# -- the gate --


def run_gate(device: Device, logits_NE: npt.NDArray[np.float32], top_k: int) -> tuple[Array, Array]:
    N, E = logits_NE.shape
    logits = device.upload(logits_NE)
    weight, expert = device.empty((N, top_k), np.float32), device.empty((N, top_k), np.int64)
    launch_moe_gate(
        device.launcher, GateProblem(N, E, top_k), GateTensors(logits.address, weight.address, expert.address)
    )
    return device.download(weight), device.download(expert)


def check_gate(device: Device, logits_NE: npt.NDArray[np.float32], top_k: int) -> float:
    """Experts exactly, weights within the budget. Logits are finite or -inf here. Returns the share of it used."""
    weight_NK, expert_NK = run_gate(device, logits_NE, top_k)
    best_NK = np.argsort(-logits_NE, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(expert_NK, best_NK)
    best = np.take_along_axis(logits_NE.astype(np.float64), best_NK, axis=1)
    distance = best[:, :1] - best
    weights = np.exp(-distance)
    truth = weights / weights.sum(axis=1, keepdims=True)
    finite = np.where(np.isfinite(distance), distance, 0)
    allowed = budget_of("moe_gate") * UNIT_ROUNDOFF["float32"] * truth * (1 + finite)
    share = np.abs(weight_NK - truth) / (allowed + np.finfo(np.float32).tiny)
    assert (share <= 1).all()
    return float(share.max(initial=0))


# -- the mixture --


@dataclass(frozen=True, slots=True)
class Mixture:
    """Inputs of one call, as they are stored."""

    x_NC: Array
    weight_NK: npt.NDArray[np.float32]
    expert_NK: npt.NDArray[np.int64]
    gate_EIC: Array
    up_EIC: Array
    down_ECI: Array
    activation: str

    @property
    def problem(self) -> MixtureProblem:
        (N, K), (E, I, C) = self.expert_NK.shape, self.gate_EIC.shape
        element = next(name for name, dtype in TYPES.items() if self.x_NC.dtype == dtype)
        return MixtureProblem(N, C, I, E, K, self.activation, element)

    def tokens(self, chosen: Sequence[int] | Array) -> Mixture:
        """The same with some tokens, in another order perhaps."""
        return replace(self, x_NC=self.x_NC[chosen], weight_NK=self.weight_NK[chosen], expert_NK=self.expert_NK[chosen])


def mixture(
    N: int, K: int, E: int, C: int, I: int, *, activation: str = "silu", element: str = "bfloat16", seed: int = 0
) -> Mixture:
    """Random experts for each token; every seventh token's last weight is zero. Experts nobody reads hold NaN."""
    rng = np.random.default_rng([seed, N, K, E, C, I])
    dtype = TYPES[element]
    expert = np.array([rng.permutation(E)[:K] for _ in range(N)], np.int64).reshape(N, K)
    weight = rng.random((N, K), dtype=np.float32) + np.float32(0.1)
    if K > 1:
        weight[3::7, -1] = 0
    gate, up = (rng.standard_normal((2, E, I, C)) / np.sqrt(C / 2)).astype(dtype)
    down = (rng.standard_normal((E, C, I)) / np.sqrt(I)).astype(dtype)
    idle = np.setdiff1d(np.arange(E), expert[weight != 0])
    for stack in (gate, up, down):
        stack[idle] = np.nan
    return Mixture(rng.standard_normal((N, C)).astype(dtype), weight, expert, gate, up, down, activation)


def packed_mixture(
    N: int,
    K: int,
    E: int,
    C: int,
    I: int,
    packed: PackedMatrices,
    *,
    element: str = "bfloat16",
    seed: int = 0,
) -> PackedMixture:
    """As `mixture`, with random numbers and zero points, those that fill up the last block among them."""
    plain = mixture(N, K, E, C, I, element=element, seed=seed)
    rng = np.random.default_rng([seed, N, K, E, C, I, packed.bits, packed.block])
    parts: dict[str, Array] = {}
    wide: dict[str, Wide] = {}
    for name, R, columns in (("gate", I, C), ("up", I, C), ("down", C, I)):
        # As graph_passes.ops.quantized_matmul lays rows out, which a machine with a GPU may lack the packages for.
        B = -(-columns // packed.block)
        zero_bytes = -(-B * packed.bits // 8)
        numbers = rng.integers(0, 256, (E, R, B, packed.block * packed.bits // 8), dtype=np.uint8)
        scale = (rng.random((E, R, B)) + 0.5).astype(packed.scales) / np.sqrt(columns) * 4 / 2**packed.bits
        zero = rng.integers(0, 256, (E, R, zero_bytes), dtype=np.uint8)
        scale = scale.astype(packed.scales)
        parts |= {name: numbers, f"{name}_scale": scale}
        q = _unpacked(numbers.reshape(E, R, -1), packed.bits).reshape(E, R, B, packed.block).astype(np.float64)
        z = np.full((E, R, B), 2.0 ** (packed.bits - 1))
        if packed.zero_points:
            parts[f"{name}_zero"] = zero
            z = _unpacked(zero, packed.bits)[..., :B].astype(np.float64)
        weights = scale.astype(np.float64)[..., None] * (q - z[..., None])
        wide[name] = weights.reshape(E, R, -1)[..., :columns]
    return PackedMixture(replace(plain, gate_EIC=wide["gate"], up_EIC=wide["up"], down_ECI=wide["down"]), packed, parts)


def _unpacked(stored: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Numbers along the last axis; the low half of a byte first."""
    if bits == 8:
        return stored
    return np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class PackedMixture:
    """wide: the same call with the matrices' values in float64. parts: what is stored, by MixtureTensors' fields."""

    wide: Mixture
    packed: PackedMatrices
    parts: Mapping[str, Array]

    def tokens(self, chosen: Sequence[int] | Array) -> PackedMixture:
        return replace(self, wide=self.wide.tokens(chosen))


def run_mixture(device: Device, case: Mixture | PackedMixture, *, skipped: int = 0) -> Array:
    """y. skipped: so many experts that nobody chooses, and that are nowhere in memory, come before the case's own."""
    if isinstance(case, PackedMixture):
        plain, parts = case.wide, case.parts
        problem = replace(plain.problem, packed=case.packed)
    else:
        plain, problem = case, case.problem
        parts = {"gate": case.gate_EIC, "up": case.up_EIC, "down": case.down_ECI}
    problem = replace(problem, experts=problem.experts + skipped)
    inputs = {"x": plain.x_NC, "weight": plain.weight_NK, "expert": plain.expert_NK + skipped, **parts}
    buffers = {name: device.upload(array) for name, array in inputs.items()}
    buffers["y"] = device.empty(plain.x_NC.shape, plain.x_NC.dtype)
    buffers["workspace"] = device.empty((mixture_workspace_bytes(problem, device.launcher.limits),), np.uint8)
    addresses = {name: buffer.address for name, buffer in buffers.items()}
    for name, array in parts.items():
        addresses[name] -= skipped * array[0].nbytes
    launch_mixture_of_experts(device.launcher, problem, MixtureTensors(**addresses))
    device.download(buffers["workspace"])  # looks at its guards
    return device.download(buffers["y"])


def truth_and_allowed(case: Mixture, rounded_weights: bool = False) -> tuple[Wide, Wide]:
    """The definition in float64, and how far off each number of y may be.

    hidden is rounded to the type of x once, y once. The first roundings are independent of each other and weigh as
    much as weight · down · hidden does; their sum is measured by its root of squares. rounded_weights: the matrices
    are rounded to the type of x as well, as packed ones are for tensor cores.
    """
    C, I = case.gate_EIC.shape[2], case.gate_EIC.shape[1]
    element = case.problem.element
    truth = np.zeros(case.x_NC.shape)
    rounded = np.zeros(case.x_NC.shape)
    summed = np.zeros(case.x_NC.shape)
    for n, x in enumerate(case.x_NC.astype(np.float64)):
        for weight, e in zip(case.weight_NK[n].astype(np.float64), case.expert_NK[n], strict=True):
            if weight == 0:
                continue
            gate, up, down = (stack[e].astype(np.float64) for stack in (case.gate_EIC, case.up_EIC, case.down_ECI))
            g, u = gate @ x, up @ x
            active = ACTIVATIONS[case.activation](g)
            truth[n] += weight * (down @ (active * u))
            least = np.float64(np.finfo(np.float16).smallest_subnormal) if element == "float16" else 0.0
            rounded[n] += weight**2 * (down**2 @ (np.abs(active * u) + least / UNIT_ROUNDOFF[element]) ** 2)
            slope = np.maximum(1.2, 2 * np.abs(g))
            spread = (np.abs(gate) @ np.abs(x)) * slope * np.abs(u) + (np.abs(up) @ np.abs(x)) * np.abs(active)
            if rounded_weights:
                slopes = (gate**2 @ x**2) * (slope * u) ** 2 + (up**2 @ x**2) * active**2
                rounded[n] += weight**2 * (down**2 @ (slopes + (active * u) ** 2))
            summed[n] += (
                weight**2 * (down**2 @ (C * spread**2)) + (weight * (np.abs(down) @ np.abs(active * u))) ** 2 * I
            )
    allowed = UNIT_ROUNDOFF[element] * (np.abs(truth) + budget_of("moe_hidden") * np.sqrt(rounded))
    return truth, allowed + budget_of("moe_sums") * UNIT_ROUNDOFF["float32"] * np.sqrt(summed)


def check_mixture(device: Device, case: Mixture | PackedMixture) -> Array:
    """Runs it; returns y."""
    y = run_mixture(device, case)
    if isinstance(case, PackedMixture):
        truth, allowed = truth_and_allowed(case.wide, rounded_weights=len(y) > FEW_TOKENS)
    else:
        truth, allowed = truth_and_allowed(case)
    off = np.abs(y.astype(np.float64) - truth)
    assert (off <= allowed).all(), f"{np.nanmax(off / allowed)} times what is allowed"
    return y


def same_bits(left: Array, right: Array) -> None:
    np.testing.assert_array_equal(left.view(np.uint16), right.view(np.uint16))
