"""What a backend is: a module with `CAPABILITIES` and `open_engine`, and an engine that runs steps.

Adding one takes a file in this folder and a line in the table of `runtime/backends/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.chunking import Int64Array


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can run exactly.

    devices: begins with the default. storage_types: in which weights may lie in files, as safetensors spells them.
    arithmetic: types that it computes in, as in the manifest.
    """

    name: str
    devices: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    storage_types: tuple[str, ...]
    arithmetic: tuple[str, ...]


class Engine(Protocol):
    """A loaded model with its KV buffers. It keeps no positions: the session passes them with every step."""

    @property
    def batch(self) -> int:
        """How many rows the KV buffers hold."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Bytes held for the KV buffers."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes this engine slower than it could be, each a sentence for a person; mostly nothing."""
        ...

    def allocate(self, batch: int) -> None:
        """Replace the KV buffers by zeroed ones for `batch` rows."""
        ...

    def clear(self) -> None:
        """Zero the KV buffers."""
        ...

    def step(self, input_ids: Int64Array, start_positions: Int64Array, token_counts: Int64Array) -> NDArray[np.float32]:
        """Feed int64 [B, T], [B], [B]; return float32 logits [B, T, V], valid until the next step."""
        ...


class Backend(Protocol):
    """The module of a backend, as the registry sees it."""

    CAPABILITIES: Capabilities

    def open_engine(self, bundle: Bundle, *, device: str, threads: int | None) -> Engine:
        """Load `bundle` on `device` with buffers for one row."""
        ...
