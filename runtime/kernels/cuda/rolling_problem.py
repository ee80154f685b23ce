"""What the launchers of rolling attention are given: sizes, and where the tensors lie on the device.

Letters: B batch rows, T tokens of a chunk, H query heads, G KV heads, D head dim, S slots of a ring, W window.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import BackendError

ACTIVATION_TYPES = ("bfloat16", "float16")
RING_TYPES = ("bfloat16", "float16", "float8")
HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 160, 192, 256)
"""Multiples of a tensor core's 16, as far as a tile of keys and values fits into shared memory."""


@dataclass(frozen=True, slots=True)
class RollingProblem:
    """One call of RollingAttention, whose definition is `graph_passes.ops.rolling_attention`.

    window: 0 is full attention. activations: type of query, key, value and result; cos and sin are float32. ring: type
    of both rings; "float8" is e4m3 without a scale. interleaved: pairs 2i, 2i + 1 turn, not i, i + D/2.
    query_stride, key_stride, value_stride: elements from one token to the next; 0 is as many as a token has.

    Raises BackendError for what the kernels do not compute: other types, a head dim that is none of HEAD_DIMS, heads
    that do not share KV heads evenly, and a ring that is too small for window and chunk.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    window: int
    scale: float
    interleaved: bool
    activations: str
    ring: str
    query_stride: int = 0
    key_stride: int = 0
    value_stride: int = 0

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATION_TYPES or self.ring not in RING_TYPES:
            raise BackendError(
                f"The CUDA kernels of RollingAttention take activations of {', '.join(ACTIVATION_TYPES)} and rings of "
                f"{', '.join(RING_TYPES)}, not {self.activations} with {self.ring}. Build with one of these, or "
                "without plugins."
            )
        if self.head_dim not in HEAD_DIMS:
            raise BackendError(
                f"The CUDA kernels of RollingAttention take head dims {', '.join(map(str, HEAD_DIMS))}, not "
                f"{self.head_dim}. Build without plugins."
            )
        if self.heads % self.kv_heads:
            raise BackendError(f"{self.heads} query heads cannot share {self.kv_heads} KV heads evenly.")
        least = self.tokens if self.window == 0 else self.window + self.tokens - 1
        if self.slots < least:
            raise BackendError(
                f"A ring of {self.slots} slots is too small for {self.tokens} tokens with a window of {self.window}: "
                f"it needs {least}."
            )


@dataclass(frozen=True, slots=True)
class RollingTensors:
    """Device addresses. query [B, T, H, D], key and value [B, T, G, D], cos and sin [B, T, D/2], start and count [B].

    key_ring, value_ring: [B, G, S, D], read and written in place. attended: [B, T, H, D]. workspace: as many bytes as
    the launcher asks for, aligned to 256. start and count are int64.
    """

    query: int
    key: int
    value: int
    cos: int
    sin: int
    key_ring: int
    value_ring: int
    start: int
    count: int
    attended: int
    workspace: int
