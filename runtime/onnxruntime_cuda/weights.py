"""An engine's weights out of the bundle's files: on the device once for all sessions, or given to each session.

INPUT weights are copied piece by piece into one block of the device's memory, which all graphs read. CONSTANT weights
become initializers, because the library puts them in an order of its own when it makes a session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.bundle import Bundle, Progress
from runtime.engine_info import INPUT, EngineWeight
from runtime.engine_weights import LOADING, weight_bytes, whole_pieces, whole_weight
from runtime.errors import BundleError
from runtime.onnxruntime_cuda.interface import ELEMENT_TYPES
from runtime.onnxruntime_cuda.place import Block, Bytes, Memory, aligned
from runtime.step_engine_info import CONSTANT, StepEngineInfo

_AT_ONCE = 16 << 20
"""Bytes of a copy: so much that copies run at full speed, so little that progress is seen."""

_NUMPY = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""By bytes of a number: only the size counts where a library is told the type."""


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """INPUT weights on the device. addresses: by name."""

    block: Block
    addresses: Mapping[str, int]


Report = Callable[[int], None]
"""Called with the bytes of what has been loaded since the last call."""


def report_loading(info: StepEngineInfo, progress: Progress | None) -> Report:
    """Adds up what is loaded of all weights, and tells `progress`. Raises BundleError for a type that is not known."""
    total, done = sum(weight_bytes(info, weight) for weight in info.tensors), 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(LOADING, done, total)

    return report


def upload_weights(bundle: Bundle, info: StepEngineInfo, memory: Memory, report: Report) -> DeviceWeights:
    """Bring every INPUT weight of an engine to the device.

    Raises BundleError as `whole_pieces` does, BackendError when the device's memory does not suffice; then it is as it
    was before.
    """
    weights = [weight for weight in info.tensors if weight.role == INPUT]
    sizes = [weight_bytes(info, weight) for weight in weights]
    offsets = [0, *accumulate(aligned(size) for size in sizes)]
    block = memory.allocate(offsets.pop(), f"the weights of the engine {info.name}")
    try:
        addresses = {weight.name: block.address + offset for weight, offset in zip(weights, offsets, strict=True)}
        for weight in weights:
            address = addresses[weight.name]
            for piece in whole_pieces(bundle, info, weight):
                for part in _parts(piece):
                    memory.write(address, part)
                    address += part.nbytes
                    report(part.nbytes)
    except BaseException:  # who keeps the error keeps this frame as well, and would keep the memory with it
        block.free()
        raise
    return DeviceWeights(block, addresses)


def constant_weights(bundle: Bundle, info: StepEngineInfo, report: Report) -> dict[str, Any]:
    """Every CONSTANT weight of an engine on the host, as ONNX Runtime takes it, by name: mapped where it lies in a file
    as it is, made otherwise. Raises BundleError as `whole_pieces` does, and for a type that is not known."""
    found = {}
    for weight in info.tensors:
        if weight.role == CONSTANT:
            found[weight.name] = _value(bundle, info, weight)
            report(weight_bytes(info, weight))
    return found


def _value(bundle: Bundle, info: StepEngineInfo, weight: EngineWeight) -> Any:
    if weight.dtype not in ELEMENT_TYPES:
        raise BundleError(
            f"The weight {weight.name} of the engine {info.name} is of the type {weight.dtype!r}, which no graph of "
            "ONNX Runtime reads as a constant. Build the engine again with `cierzo build`."
        )
    content = whole_weight(bundle, info, weight)
    count = int(np.prod(weight.shape, dtype=np.int64))
    numbers = content.view(_NUMPY[content.nbytes // count] if count else np.uint8).reshape(weight.shape)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(numbers, ELEMENT_TYPES[weight.dtype].onnx)


def _parts(content: Bytes) -> Iterable[Bytes]:
    return (content[begin : begin + _AT_ONCE] for begin in range(0, content.nbytes, _AT_ONCE))
