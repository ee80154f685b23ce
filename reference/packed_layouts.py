"""The tensors of a packed matrix [N, K] in the published layouts, and the integers, scales and zero points in them.

A linear layer `M` has, instead of a plain `M.weight` (K columns, G groups of them, b bits, words of 32 bits):

    gptq            M.qweight int32 [K*b/32, N]   words along K        M.scales [G, N]   M.g_idx int32 [K]
                    M.qzeros int32 [G, N*b/32]    words along N; what is stored is the zero point less one (gptq),
                                                  or the zero point (gptq_v2)
    awq             M.qweight int32 [K, N*b/32]   words along N, in the order 0 2 4 6 1 3 5 7 of each eight
                    M.qzeros int32 [G, N*b/32]    in the same order    M.scales [G, N]
    pack-quantized  M.weight_packed int32 [N, ⌈K*b/32⌉], words along K, of signed numbers plus half their range
                    M.weight_zero_point int32 [⌈N*b/32⌉, G], words along N; int8 [N, G] in files of early versions
                    M.weight_scale [N, G]         M.weight_shape [2]   M.weight_g_idx [K], if columns are reordered
    int-quantized   M.weight int8 [N, K]          M.weight_scale [N, G]   M.weight_zero_point int8 [N, G]

In each, value = scale * (q - zero). The first number of a word is in its lowest bits. Sources: the packing code of
https://github.com/AutoGPTQ/AutoGPTQ (qlinear_cuda.py), https://github.com/ModelCloud/GPTQModel (gptq_v2),
https://github.com/casper-hansen/AutoAWQ (linear/gemm.py), https://github.com/vllm-project/compressed-tensors
(compressors/pack_quantized, naive_quantized).

Readers of these files round each product to the type of the scale, or not, as their kernels do. Here it is not rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from reference.checkpoint import Checkpoint
from reference.quantization_config import AWQ, GPTQ, GPTQ_V2, INT, PACK, PackedScheme
from reference.safetensors_header import TensorEntry
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SCALE_DTYPES = ("F16", "BF16", "F32")
WORD = 32
_INDEX_DTYPES = ("I32", "I64")
_AWQ_SLOTS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where a word of AWQ's has each of its eight numbers, which lie in the order 0 2 4 6 1 3 5 7."""

_MARKS = {GPTQ: "qweight", GPTQ_V2: "qweight", AWQ: "qweight", PACK: "weight_packed", INT: "weight_scale"}
"""The tensor that no plain layer has, by layout."""


