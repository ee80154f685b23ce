"""The weights that an engine's plans do not hold, out of the bundle's files.

INPUT weights are brought to the GPU once and read by all plans from there. They stream through two small pinned
buffers, one of which the GPU reads while the other is filled from the files. REFIT weights become part of each plan, so
they are made on the host first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from runtime.bundle import Bundle, Progress
from runtime.engine_info import INPUT, REFIT, EngineInfo
from runtime.engine_weights import LOADING, weight_bytes, whole_pieces, whole_weight
from runtime.errors import BackendError, BundleError
from runtime.tensorrt.device import Device, DeviceMemory, Fence, aligned
from runtime.tensorrt.plans import Plan
from runtime.weight_expression import Bytes

STAGING_BYTES = 16 << 20
"""Of each pinned buffer: large enough that copies run at full speed, small enough to pin at once."""


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """INPUT weights on the GPU, all in one piece of memory. addresses: by name."""

    memory: DeviceMemory
    addresses: dict[str, int]
    nbytes: int


def upload_weights(bundle: Bundle, info: EngineInfo, device: Device, progress: Progress | None) -> DeviceWeights:
    """Bring every INPUT weight of an engine to the GPU.

    Raises BundleError for a weight of which the bundle's files hold more or less than its shape and type take or that
    lies outside of them, BackendError when the GPU's memory does not suffice.
    """
    weights = [weight for weight in info.tensors if weight.role == INPUT]
    sizes = [weight_bytes(info, weight) for weight in weights]
    offsets = [0, *accumulate(aligned(size) for size in sizes)]
    memory = device.allocate(offsets.pop(), f"the weights of the engine {info.name}")
    addresses = {weight.name: memory.address + offset for weight, offset in zip(weights, offsets, strict=True)}
    stream, done = _Stream(device), 0
    for weight in weights:
        address = addresses[weight.name]
        for piece in whole_pieces(bundle, info, weight):
            for part in _parts(piece):
                stream.write(address, part)
                address += part.nbytes
                done += part.nbytes
                if progress is not None:
                    progress(LOADING, done, sum(sizes))
    device.synchronize()  # the staging buffers are given back now
    return DeviceWeights(memory, addresses, sum(sizes))


def refit(bundle: Bundle, info: EngineInfo, plans: Iterable[Plan]) -> None:
    """Fill every REFIT weight of an engine into each of its plans, made once for all of them.

    Raises BundleError for a weight that a plan has not or has otherwise, and as `upload_weights` does; BackendError
    when a plan takes one not, or lacks others.
    """
    weights = [weight for weight in info.tensors if weight.role == REFIT]
    if not weights:
        return
    made = {weight.name: whole_weight(bundle, info, weight) for weight in weights}
    for plan in plans:
        refitter = plan.refitter()
        for weight in weights:
            count = math.prod(weight.shape)
            if (found := refitter.prototype(weight.name)) != (weight.dtype, count):
                has = "none of that name" if found is None else f"{found[1]} numbers of {found[0]}"
                raise BundleError(
                    f"A plan of the engine {info.name} is to be given {weight.name}, {count} numbers of "
                    f"{weight.dtype}, and has {has}. Build it again with `cierzo build`."
                )
            if not refitter.set(weight.name, weight.dtype, count, made[weight.name].ctypes.data):
                raise BackendError(
                    f"A plan of the engine {info.name} does not take the weight {weight.name}. Build it again with "
                    "--weights embedded (weights='embedded')."
                )
        if missing := refitter.missing():
            raise BackendError(
                f"A plan of the engine {info.name} lacks {len(missing)} weights that engine.json does not tell how to "
                f"make, such as {missing[0]!r}. Build it again with `cierzo build`."
            )
        if not refitter.refit():
            raise BackendError(
                f"The weights of the engine {info.name} could not be filled into its plan. Build it again with "
                "--weights embedded (weights='embedded')."
            )


class _Stream:
    """Copies bytes of any number to the GPU through two pinned buffers in turn."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers = [device.pinned(STAGING_BYTES) for _ in range(2)]
        self._fences: list[Fence | None] = [None, None]
        self._turn = 0

    def write(self, address: int, part: Bytes) -> None:
        """Queue the copy of at most STAGING_BYTES."""
        fence = self._fences[self._turn]
        if fence is not None:
            fence.wait()  # the GPU may still be reading what this buffer held
        staged = self._buffers[self._turn].bytes[: part.nbytes]
        np.copyto(staged, part)
        self._device.copy_in(address, staged)
        self._fences[self._turn] = self._device.fence()
        self._turn ^= 1


def _parts(content: Bytes) -> Iterable[Bytes]:
    return (content[begin : begin + STAGING_BYTES] for begin in range(0, content.nbytes, STAGING_BYTES))
