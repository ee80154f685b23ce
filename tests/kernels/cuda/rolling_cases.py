"""Cases of rolling attention's CUDA kernels, on any device: against RollingAttention's definition in float64.

Rings are compared bit by bit: keys are turned in float32 as the kernels spell it, and that is held against float64.
Attention is computed in float64 from what the rings then hold, each visible position looked up in its slot. All slots
that no token sees hold NaN before the step, and everything that a kernel is to write does too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from runtime.kernels.cuda.launch import DeviceLimits, Launcher
from runtime.kernels.cuda.rolling_problem import RollingProblem, RollingTensors
from tests.support.kernel_budgets import UNIT_ROUNDOFF, budget_of
from tests.support.kernel_devices import Buffer, Device

Array = npt.NDArray[Any]
Wide = npt.NDArray[np.float64]
TYPES: dict[str, npt.DTypeLike] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8": ml_dtypes.float8_e4m3fn,
}
SMALLEST_NORMAL = {"bfloat16": 2.0**-126, "float16": 2.0**-14}
Launch = Callable[[Launcher, RollingProblem, RollingTensors], None]
WorkspaceBytes = Callable[[RollingProblem, DeviceLimits], int]


@dataclass(frozen=True, slots=True)
class RollingCase:
    """One call. starts, counts: of the rows. magnitude: of queries, keys. packed: they and values lie side by side."""

    window: int
    slots: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    interleaved: bool = False
    activations: str = "bfloat16"
    ring: str = "bfloat16"
    magnitude: float = 1.0
    packed: bool = False
    seed: int = 0

    @property
    def problem(self) -> RollingProblem:
        stride = (self.heads + 2 * self.kv_heads) * self.head_dim if self.packed else 0
        return RollingProblem(
            batch=len(self.starts),
            tokens=self.tokens,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            slots=self.slots,
            window=self.window,
            scale=self.head_dim**-0.5,
            interleaved=self.interleaved,
            activations=self.activations,
            ring=self.ring,
            query_stride=stride,
            key_stride=stride,
            value_stride=stride,
        )

    def seen(self, position: int) -> npt.NDArray[np.int64]:
        """The slots that a token at this position sees, the oldest first."""
        first = 0 if self.window == 0 else max(0, position - self.window + 1)
        return np.arange(first, position + 1) % self.slots

    def written(self, row: int) -> npt.NDArray[np.int64]:
        """The slots of the tokens that count, in their order."""
        return (self.starts[row] + np.arange(self.counts[row])) % self.slots

    def visible(self, row: int) -> npt.NDArray[np.bool_]:
        """Of each slot, whether a token of the step sees what it held before."""
        mask = np.zeros(self.slots, bool)
        for t in range(self.counts[row]):
            mask[self.seen(self.starts[row] + t)] = True
        mask[self.written(row)] = False
        return mask


@dataclass(frozen=True, slots=True)
class RollingInputs:
    query_BTHD: Array
    key_BTGD: Array
    value_BTGD: Array
    cos_BTd: Array
    sin_BTd: Array
    key_ring_BGSD: Array
    value_ring_BGSD: Array


@dataclass(frozen=True, slots=True)
class RollingResults:
    attended_BTHD: Array
    key_ring_BGSD: Array
    value_ring_BGSD: Array


def inputs_of(case: RollingCase) -> RollingInputs:
    """Fresh numbers. Cosine and sine are not on the unit circle: nothing may cancel or be swapped."""
    rng = np.random.default_rng(case.seed)
    B, T, H, G, D = len(case.starts), case.tokens, case.heads, case.kv_heads, case.head_dim
    activation, ring = TYPES[case.activations], TYPES[case.ring]
    rings = rng.standard_normal((2, B, G, case.slots, D)).astype(ring)
    for row in range(B):
        rings[:, row, :, ~case.visible(row)] = np.nan
    return RollingInputs(
        query_BTHD=(case.magnitude * rng.standard_normal((B, T, H, D))).astype(activation),
        key_BTGD=(case.magnitude * rng.standard_normal((B, T, G, D))).astype(activation),
        value_BTGD=rng.standard_normal((B, T, G, D)).astype(activation),
        cos_BTd=rng.standard_normal((B, T, D // 2)).astype(np.float32),
        sin_BTd=rng.standard_normal((B, T, D // 2)).astype(np.float32),
        key_ring_BGSD=rings[0],
        value_ring_BGSD=rings[1],
    )


@dataclass(frozen=True, slots=True)
class RollingBuffers:
    """A case's tensors on a device."""

    tensors: RollingTensors
    attended: Buffer
    key_ring: Buffer
    value_ring: Buffer
    held: tuple[Buffer, ...]

    def download(self, device: Device) -> RollingResults:
        for buffer in self.held:
            device.download(buffer)  # looks at what is around it
        return RollingResults(
            device.download(self.attended), device.download(self.key_ring), device.download(self.value_ring)
        )


