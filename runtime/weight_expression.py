"""How an engine's weight is made of what the bundle's files hold: a small tree, evaluated piece by piece.

A leaf is a tensor in a file; above it stand concatenation along axis 0, another order of rows, a cast, and the turn
from unsigned to signed numbers. The tree is written when an engine is built and read when it is loaded, so that an
engine needs neither a copy of the weights nor the graph. Nothing larger than one piece is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from runtime.errors import BundleError
from runtime.json_files import brief
from runtime.manifest_section import Section

Bytes: TypeAlias = npt.NDArray[np.uint8]
Files: TypeAlias = Callable[[str], Path]
Orders: TypeAlias = Mapping[str, Sequence[int]]

NUMPY_TYPES: dict[str, npt.DTypeLike] = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8, "I8": np.int8,
}  # fmt: skip
"""Stored types as safetensors spells them; bfloat16, which numpy lacks, as its bits."""

FLOATS = ("F32", "F16", "BF16")
"""Types that can be cast into each other."""

_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80}
"""Bits of infinity without the sign."""

_SPELLED = {"F16": "float16", "BF16": "bfloat16"}

_MOST_AXES = 8
"""Weights have up to three, quantised ones up to four."""

CAST_AT_ONCE = 1 << 22
"""Numbers that are cast at a time; the whole of a large output projection would take gigabytes beside it."""

SIGN_BITS = {"I4": 0x88, "I8": 0x80}
"""Flipping these bits of a byte takes unsigned numbers to signed ones: q − 8 of each half, or q − 128."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in the bundle's file `file`, from byte `offset` on, of type `dtype`."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "offset": self.offset, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class Concat:
    """Parts of one type, one after the other along axis 0."""

    parts: tuple[Expression, ...]

    def to_json(self) -> dict[str, Any]:
        return {"concat": [part.to_json() for part in self.parts]}


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a tensor in the order that the engine's table `orders` has under this name."""

    of: Expression
    order: str

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.of.to_json(), "order": self.order}


@dataclass(frozen=True, slots=True)
class Cast:
    """Rounded to nearest, ties to even, into "F32", "F16" or "BF16", which must hold them: none becomes infinite."""

    of: Expression
    to: str

    def to_json(self) -> dict[str, Any]:
        return {"cast": self.of.to_json(), "to": self.to}


@dataclass(frozen=True, slots=True)
class Signed:
    """Unsigned numbers around 8 ("I4", two in a byte) or 128 ("I8") as signed ones around 0."""

    of: Expression
    to: str

    def to_json(self) -> dict[str, Any]:
        return {"signed": self.of.to_json(), "to": self.to}


Expression: TypeAlias = Stored | Concat | Rows | Cast | Signed


def parse_expression(section: Section) -> Expression:
    """The tree that `to_json` of an expression wrote. Raises BundleError for anything else."""
    data = section.data
    if "file" in data:
        dtype = section.one_of("dtype", tuple(NUMPY_TYPES))
        return Stored(section.string("file"), section.integer("offset", minimum=0), dtype, parse_shape(section))
    if "concat" in data:
        return Concat(tuple(parse_expression(part) for part in section.sections("concat")))
    if "rows" in data:
        return Rows(parse_expression(section.section("rows")), section.string("order"))
    if "cast" in data:
        return Cast(parse_expression(section.section("cast")), section.one_of("to", FLOATS))
    if "signed" in data:
        return Signed(parse_expression(section.section("signed")), section.one_of("to", tuple(SIGN_BITS)))
    raise BundleError(f"{section.path[:-1]} says in no way how the weight is made. Build the engine again.")


def parse_shape(section: Section) -> tuple[int, ...]:
    """The extents under `shape`. Raises BundleError for anything else, and for what no array can have."""
    shape = section.items("shape")
    if len(shape) > _MOST_AXES or not all(type(extent) is int and 0 <= extent < 1 << 31 for extent in shape):
        raise BundleError(f"{section.path}shape is damaged. Build the engine again.")
    return tuple(shape)


def dtype_of(expression: Expression) -> str:
    """The type of the weight, as safetensors spells it, and "I4" for two numbers in a byte.

    Raises BundleError where parts differ in type, or a step cannot be done with what is below it.
    """
    if isinstance(expression, Stored):
        return expression.dtype
    if isinstance(expression, Rows):
        return dtype_of(expression.of)
    if isinstance(expression, Concat):
        types = {dtype_of(part) for part in expression.parts}
        if len(types) != 1:
            raise BundleError(
                f"A weight is put together of parts of {len(types)} types, and they must have one. Build the engine "
                "again."
            )
        return types.pop()
    below = dtype_of(expression.of)
    if below not in (("U8",) if isinstance(expression, Signed) else FLOATS):
        raise BundleError(f"A weight of {below} cannot be made one of {expression.to}. Build the engine again.")
    return expression.to


