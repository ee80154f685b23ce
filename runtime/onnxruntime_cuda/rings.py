"""The KV rings of an engine, and the memory that its windowed layers use in turn, on the device.

A graph writes new keys and values into the rings that it reads: past and present are bound to one address.

Letters: B batch rows, G KV heads, D head dim, S slots of a ring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from runtime.engine_weights import nbytes_of
from runtime.errors import BackendError
from runtime.manifest import Manifest
from runtime.onnxruntime_cuda.interface import ring_shapes, ring_type
from runtime.onnxruntime_cuda.place import MOST_NUMBERS, Memory, aligned
from runtime.onnxruntime_cuda.sessions import Binding
from runtime.step_engine_info import PAGE, Scratch, StepEngineInfo


class Rings:
    """Zeroed rings [B, S, G·D] for `batch` rows, all in one block.

    Raises BackendError where they do not fit, or are larger than ONNX Runtime's kernels can count.
    """

    def __init__(self, manifest: Manifest, info: StepEngineInfo, memory: Memory, batch: int) -> None:
        self._info, self._memory, self._dtype = info, memory, ring_type(info)
        self._shapes = {name: (batch, *shape) for name, shape in ring_shapes(manifest, info).items()}
        for shape in self._shapes.values():
            _check_count(shape, batch)
        sizes = {name: nbytes_of(self._dtype, shape) for name, shape in self._shapes.items()}
        self.nbytes = sum(sizes.values())
        self._block = memory.allocate(sum(map(aligned, sizes.values())), f"the KV buffers of {batch} rows")
        self._addresses: dict[str, int] = {}
        address = self._block.address
        for name, size in sizes.items():
            self._addresses[name] = address
            address += aligned(size)

    def bind(self, binding: Binding) -> None:
        """Bind each ring as past and present."""
        for ring in self._info.rings:
            for past, present in ((ring.past_key, ring.present_key), (ring.past_value, ring.present_value)):
                binding.input(past, self._dtype, self._shapes[past], self._addresses[past])
                binding.output(present, self._dtype, self._shapes[past], self._addresses[past])

    def clear(self) -> None:
        """Zero every slot: one that was never written has weight 0, but 0 times a stale NaN is a NaN."""
        self._memory.zero(self._block)

    def free(self) -> None:
        """Give the memory back."""
        self._block.free()


class ScratchMemory:
    """Zeroed memory [B · S / PAGE, PAGE, G, D] for keys and as much for values; see step_engine_info.Scratch.

    Raises BackendError as `Rings` does.
    """

    def __init__(self, manifest: Manifest, dtype: str, scratch: Scratch, memory: Memory, batch: int) -> None:
        model, self._dtype, self._scratch = manifest.model, dtype, scratch
        self._shape = (batch * scratch.slots // PAGE, PAGE, model.num_kv_heads, model.head_dim)
        _check_count(self._shape, batch)
        self._offset = aligned(nbytes_of(dtype, self._shape))
        self._block = memory.allocate(2 * self._offset, f"the KV buffers of {batch} rows, laid out straight,")
        try:
            memory.zero(self._block)
        except BaseException:
            self._block.free()
            raise

    def bind(self, binding: Binding) -> None:
        """Bind all of the graph's outputs that use it."""
        for names, address in (
            (self._scratch.keys, self._block.address),
            (self._scratch.values, self._block.address + self._offset),
        ):
            for name in names:
                binding.output(name, self._dtype, self._shape, address)

    def free(self) -> None:
        """Give the memory back."""
        self._block.free()


def _check_count(shape: Sequence[int], batch: int) -> None:
    count = math.prod(shape)
    if count > MOST_NUMBERS:
        raise BackendError(
            f"A KV buffer of one layer would hold {count} numbers for {batch} rows, and ONNX Runtime's kernels count "
            f"up to {MOST_NUMBERS}. Feed fewer rows at once, or export the checkpoint again with a shorter context."
        )
