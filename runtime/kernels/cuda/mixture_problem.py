"""What the launchers of mixtures of experts are given: sizes, and where the tensors lie on the device.

Letters: N tokens, C hidden size, I intermediate size of an expert, E experts, K experts that a token chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import BackendError
from runtime.kernels.cuda.moe_gate import refuse_sizes

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh")
ELEMENTS = {"bfloat16": "BFloat16", "float16": "Float16"}
"""Types of x, the experts' matrices and y, and what the kernels call them."""
SCALES = {"float16": "Float16", "float32": "float"}
BLOCKS = (32, 64, 128, 256)
"""Numbers that share a scale: a tensor core's tile is 32 deep, and has one."""
WIDTH = 8
"""Numbers in the 16 bytes that a thread loads at once: a row is a whole number of these."""
FEW_TOKENS = 8
"""Up to so many tokens are computed as dot products at the speed of memory, more of them on tensor cores."""
MOST_TOKENS = 1 << 24
"""So that N · K fits into 32 bits with room to spare."""


@dataclass(frozen=True, slots=True)
class PackedMatrices:
    """How the matrices of QuantizedMixtureOfExperts are stored (`graph_passes.ops.quantized_moe`).

    bits: 4 or 8. block: numbers that share a scale. scales: the type of the scales. zero_points: whether each block
    has one, or 8 (4 bits) or 128 (8 bits) is the zero of all. Raises BackendError for what the kernels do not compute.
    """

    bits: int
    block: int
    scales: str
    zero_points: bool

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.block not in BLOCKS or self.scales not in SCALES:
            raise BackendError(
                f"The CUDA kernels of QuantizedMixtureOfExperts take 4 or 8 bits, blocks of "
                f"{', '.join(map(str, BLOCKS))} and scales of {' or '.join(SCALES)}, not {self.bits} bits, blocks of "
                f"{self.block} and {self.scales}. Quantize with one of these, or build without plugins."
            )

    @property
    def definitions(self) -> dict[str, str | int]:
        return {"BITS": self.bits, "SCALE": SCALES[self.scales], "ZEROS": int(self.zero_points)}


@dataclass(frozen=True, slots=True)
class MixtureProblem:
    """One call of MixtureOfExperts, whose definition is `graph_passes.ops.moe`.

    packed: how quantized matrices are stored; None where they are of the type `element`.
    activation: what the gated unit's gate goes through, as the operator names it. element: the type of x, matrices, y.

    Raises BackendError for what the kernels do not compute: other activations and types, sizes that are not multiples
    of 8, more than 256 experts, more than 16 chosen of them.
    """

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    activation: str
    element: str
    packed: PackedMatrices | None = None

    def __post_init__(self) -> None:
        refuse_sizes(self.experts, self.top_k)
        if self.element not in ELEMENTS or self.activation not in ACTIVATIONS:
            raise BackendError(
                f"The CUDA kernels of MixtureOfExperts take numbers of {' or '.join(ELEMENTS)} and the activations "
                f"{', '.join(ACTIVATIONS)}, not {self.element} with {self.activation}. Build with one of these, or "
                "without plugins."
            )
        for name, size in (("hidden", self.hidden), ("intermediate", self.intermediate)):
            if size < WIDTH or size % WIDTH or size >= 1 << 31:
                raise BackendError(
                    f"The CUDA kernels of MixtureOfExperts take hidden and intermediate sizes that are multiples of "
                    f"{WIDTH}, and the {name} size is {size}. Build without plugins."
                )
        if not 0 <= self.tokens <= MOST_TOKENS:
            raise BackendError(
                f"The CUDA kernels of MixtureOfExperts take up to {MOST_TOKENS} tokens at once, not {self.tokens}."
            )

    @property
    def definitions(self) -> dict[str, str | int]:
        """What kernels are told of the types."""
        return {"ELEMENT": ELEMENTS[self.element]} | (self.packed.definitions if self.packed else {})

    @property
    def block(self) -> int:
        """Numbers that share a scale, or 0."""
        return self.packed.block if self.packed else 0

    @property
    def assignments(self) -> int:
        """N · K."""
        return self.tokens * self.top_k


@dataclass(frozen=True, slots=True)
class MixtureTensors:
    """Device addresses, aligned to 16. x [N, C]; weight float32 [N, K]; expert int64 [N, K]; gate and up [E, I, C];
    down [E, C, I]; y [N, C], written. workspace: as many bytes as the launcher asks for, aligned to 256.

    Of packed matrices gate and up are uint8 [E, I, B, b], down [E, C, B, b], scales [E, R, B] and, where there are zero
    points, these uint8 [E, R, Z].
    """

    x: int
    weight: int
    expert: int
    gate: int
    up: int
    down: int
    y: int
    workspace: int
    gate_scale: int = 0
    up_scale: int = 0
    down_scale: int = 0
    gate_zero: int = 0
    up_zero: int = 0
    down_zero: int = 0

    @property
    def gate_parts(self) -> tuple[int, int, int]:
        return self.gate, self.gate_scale, self.gate_zero

    @property
    def up_parts(self) -> tuple[int, int, int]:
        return self.up, self.up_scale, self.up_zero

    @property
    def down_parts(self) -> tuple[int, int, int]:
        return self.down, self.down_scale, self.down_zero
