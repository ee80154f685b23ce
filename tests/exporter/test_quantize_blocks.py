"""What the two methods promise, whoever computes them: the native library, or torch without it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from exporter.quantize.native import native_quantizer
from exporter.quantize.rows import ScaleCheck, quantize_rows
from reference.quantized_layout import QuantizedFormat, dequantize, unpack
from runtime.errors import ExportError

FORMATS = [
    QuantizedFormat(bits, block_size, zero_points, scale)
    for bits, block_size, zero_points, scale in itertools.product((4, 8), (16, 128), (False, True), ("F16", "F32"))
]
NAMES = [f"int{f.bits}-{f.block_size}{'-zero' * f.zero_points}-{f.scale}" for f in FORMATS]


@pytest.fixture(autouse=True, params=["native", "torch"])
def _maker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setenv("CIERZO_KERNELS", "off")
        assert native_quantizer() is None


def weights(rows: int = 24, columns: int = 300) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)) * 0.05


def errors(values: torch.Tensor, quantized: QuantizedFormat, search: bool) -> torch.Tensor:
    """Squared error of each block, float64 [R, B]."""
    made = quantize_rows(values, quantized, search=search)
    assert made is not None
    missed = (dequantize(made, quantized, values.shape[1], torch.float64) - values.double()) ** 2
    padding = quantized.blocks(values.shape[1]) * quantized.block_size - values.shape[1]
    padded = torch.nn.functional.pad(missed, (0, padding))
    return padded.view(len(values), -1, quantized.block_size).sum(-1)


@pytest.mark.parametrize("quantized", FORMATS, ids=NAMES)
@pytest.mark.parametrize("search", [False, True])
def test_every_number_is_the_nearest_to_its_weight(quantized: QuantizedFormat, search: bool) -> None:
    values = weights()
    made = quantize_rows(values, quantized, search=search)
    assert made is not None
    q, zero = (part.numpy().astype(np.int64) for part in unpack(made, quantized, values.shape[1]))
    block = np.arange(values.shape[1]) // quantized.block_size
    scale, zero = made.scale.double().numpy()[:, block], zero[:, block]
    exact = values.double().numpy() / scale + zero
    nearest = np.clip(np.rint(exact), 0, quantized.largest)
    near_a_tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-4  # where float32 may round to the other side
    assert (q == nearest)[~near_a_tie].all()
    assert np.abs(q - exact)[near_a_tie].max(initial=0) < 0.51
    assert near_a_tie.mean() < 0.01


@pytest.mark.parametrize("quantized", FORMATS, ids=NAMES)
def test_the_search_is_never_worse_and_mostly_better(quantized: QuantizedFormat) -> None:
    values = weights()
    values[3] *= torch.exp(torch.randn(300, generator=torch.Generator().manual_seed(1)))
    nearest, found = errors(values, quantized, False), errors(values, quantized, True)
    assert (found <= nearest * (1 + 1e-5)).all()
    assert (found < nearest * 0.999).double().mean() > 0.7
    if quantized.bits == 4:
        assert found.sum() < 0.93 * nearest.sum()


@pytest.mark.parametrize("zero_points", [False, True])
def test_the_search_finds_nearly_the_best_that_there_is(zero_points: bool) -> None:
    """Held against all scales of a fine grid with all zero points."""
    quantized = QuantizedFormat(4, 16, zero_points, "F32")
    values = weights(12, 16)
    found = float(errors(values, quantized, True).sum())
    best = 0.0
    for row in values.double().numpy():
        scale = np.linspace(0.3, 2.5, 2000)[:, None, None] * np.abs(row).max() / 8
        zero = np.arange(16)[:, None] if zero_points else np.array([[8]])
        scale = scale if zero_points else np.concatenate([scale, -scale])
        q = np.clip(np.rint(row / scale) + zero, 0, 15) - zero
        best += float(((row - scale * q) ** 2).sum(-1).min())
    assert found < 1.03 * best


@pytest.mark.parametrize("quantized", FORMATS, ids=NAMES)
@pytest.mark.parametrize("search", [False, True])
def test_what_the_format_holds_exactly_stays(quantized: QuantizedFormat, search: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    whole = torch.randint(0, quantized.largest + 1, (9, 256), generator=generator)
    blocks = whole.view(9, -1, quantized.block_size)
    blocks[:, :, 0] = 0  # both ends are there, from which the scale follows
    blocks[:, :, 1] = quantized.largest
    zero = quantized.middle if not quantized.zero_points else torch.arange(9)[:, None]
    values = (whole - zero).float() * 2.0**-9
    made = quantize_rows(values, quantized, search=search)
    assert made is not None
    assert torch.equal(dequantize(made, quantized, 256, torch.float32), values)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weight_takes_the_far_end_whatever_its_sign(sign: int) -> None:
    quantized = QuantizedFormat(4, 16, False, "F32")
    values = torch.linspace(-0.5, 0.5, 16)[None].clone()
    values[0, 3] = sign * 4.0
    made = quantize_rows(values, quantized, search=False)
    assert made is not None
    q, _ = unpack(made, quantized, 16)
    assert int(q[0, 3]) == 0
    assert float(made.scale[0, 0]) == -sign * 0.5


@pytest.mark.parametrize("quantized", FORMATS, ids=NAMES)
def test_zeros_and_the_end_of_a_partial_block(quantized: QuantizedFormat) -> None:
    values = weights(5, 130)
    values[2] = 0
    made = quantize_rows(values, quantized, search=True)
    assert made is not None
    assert not dequantize(made, quantized, 130, torch.float32)[2].any()
    assert not made.scale[2].any()
    count = quantized.blocks(130)
    q, zero = unpack(made, quantized, count * quantized.block_size)
    rest = q[:, 130:].int()
    assert rest.numel() > 0
    assert torch.equal(rest, zero[:, -1:].int().expand_as(rest))


def test_rows_do_not_depend_on_each_other() -> None:
    quantized = QuantizedFormat(4, 32, True, "F16")
    values = weights().bfloat16()
    made = quantize_rows(values, quantized, search=True)
    assert made is not None
    for first, last in ((0, 1), (7, 19), (23, 24)):
        part = quantize_rows(values[first:last], quantized, search=True)
        assert part is not None
        assert torch.equal(part.packed, made.packed[first:last])
        assert torch.equal(part.scale, made.scale[first:last])


def test_float64_is_taken_as_float32() -> None:
    quantized = QuantizedFormat(4, 32, False, "F16")
    wide, narrow = (
        quantize_rows(weights().to(dtype), quantized, search=True) for dtype in (torch.float64, torch.float32)
    )
    assert wide is not None
    assert narrow is not None
    assert torch.equal(wide.packed, narrow.packed)


def scales(value: float, quantized: QuantizedFormat) -> torch.Tensor:
    made = quantize_rows(torch.full((2, 32), value), quantized, search=True)
    assert made is not None
    return made.scale


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    half, single = (QuantizedFormat(4, 32, False, scale) for scale in ("F16", "F32"))
    with pytest.raises(ExportError, match=r"65504.*--scales float32"):
        ScaleCheck("layers.0.x", half).see(scales(1e6, half))
    check = ScaleCheck("layers.0.x", half)
    check.see(scales(1e-5, half))
    with pytest.raises(ExportError, match=r"layers.0.x has weights so small.*--scales float32"):
        check.finish()
    check = ScaleCheck("layers.0.x", half)
    check.see(scales(1e-8, half), vanished=True)
    with pytest.raises(ExportError, match=r"layers.0.x has weights so small"):
        check.finish()
    for values in ([1e-5, 1.0], [0.0], [1.0]):  # one that is large enough, or none at all
        check = ScaleCheck("layers.0.x", half)
        for value in values:
            check.see(scales(value, half))
        check.finish()
    for value in (1e6, 1e-5):
        check = ScaleCheck("layers.0.x", single)
        check.see(scales(value, single))
        check.finish()
