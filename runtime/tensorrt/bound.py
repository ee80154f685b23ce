"""A context that is told only what has changed since it was told last."""

from __future__ import annotations

from runtime.tensorrt.device import Device
from runtime.tensorrt.plans import Context


class BoundContext:
    """Remembers shapes and addresses: an engine of 32 layers has hundreds, and most steps change none of them."""

    def __init__(self, context: Context, device: Device) -> None:
        self._context, self._device = context, device
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """The shape of an input, for the steps to come."""
        if self._shapes.get(name) != shape:
            self._device.synchronize()  # a step that still runs may use what the library derives from shapes
            self._context.set_shape(name, shape)
            self._shapes[name] = shape

    def set_address(self, name: str, address: int) -> None:
        """Where an input or output lies, for the steps to come."""
        if self._addresses.get(name) != address:
            self._context.set_address(name, address)
            self._addresses[name] = address

    def enqueue(self) -> None:
        """Queue a step."""
        self._context.enqueue()
