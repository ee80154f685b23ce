"""The rings of keys and values on the GPU.

Where a plugin writes new keys and values into the ring that it reads, past and present are one and the same memory.
Where the function body of the node was built in, nothing says that the library reads the old ring to its end before it
writes the new one: then there are two rings of each kind, and every step turns them around.

Letters: B batch rows, G KV heads, S slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

from runtime.engine_info import EngineInfo
from runtime.engine_weights import nbytes_of
from runtime.manifest import Manifest
from runtime.tensorrt.device import Device, aligned
from runtime.tensorrt.plans import KV_TYPES

IN_PLACE = frozenset({"RollingAttention", "PackedRollingAttention"})
"""The plugins that write a ring in place; all of a graph's attention is run by these, or none of it."""


def writes_in_place(info: EngineInfo) -> bool:
    """Whether an engine writes new keys and values into the rings that it reads."""
    return not IN_PLACE.isdisjoint(info.plugins)


class Rings:
    """Zeroed rings for `batch` rows, all in one piece of memory. Raises BackendError where it does not fit."""

    def __init__(self, manifest: Manifest, info: EngineInfo, device: Device, batch: int) -> None:
        model = manifest.model
        self._device = device
        self._turned = False
        self._in_place = writes_in_place(info)
        names: list[tuple[str, str, int]] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        for layer in manifest.kv.layers:
            shape = (batch, model.num_kv_heads, layer.capacity, model.head_dim)
            size = nbytes_of(KV_TYPES[info.kv], shape)
            names += [(layer.past_key, layer.present_key, size), (layer.past_value, layer.present_value, size)]
            self._shapes |= {layer.past_key: shape, layer.past_value: shape}
        self.nbytes = sum(size for *_, size in names) * (1 if self._in_place else 2)
        once = sum(aligned(size) for *_, size in names)
        self._held = device.allocate(once * (1 if self._in_place else 2), f"the KV buffers of {batch} rows")
        self._pairs: list[tuple[str, str, int, int]] = []
        address = self._held.address
        for past, present, size in names:
            self._pairs.append((past, present, address, address if self._in_place else address + once))
            address += aligned(size)
        self.clear()

    @property
    def turned(self) -> bool:
        """Whether past and present have changed places: with another answer, all addresses are others."""
        return self._turned

    def addresses(self) -> Iterator[tuple[str, int]]:
        """Where the next step finds and leaves each ring, by the names of the graph's inputs and outputs."""
        for past, present, one, other in self._pairs:
            yield past, other if self._turned else one
            yield present, one if self._turned else other

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Shape [B, G, S, D] of each ring that a step reads: a plan leaves B open until it is told."""
        yield from self._shapes.items()

    def roll(self) -> None:
        """What the last step wrote is what the next one reads."""
        self._turned = not self._turned and not self._in_place

    def clear(self) -> None:
        """Queue zeros for every slot: one that was never written has weight 0, but 0 times a stale NaN is a NaN."""
        self._device.zero(self._held.address, self._held.nbytes)

    def free(self) -> None:
        """Give the memory back."""
        self._held.free()