class Expected(NamedTuple):
    """What a tensor must be: its shape, and the types that it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


class Numbers(NamedTuple):
    """Rows of a packed matrix. q: uint8 [R, K]. scale: float [R, G] as stored. zero: uint8 [R, G], None if middle."""

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """The packed weight [rows, columns] of the linear layer `module`, named as in the files, without its last dot."""

    module: str
    scheme: PackedScheme
    rows: int
    columns: int

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return min(self.scheme.group_size or self.columns, self.columns)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return -(-self.columns // self.group)

    @property
    def scale(self) -> str:
        """The name of the tensor of scales."""
        return f"{self.module}.{'weight_scale' if self.scheme.layout in (PACK, INT) else 'scales'}"

    def expected(self, tensors: Mapping[str, TensorEntry]) -> dict[str, Expected]:
        """The tensors that it is made of, by name; of two ways of writing one, that which `tensors` has.

        Raises CheckpointError for sizes that do not fill their words.
        """
        scheme, bits, at = self.scheme, self.scheme.bits, f"{self.module}."
        groups, words, index = self.groups, ("I32",), at + ("g_idx" if scheme.layout in (GPTQ, GPTQ_V2) else _INDEX)
        found: dict[str, Expected] = {}
        if scheme.layout in (GPTQ, GPTQ_V2, AWQ):
            along_k = scheme.layout != AWQ
            self._require_whole_words(self.columns if along_k else self.rows, self.rows)
            packed = (self.columns * bits // WORD, self.rows) if along_k else (self.columns, self.rows * bits // WORD)
            found[at + "qweight"] = Expected(packed, words)
            found[at + "qzeros"] = Expected((groups, self.rows * bits // WORD), words)
            found[self.scale] = Expected((groups, self.rows), SCALE_DTYPES)
        else:
            if scheme.layout == PACK:
                found[at + "weight_packed"] = Expected((self.rows, _words(self.columns, bits)), words)
                found[at + "weight_shape"] = Expected((2,), _INDEX_DTYPES)
            else:
                found[at + "weight"] = Expected((self.rows, self.columns), ("I8",))
            found[self.scale] = Expected((self.rows, groups), SCALE_DTYPES)
            if not scheme.symmetric:
                name = at + "weight_zero_point"
                whole = scheme.layout == INT or (name in tensors and tensors[name].dtype == "I8")
                found[name] = (
                    Expected((self.rows, groups), ("I8",))
                    if whole
                    else Expected((_words(self.rows, bits), groups), words)
                )
        if scheme.layout != AWQ and (scheme.reordered or index in tensors):
            found[index] = Expected((self.columns,), _INDEX_DTYPES)
        return found

    def _require_whole_words(self, *sizes: int) -> None:
        for size in sizes:
            if size * self.scheme.bits % WORD:
                raise CheckpointError(
                    f"{self.module} is [{self.rows}, {self.columns}], and {self.scheme.layout} packs whole words of "
                    f"{WORD // self.scheme.bits} numbers, which {size} does not fill. Check that config.json belongs "
                    "to these weights."
                )

    def check(self, checkpoint: Checkpoint) -> None:
        """Look at the small tensors that decide how the large ones are to be taken, of which types and shapes fit.

        Raises CheckpointError for columns in another order than that of the groups, zero points that contradict the
        config or that readers do not agree about, and a shape that is not that of the matrix.
        """
        names = self.expected(checkpoint.tensors)
        for suffix in ("g_idx", _INDEX):
            if f"{self.module}.{suffix}" in names:
                self._check_order(checkpoint, f"{self.module}.{suffix}")
        if f"{self.module}.weight_shape" in names:
            shape = tuple(int(size) for size in _array(checkpoint, f"{self.module}.weight_shape"))
            if shape != (self.rows, self.columns):
                raise CheckpointError(
                    f"{checkpoint.path} says by {self.module}.weight_shape that the layer is {list(shape)}, and by its "
                    f"config that it is {[self.rows, self.columns]}. Check that config.json belongs to these weights."
                )
        if self.scheme.layout in (GPTQ, GPTQ_V2):
            self._check_zero_points(checkpoint)

    def _check_order(self, checkpoint: Checkpoint, name: str) -> None:
        index = _array(checkpoint, name)
        unset = self.scheme.layout in (PACK, INT) and bool((index == -1).any())  # as compressed-tensors reads it
        if not unset and not np.array_equal(index, np.arange(self.columns) // self.group):
            raise CheckpointError(
                f"{checkpoint.path} holds {name} with the columns of a group scattered over the row (desc_act, "
                "actorder = group), and Cierzo's blocks are of neighbours. Use a checkpoint that was quantised without "
                "it (desc_act false, actorder weight or none), or quantise the original: cierzo export --weights int4."
            )

    def _check_zero_points(self, checkpoint: Checkpoint) -> None:
        name, bits = f"{self.module}.qzeros", self.scheme.bits
        stored = _array(checkpoint, name)
        numbers = stored.view(np.uint8)
        largest, first = (1 << bits) - 1, int(self.scheme.layout == GPTQ)
        if self.scheme.symmetric:
            middle = (1 << (bits - 1)) - first
            if not bool((numbers == (middle if bits == 8 else middle * 17)).all()):
                raise CheckpointError(
                    f"{checkpoint.path} says sym, but {name} has other zero points than {1 << (bits - 1)}, and readers "
                    "disagree about which of the two counts. Set sym to false in a copy of config.json if the stored "
                    "zero points are meant."
                )
        elif first and bool(((numbers == 255) if bits == 8 else (numbers & 15 == 15) | (numbers >> 4 == 15)).any()):
            raise CheckpointError(
                f"{checkpoint.path} holds {name} with the number {largest}, which is one less than the zero point in "
                f"the format gptq, and readers make 0, {largest + 1} or a carry into its neighbour of it. Save the "
                "checkpoint in the format gptq_v2, or use one that was quantised with sym."
            )

    def read(self, checkpoint: Checkpoint, first: int, last: int) -> Numbers:
        """Rows `first` to `last` (half-open). Raises CheckpointError for numbers that the bits do not hold."""
        layout, bits, at = self.scheme.layout, self.scheme.bits, f"{self.module}."
        scale = checkpoint.read(self.scale)
        if layout in (GPTQ, GPTQ_V2, AWQ):
            scale_RG = scale[:, first:last].T
            slots = _AWQ_SLOTS if layout == AWQ else range(WORD // bits)
            zero_RG = _numbers_across(checkpoint.read(at + "qzeros"), bits, first, last, slots)
            if layout == AWQ:
                q_RK = _numbers_across(checkpoint.read(at + "qweight"), bits, first, last, slots)
                return Numbers(q_RK, scale_RG, zero_RG)
            q_RK = _numbers(checkpoint.read(at + "qweight")[:, first:last].T, bits)
            return Numbers(q_RK, scale_RG, None if self.scheme.symmetric else zero_RG + int(layout == GPTQ))
        zero = None if self.scheme.symmetric else checkpoint.read(at + "weight_zero_point")
        if zero is not None and layout == PACK and zero.ndim == 2 and not _is_int8(zero):
            zero = _numbers_across(zero.T, bits, first, last, range(WORD // bits))
        elif zero is not None:
            zero = self._unsigned(checkpoint, at + "weight_zero_point", zero[first:last])
        if layout == PACK:
            q_RK = _numbers(checkpoint.read(at + "weight_packed")[first:last], bits)[:, : self.columns]
        else:
            q_RK = self._unsigned(checkpoint, at + "weight", checkpoint.read(at + "weight")[first:last])
        return Numbers(q_RK, scale[first:last], zero)

    def _unsigned(self, checkpoint: Checkpoint, name: str, signed: torch.Tensor) -> torch.Tensor:
        """Signed numbers as those of our layout: the middle is added to each."""
        import torch

        half = 1 << (self.scheme.bits - 1)
        if self.scheme.bits < 8 and signed.numel() and not -half <= int(signed.min()) <= int(signed.max()) < half:
            raise CheckpointError(
                f"{checkpoint.path} holds {name} with numbers beyond {-half} and {half - 1}, which its config's "
                f"{self.scheme.bits} bits do not hold. Check that config.json belongs to these weights."
            )
        return signed.view(torch.uint8) + half & (2 * half - 1)  # a byte wraps round, which is the same sum


_INDEX = "weight_g_idx"


def packed_modules(scheme_layouts: set[str], tensors: Mapping[str, TensorEntry]) -> frozenset[str]:
    """The linear layers that `tensors` holds packed in one of the layouts."""
    found = set()
    for layout in scheme_layouts:
        mark = f".{_MARKS[layout]}"
        for name in tensors:
            if name.endswith(mark):
                module = name.removesuffix(mark)
                weight = tensors.get(f"{module}.weight")
                if layout != INT or (weight is not None and weight.dtype == "I8"):
                    found.add(module)
    return frozenset(found)


def _words(numbers: int, bits: int) -> int:
    return -(-numbers * bits // WORD)


def _array(checkpoint: Checkpoint, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int32 | np.int64]]:
    """A small tensor of integers in a row, without torch."""
    dtype = np.int64 if checkpoint.tensors[name].dtype == "I64" else np.int32
    return np.frombuffer(checkpoint.read_bytes(name), dtype=dtype)


def _is_int8(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.dtype == torch.int8


def _numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers [R, W * 32 / bits] in words [R, W], uint8, the lowest bits first."""
    import torch

    if words.stride(-1) != 1 or not words.is_contiguous():  # a row of one word is contiguous with any stride
        words = words.clone(memory_format=torch.contiguous_format)
    octets = words.view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def _numbers_across(words: torch.Tensor, bits: int, first: int, last: int, slots: Sequence[int]) -> torch.Tensor:
    """Numbers `first` to `last` of each row of words [M, W], turned around: uint8 [last - first, M].

    slots: for each number of a word its place in it, counted from the lowest bits.
    """
    import torch

    each = WORD // bits
    begin = first // each
    numbers = _numbers(words[:, begin : -(-last // each)], bits).T.contiguous()
    places = [(n // each - begin) * each + slots[n % each] for n in range(first, last)]
    return numbers[torch.tensor(places, dtype=torch.int64)]