def upload(
    device: Device, case: RollingCase, inputs: RollingInputs, workspace_bytes: int, workspace: Buffer | None = None
) -> RollingBuffers:
    """workspace: one that is there already, if it is to be used again."""
    projected = [inputs.query_BTHD, inputs.key_BTGD, inputs.value_BTGD]
    if case.packed:
        projected = [np.concatenate(projected, axis=2)]
    others = inputs.cos_BTd, inputs.sin_BTd, np.array(case.starts, np.int64), np.array(case.counts, np.int64)
    read = [device.upload(array) for array in (*others, *projected)]
    cos, sin, start, count, query, *apart = (buffer.address for buffer in read)
    head_bytes = inputs.query_BTHD.itemsize * case.head_dim
    side_by_side = [query + head_bytes * heads for heads in (case.heads, case.heads + case.kv_heads)]
    key, value = side_by_side if case.packed else apart
    key_ring, value_ring = device.upload(inputs.key_ring_BGSD), device.upload(inputs.value_ring_BGSD)
    attended = device.empty(inputs.query_BTHD.shape, inputs.query_BTHD.dtype)
    if workspace is None:
        workspace = device.empty((workspace_bytes,), np.uint8)
    tensors = RollingTensors(
        query=query,
        key=key,
        value=value,
        cos=cos,
        sin=sin,
        key_ring=key_ring.address,
        value_ring=value_ring.address,
        start=start,
        count=count,
        attended=attended.address,
        workspace=workspace.address,
    )
    return RollingBuffers(tensors, attended, key_ring, value_ring, (*read, workspace))


def run(
    device: Device, case: RollingCase, inputs: RollingInputs, launch: Launch, workspace_bytes: WorkspaceBytes
) -> RollingResults:
    buffers = upload(device, case, inputs, workspace_bytes(case.problem, device.launcher.limits))
    launch(device.launcher, case.problem, buffers.tensors)
    return buffers.download(device)


def check(device: Device, case: RollingCase, launch: Launch, workspace_bytes: WorkspaceBytes) -> float:
    """Returns the largest error as a share of what is allowed."""
    inputs = inputs_of(case)
    results = run(device, case, inputs, launch, workspace_bytes)
    check_rings(case, inputs, results)
    return check_attended(case, inputs, results)


def turned(case: RollingCase, x_BTHD: Array, cos_BTd: Array, sin_BTd: Array) -> npt.NDArray[np.float32]:
    """RoPE in float32, each number a product, rounded, and another one added to it with one rounding."""
    x, half = x_BTHD.astype(np.float32), case.head_dim // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if case.interleaved else (x[..., :half], x[..., half:])
    cos, sin = cos_BTd[:, :, None], sin_BTd[:, :, None]
    pair = (_fused(first, cos, -(second * sin)), _fused(second, cos, first * sin))
    for narrow, (a, b) in zip(pair, ((first, -second), (second, first)), strict=True):
        products = a.astype(np.float64) * cos, b.astype(np.float64) * sin
        weight = np.abs(products[0]) + np.abs(products[1])
        off = np.abs(narrow - (products[0] + products[1]))
        assert not (off > 2 * UNIT_ROUNDOFF["float32"] * weight).any()
    return np.stack(pair, -1).reshape(x.shape) if case.interleaved else np.concatenate(pair, -1)


def _fused(a: Array, b: Array, c: Array) -> npt.NDArray[np.float32]:
    """a · b + c with one rounding to float32: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def stored(case: RollingCase, x: npt.NDArray[np.float32]) -> Array:
    """What a ring holds of x: NaN for what its type, or then that of the activations, has no finite number for."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = x.astype(TYPES[case.ring])
        seen = rounded.astype(np.float32).astype(TYPES[case.activations]).astype(np.float32)
    rounded[~np.isfinite(seen)] = np.nan
    return rounded


