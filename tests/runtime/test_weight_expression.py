"""Weights made of what files hold, against numpy, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import runtime.weight_expression
from runtime.errors import BundleError
from runtime.manifest_section import Section
from runtime.weight_expression import (
    Cast,
    Concat,
    Expression,
    Rows,
    Signed,
    Stored,
    cast,
    dtype_of,
    files_of,
    orders_of,
    parse_expression,
    pieces,
)

NUMPY: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Files:
    """Files in a folder, which tensors are added to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str) -> Path:
        return self._folder / name

    def add(self, name: str, array: NDArray[Any], dtype: str) -> Stored:
        """Where the array lies from now on: behind what is in the file already, and a byte more."""
        path = self(name)
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + b"\x55" + array.tobytes())
        return Stored(name, len(before) + 1, dtype, array.shape)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def value(expression: Expression, files: Files, orders: dict[str, Sequence[int]] | None = None) -> bytes:
    return b"".join(piece.tobytes() for piece in pieces(expression, files, orders or {}))


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(NUMPY[dtype])


@pytest.mark.parametrize("dtype", NUMPY)
def test_a_stored_tensor_is_what_the_file_holds(files: Files, dtype: str) -> None:
    arrays = [numbers((3, 5), dtype, seed) for seed in range(2)]
    stored = [files.add("a", array, dtype) for array in arrays]
    assert [value(one, files) for one in stored] == [array.tobytes() for array in arrays]


def test_parts_come_one_after_the_other_and_none_is_copied(files: Files) -> None:
    arrays = [numbers((2, 3), "F32", seed) for seed in range(3)]
    parts = [files.add(f"file{seed % 2}", array, "F32") for seed, array in enumerate(arrays)]
    expression = Concat(tuple(parts))
    assert value(expression, files) == np.concatenate(arrays).tobytes()
    assert [piece.nbytes for piece in pieces(expression, files, {})] == [24, 24, 24]
    assert files_of(expression) == {"file0", "file1"}


def test_rows_take_another_order_also_across_parts(files: Files) -> None:
    arrays = [numbers((4, 3), "BF16", seed) for seed in range(2)]
    parts = tuple(files.add("a", array, "BF16") for array in arrays)
    order = [5, 1, 7, 0, 2, 4, 3, 6]
    expression = Rows(Concat(parts), "shuffle")
    assert value(expression, files, {"shuffle": order}) == np.concatenate(arrays)[order].tobytes()
    assert orders_of(Cast(Concat((expression,)), "F32")) == {"shuffle"}


@pytest.mark.parametrize("to", NUMPY)
@pytest.mark.parametrize("dtype", NUMPY)
def test_casts_round_as_ml_dtypes_does(files: Files, dtype: str, to: str) -> None:
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        65504,
        65519.99,
        65520,
        3.4e38,
        1e-45,
        6e-8,
        2.98e-8,
        1.00390625,
        1.01171875,
    ]
    with np.errstate(over="ignore"):
        array = np.concatenate([np.array(special).astype(NUMPY[dtype]), numbers((500,), dtype)])
        expected = array.astype(np.float32).astype(NUMPY[to])
    held = np.isfinite(expected.astype(np.float32)) | ~np.isfinite(array.astype(np.float32))
    array, expected = array[held], expected[held]
    made = np.frombuffer(value(Cast(files.add("a", array, dtype), to), files), NUMPY[to])
    assert np.array_equal(made, expected, equal_nan=True)
    assert np.array_equal(np.signbit(made[:2]), [False, True])


@pytest.mark.parametrize(
    ("dtype", "to", "most", "beyond"),
    [
        ("F32", "F16", np.nextafter(np.float32(65520), np.float32(0)), np.float32(65520)),
        ("BF16", "F16", 65280.0, 65536.0),
        ("F32", "BF16", np.uint32(0x7F7F7FFF).view(np.float32), np.uint32(0x7F7F8000).view(np.float32)),
    ],
)
def test_numbers_that_would_become_infinite_are_refused(
    files: Files, dtype: str, to: str, most: float, beyond: float
) -> None:
    """An infinite weight may hide behind an activation that ends in zero there."""
    for sign in (1, -1):
        whole = np.array([[0, 1], [sign * most, np.inf]], np.float32).astype(NUMPY[dtype])
        made = np.frombuffer(value(Cast(files.add("a", whole, dtype), to), files), NUMPY[to]).astype(np.float32)
        assert np.isfinite(made[:3]).all()
        assert made[3] == np.inf
        whole[1, 0] = sign * beyond
        with pytest.raises(BundleError, match=r"holds the number .* infinite in (b?)float16.*--arithmetic"):
            value(Cast(files.add("a", whole, dtype), to), files)


def test_large_tensors_are_cast_in_parts(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.weight_expression, "CAST_AT_ONCE", 10)
    for shape in ((7, 3), (25,), (2, 11, 3), (0, 3)):
        whole = numbers(shape, "F32")
        stored = files.add("a", whole, "F32")
        expression = Cast(Concat((stored, stored)), "BF16")
        expected = whole.astype(ml_dtypes.bfloat16).tobytes() * 2
        assert value(expression, files) == expected
        assert max(piece.nbytes for piece in pieces(expression, files, {})) <= 2 * max(10, whole[:1].size)
        order = list(range(2 * len(whole)))[::-1]
        both = np.concatenate([whole, whole]).astype(ml_dtypes.bfloat16)
        assert value(Rows(expression, "o"), files, {"o": order}) == both[order].tobytes()
    scalar = files.add("a", np.array(1.5, np.float32), "F32")
    assert value(Cast(scalar, "BF16"), files) == np.array(1.5, ml_dtypes.bfloat16).tobytes()


