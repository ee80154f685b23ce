"""Steps of one shape as CUDA graphs: queued at once instead of kernel by kernel.

The first step of a kind runs as it is, since the library and our kernels load and set up what they need; the second one
is captured. A graph holds addresses, so it is good only as long as the memory behind them is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable

from runtime.errors import BackendError
from runtime.tensorrt.device import Device, Graph


class StepGraphs:
    """Graphs of steps by their kind. A new object begins anew, with no graph."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, Graph] = {}
        self.note: str | None = None
        """Why steps are queued kernel by kernel, a sentence for a person; None as long as they can be captured."""

    def run(self, kind: Hashable, queue: Callable[[], None]) -> None:
        """Queue a step of this kind. queue: does so kernel by kernel, with the same addresses and sizes each time."""
        if self.note is None and kind in self._seen and kind not in self._graphs:
            self._capture(kind, queue)
        if kind in self._graphs:
            self._graphs[kind].launch()
        else:
            queue()
            self._seen.add(kind)

    def _capture(self, kind: Hashable, queue: Callable[[], None]) -> None:
        # A collection may find memory of the GPU that somebody else lost, and to free it now would end the capture.
        collects = gc.isenabled()
        gc.disable()
        try:
            self._device.begin_capture()
            try:
                queue()
            finally:
                graph = self._device.end_capture()
        except BackendError as error:
            self.note = (
                "Steps of one token are queued kernel by kernel and not as a CUDA graph, which makes them slower, "
                f"since they cannot be captured here: {error}"
            )
            return
        finally:
            if collects:
                gc.enable()
        self._graphs[kind] = graph