def orders_of(expression: Expression) -> set[str]:
    """The names of the index lists that an expression takes rows by."""
    if isinstance(expression, Stored):
        return set()
    if isinstance(expression, Concat):
        return {name for part in expression.parts for name in orders_of(part)}
    return orders_of(expression.of) | ({expression.order} if isinstance(expression, Rows) else set())


def files_of(expression: Expression) -> set[str]:
    """The bundle's files that an expression reads."""
    if isinstance(expression, Stored):
        return {expression.file}
    if isinstance(expression, Concat):
        return {file for part in expression.parts for file in files_of(part)}
    return files_of(expression.of)


def pieces(expression: Expression, files: Files, orders: Orders) -> Iterator[Bytes]:
    """The bytes of the weight in order, uint8 [n] each, mapped or made; each is done with before the next is asked for.

    files: where the file of that name lies. Raises BundleError for files that are too short or gone, and for numbers
    that are too large for the type that they are cast to.
    """
    for array, _ in _arrays(expression, files, orders):
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _arrays(expression: Expression, files: Files, orders: Orders) -> Iterator[tuple[npt.NDArray[Any], str]]:
    if isinstance(expression, Stored):
        yield _mapped(expression, files), expression.dtype
    elif isinstance(expression, Concat):
        for part in expression.parts:
            yield from _arrays(part, files, orders)
    elif isinstance(expression, Rows):
        whole = list(_arrays(expression.of, files, orders))
        try:
            array = whole[0][0] if len(whole) == 1 else np.concatenate([part for part, _ in whole])
            order = np.asarray(orders[expression.order], np.int64)
            if len(order) != len(array):
                raise ValueError(f"{len(array)} rows and {len(order)} places")
            reordered = np.take(array, order, axis=0)
        except (ValueError, IndexError) as error:  # parts of other widths, or rows that are not there
            raise BundleError(
                f"The rows of a weight cannot be put in the order {brief(expression.order)}: {error}. Build the engine "
                "again."
            ) from error
        yield reordered, whole[0][1]
    elif isinstance(expression, Cast):
        for array, dtype in _arrays(expression.of, files, orders):
            for rows in _some_rows(array):
                yield cast(rows, dtype, expression.to), expression.to
    else:
        for array, _ in _arrays(expression.of, files, orders):
            yield np.bitwise_xor(array.view(np.uint8), np.uint8(SIGN_BITS[expression.to])), expression.to


def _some_rows(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """The array in parts along axis 0, of about CAST_AT_ONCE numbers: a cast takes several times what it casts."""
    rows = len(array) if array.ndim else 0
    step = max(1, rows * CAST_AT_ONCE // max(1, array.size))
    if rows <= step:
        yield array
        return
    yield from (array[begin : begin + step] for begin in range(0, rows, step))


def _mapped(stored: Stored, files: Files) -> npt.NDArray[Any]:
    dtype = np.dtype(NUMPY_TYPES[stored.dtype])
    path = files(stored.file)
    count = math.prod(stored.shape)
    if count == 0:
        return np.empty(0, dtype)
    try:
        raw = np.memmap(path, np.uint8, mode="r", offset=stored.offset, shape=(count * dtype.itemsize,))
    except (OSError, ValueError, OverflowError) as error:
        raise BundleError(
            f"The engine's weights cannot be read from {path}: {error}. Restore the file, or export and build again."
        ) from error
    return np.frombuffer(raw, dtype).reshape(stored.shape)


def cast(array: npt.NDArray[Any], dtype: str, to: str) -> npt.NDArray[Any]:
    """Numbers of the stored type `dtype` in the type `to`; bfloat16 goes in and out as its bits (uint16).

    Raises BundleError where a finite number would become infinite.
    """
    if dtype == to:
        return array
    wide = (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array.astype(np.float32)
    if to == "F32":
        return wide
    with np.errstate(over="ignore"):
        made = _bfloat16(wide) if to == "BF16" else wide.astype(np.float16)
    infinite = (made.view(np.uint16) & np.uint16(0x7FFF)) == _INFINITY[to]
    if infinite.any() and (lost := wide[infinite & np.isfinite(wide)]).size:
        raise BundleError(
            f"A weight holds the number {lost.flat[0]:g}, which is infinite in {_SPELLED[to]}: the model cannot be "
            "computed in that type. Build an engine with another --arithmetic, such as float32 (arithmetic='float32')."
        )
    return made


def _bfloat16(wide: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bits of float32 rounded to its upper half, ties to even; a NaN stays one."""
    bits = wide.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded.astype(np.uint16))