def test_a_cast_to_bfloat16_is_right_for_every_upper_half_and_ties() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        wide = (upper | lower).view(np.float32)
        wide = wide[(np.abs(wide) < np.uint32(0x7F7F8000).view(np.float32)) | ~np.isfinite(wide)]
        made = cast(wide, "F32", "BF16").view(ml_dtypes.bfloat16)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            expected = wide.astype(ml_dtypes.bfloat16)
        assert np.array_equal(made, expected, equal_nan=True)


def test_unsigned_numbers_become_signed_ones(files: Files) -> None:
    packed = np.arange(256, dtype=np.uint8)
    stored = files.add("a", packed, "U8")
    eight = np.frombuffer(value(Signed(stored, "I8"), files), np.int8)
    assert np.array_equal(eight, packed.astype(np.int16) - 128)
    four = np.frombuffer(value(Signed(stored, "I4"), files), np.uint8)
    for shift in (0, 4):
        half = (four >> shift) & 15
        assert np.array_equal(np.where(half > 7, half.astype(int) - 16, half), ((packed >> shift) & 15).astype(int) - 8)


def test_an_empty_tensor_has_no_bytes(files: Files) -> None:
    assert value(Stored("nowhere", 0, "F32", (0, 4)), files) == b""


def test_a_tree_reads_back_as_it_was() -> None:
    stored = Stored("a.safetensors", 12, "BF16", (2, 3))
    packed = Stored("b", 0, "U8", (4,))
    for expression in (
        stored,
        Concat((stored, Rows(stored, "o"))),
        Cast(Rows(Concat((stored, stored)), "order.1"), "F16"),
        Signed(packed, "I4"),
        Signed(Concat((packed, packed)), "I8"),
    ):
        text = json.loads(json.dumps(expression.to_json()))
        assert parse_expression(Section(text, "x.")) == expression


@pytest.mark.parametrize(
    "document, words",
    [
        ({}, "in no way"),
        ({"file": "a", "offset": -1, "dtype": "F32", "shape": [1]}, "below 0"),
        ({"file": "a", "offset": 0, "dtype": "F64", "shape": [1]}, "F64"),
        ({"file": "a", "offset": 0, "dtype": "F32", "shape": [-1]}, "shape is damaged"),
        ({"file": "a", "offset": 0, "dtype": "F32", "shape": [True]}, "shape is damaged"),
        ({"file": 7, "offset": 0, "dtype": "F32", "shape": []}, "must be a string"),
        ({"concat": {"a": 1}}, "must be a list"),
        ({"concat": [7]}, "must be an object"),
        ({"rows": {"concat": []}}, "order"),
        ({"cast": {"concat": []}, "to": "I8"}, "I8"),
        ({"signed": {"concat": []}, "to": "F32"}, "F32"),
    ],
)
def test_damaged_trees_are_refused(document: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        parse_expression(Section(document, "x."))


@pytest.mark.parametrize(
    "expression",
    [
        Concat((Stored("a", 0, "F32", (1,)), Stored("a", 0, "F16", (1,)))),
        Concat(()),
        Cast(Stored("a", 0, "U8", (1,)), "F32"),
        Signed(Stored("a", 0, "I8", (1,)), "I8"),
        Cast(Signed(Stored("a", 0, "U8", (1,)), "I4"), "F16"),
    ],
)
def test_steps_that_do_not_fit_together_have_no_type(expression: Expression) -> None:
    with pytest.raises(BundleError, match="Build the engine again"):
        dtype_of(expression)


def test_the_type_is_that_of_the_last_step() -> None:
    stored, packed = Stored("a", 0, "BF16", (1,)), Stored("a", 0, "U8", (1,))
    assert dtype_of(Rows(Concat((stored, stored)), "o")) == "BF16"
    assert dtype_of(Cast(Rows(stored, "o"), "F16")) == "F16"
    assert dtype_of(Signed(packed, "I4")) == "I4"


def test_files_that_hold_less_are_refused(files: Files) -> None:
    stored = files.add("a", numbers((4, 4), "F32"), "F32")
    for wrong in (
        Stored("a", stored.offset + 1, "F32", (4, 4)),
        Stored("a", 1 << 52, "F32", (4, 4)),
        Stored("a", 1, "F32", (1 << 53, 1 << 53)),
        Stored("gone", 0, "F32", (4, 4)),
    ):
        with pytest.raises(BundleError, match="cannot be read"):
            value(wrong, files)


def test_orders_that_do_not_fit_are_refused(files: Files) -> None:
    stored, wide = files.add("a", numbers((4, 4), "F32"), "F32"), files.add("a", numbers((4, 5), "F32"), "F32")
    with pytest.raises(BundleError, match="order 'o'"):
        value(Rows(stored, "o"), files, {"o": [0, 1, 2, 4]})
    with pytest.raises(BundleError, match="order 'o': 4 rows and 5 places"):
        value(Rows(stored, "o"), files, {"o": [0, 1, 2, 3, 3]})
    with pytest.raises(BundleError, match="order 'o'"):
        value(Rows(Concat((stored, wide)), "o"), files, {"o": [0]})