def rings_after(case: RollingCase, inputs: RollingInputs) -> tuple[Array, Array]:
    """Both rings after the step."""
    key = turned(case, inputs.key_BTGD, inputs.cos_BTd, inputs.sin_BTd)
    rings = inputs.key_ring_BGSD.copy(), inputs.value_ring_BGSD.copy()
    for ring, new in zip(rings, (key, inputs.value_BTGD.astype(np.float32)), strict=True):
        for row, count in enumerate(case.counts):
            ring[row, :, case.written(row)] = stored(case, new[row, :count])
    return rings


def check_rings(case: RollingCase, inputs: RollingInputs, results: RollingResults) -> None:
    """Every bit, but for those of NaN."""
    after = rings_after(case, inputs)
    for found, expected in zip((results.key_ring_BGSD, results.value_ring_BGSD), after, strict=True):
        np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


def rotated_query(case: RollingCase, inputs: RollingInputs) -> Array:
    """[B, T, H, D] of the activations' type; zeros where a token does not count."""
    query = turned(case, inputs.query_BTHD, inputs.cos_BTd, inputs.sin_BTd).astype(inputs.query_BTHD.dtype)
    for row, count in enumerate(case.counts):
        query[row, count:] = 0
    return query


def check_attended(
    case: RollingCase, inputs: RollingInputs, results: RollingResults, tokens: Collection[int] | None = None
) -> float:
    """Within the budget of every number, zeros where a token does not count, NaN where what it sees holds one.

    tokens: of a row, which are computed anew, if not all. Returns the largest error as a share of what is allowed.
    """
    largest = 0.0
    query = rotated_query(case, inputs).astype(np.float64)
    group = case.heads // case.kv_heads
    activation = TYPES[case.activations]
    for row, (start, count) in enumerate(zip(case.starts, case.counts, strict=True)):
        assert not results.attended_BTHD[row, count:].astype(np.float32).any()
        for t in (t for t in range(count) if tokens is None or t in tokens):
            slots = case.seen(start + t)
            key, value = (
                ring[row][:, slots].astype(np.float32).astype(activation).astype(np.float64)
                for ring in (results.key_ring_BGSD, results.value_ring_BGSD)
            )
            grouped = query[row, t].reshape(case.kv_heads, group, case.head_dim)
            truth, allowed = attention(grouped, key, value, case.problem.scale, case.activations)
            found = results.attended_BTHD[row, t].astype(np.float64).reshape(truth.shape)
            np.testing.assert_array_equal(np.isnan(found), np.isnan(truth))
            off = np.abs(found - truth)
            worst = np.nanmax(np.where(np.isnan(truth), 0, off / allowed))
            assert worst <= 1, f"row {row}, token {t}: {worst} times what is allowed"
            largest = max(largest, float(worst))
    return largest


def attention(query_GRD: Wide, key_GND: Wide, value_GND: Wide, scale: float, activations: str) -> tuple[Wide, Wide]:
    """Attention of each KV head's R query heads to N positions, and what a kernel may be off by, both [G, R, D].

    Rounding a weight matters by how far its value is from the mean: weights that are rounded are also what is added up.
    """
    score = scale * np.einsum("grd,gnd->grn", query_GRD, key_GND)
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    attended = np.einsum("grn,gnd->grd", weight, value_GND)
    distance = np.abs(value_GND[:, None] - attended[:, :, None])
    spread = np.einsum("grn,grnd->grd", weight, distance)
    size = np.einsum("grn,gnd->grd", weight, np.abs(value_GND))
    products = scale * np.einsum("grd,gnd->grn", np.abs(query_GRD), np.abs(key_GND)).max(-1, keepdims=True)
    unit, unit32 = UNIT_ROUNDOFF[activations], UNIT_ROUNDOFF["float32"]
    smallest = SMALLEST_NORMAL[activations]
    allowed = budget_of("rolling_attended") * unit * (np.abs(attended) + smallest)
    allowed += budget_of("rolling_weights") * unit * spread
    allowed += budget_of("rolling_weights") * unit * smallest * weight.max(-1, keepdims=True) * distance.sum(-2)
    allowed += budget_of("rolling_sums") * unit32 * (size + products * spread)
    return attended, allowed
