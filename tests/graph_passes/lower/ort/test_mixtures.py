"""Mixtures of experts on MoE and QMoE: which experts a token goes to, in every arithmetic, and what is refused."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from graph_passes.graph import integers
from graph_passes.lower.ort.mixtures import lower_mixtures
from graph_passes.lower.ort.routing import UNCHOSEN
from graph_passes.lower.ort.unused import remove_unused
from runtime.errors import FusionError
from tests.graph_passes.lower.ort.operator_cases import dense, quantized_experts
from tests.support.graphs import Arrays, op_types, run
from tests.support.ort_lowering import exact_products

Float32 = npt.NDArray[np.float32]


def feeds(model: ir.Model, logits: Float32, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    made: Arrays = {"logits": logits}
    for value in model.graph.inputs:
        name = str(value.name)
        if name in made:
            continue
        assert value.shape is not None
        assert value.dtype is not None
        shape = [extent if isinstance(extent, int) else len(logits) for extent in value.shape]
        if value.dtype == ir.DataType.UINT8:
            made[name] = rng.integers(0, 256, shape, dtype=np.uint8)
        else:
            scale = 1 if name == "x" else 1 / 16 if name.startswith("s") else 1 / 4
            made[name] = (scale * rng.standard_normal(shape)).astype(value.dtype.numpy())
    return made


def spread(tokens: int, E: int) -> Float32:
    return 3 * np.random.default_rng(5).standard_normal((tokens, E), dtype=np.float32)


def ties(E: int) -> Float32:
    """Exact ties at every place, above and below the last that is chosen."""
    values = np.random.default_rng(6).integers(0, 3, (40, E)).astype(np.float32) - 1
    values[0] = 0
    return values


def near_ties(E: int) -> Float32:
    """Logits far from zero that differ by some of float32's last places: bfloat16 and float16 have one for all."""
    values = np.full((40, E), 20, np.float32)
    for row, step in zip(values, np.random.default_rng(7).integers(-3, 4, (40, E)), strict=True):
        row += step.astype(np.float32) * np.spacing(np.float32(20))
    return values


def far_apart(E: int) -> Float32:
    return np.where(np.arange(E) == 3, np.float32(4000), np.arange(E, dtype=np.float32) * -1500)[None]


def chosen(model: ir.Model, given: Arrays) -> tuple[npt.NDArray[np.bool_], Float32]:
    """Of a lowered model: which experts its MoE is fed, [N, E], and with what weights."""
    copy = model.clone()
    (node,) = [node for node in copy.graph if node.op_type in ("MoE", "QMoE")]
    fed = node.inputs[1]
    assert fed is not None
    wide = ir.Value(name="fed", type=ir.TensorType(ir.DataType.FLOAT), shape=fed.shape)
    copy.graph.insert_after(node, ir.Node("", "Cast", [fed], [ir.AttrInt64("to", 1)], outputs=[wide]))
    del copy.graph.outputs[:]
    copy.graph.outputs.append(wide)
    copy.graph.remove(node)
    made = np.asarray(run(copy, given)["fed"], np.float32)
    powers = np.exp(made - made.max(axis=-1, keepdims=True))
    return made > UNCHOSEN, powers / powers.sum(axis=-1, keepdims=True)


def gated(logits: Float32, top_k: int) -> tuple[npt.NDArray[np.bool_], Float32]:
    """The K largest of each row, ties to the lower number, and their softmax, in float64."""
    N, E = logits.shape
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    mask = np.zeros((N, E), bool)
    np.put_along_axis(mask, order, True, axis=-1)
    wide = np.where(mask, logits.astype(np.float64), -np.inf)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return mask, (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("E", "K"), [(6, 2), (6, 1), (6, 3), (4, 4), (1, 1), (40, 8)])
@pytest.mark.parametrize("kind", ["spread", "ties"])
def test_the_same_numbers(E: int, K: int, kind: str) -> None:
    model = dense(E, K)
    given = feeds(model, spread(9, E) if kind == "spread" else ties(E))
    want = run(model, given)["y"]
    assert lower_mixtures(model) == 1
    assert "MoEGate" not in op_types(model)
    np.testing.assert_allclose(run(model, given)["y"], want, rtol=1e-5, atol=1e-5)


def test_the_same_numbers_in_float16() -> None:
    model = dense(x="float16", w="float16")
    given = feeds(model, spread(9, 6))
    want = run(model, given)["y"].astype(np.float32)
    lower_mixtures(model)
    got = run(model, given)["y"]
    assert got.dtype == np.float16
    np.testing.assert_allclose(got.astype(np.float32), want, atol=2.0**-7 * np.abs(want).max())


@pytest.mark.parametrize("type", ["float", "float16", "bfloat16"])
@pytest.mark.parametrize(("E", "K"), [(6, 2), (6, 3), (4, 4), (40, 8)])
@pytest.mark.parametrize("logits", [ties, near_ties, far_apart], ids=lambda each: each.__name__)
def test_rounding_changes_no_choice(type: str, E: int, K: int, logits: object) -> None:
    """Weights are rounded as if they were stored in that type."""
    assert callable(logits)
    values = logits(E)
    model = dense(E, K, x=type, w=type)
    given = {"logits": values}
    lower_mixtures(model)
    mask, weights = chosen(_without_weights(model), given)
    want_mask, want_weights = gated(values, K)
    np.testing.assert_array_equal(mask, want_mask)
    step = {"float": 2.0**-20, "float16": 2.0**-10, "bfloat16": 2.0**-7}[type]
    np.testing.assert_allclose(weights, want_weights, atol=step)


def _without_weights(model: ir.Model) -> ir.Model:
    """Only the router, with a node in the place of the mixture that reads nothing else."""
    (node,) = [node for node in model.graph if node.op_type == "MoE"]
    for index in (0, 2, 4):
        node.replace_input_with(index, None)
    remove_unused(model, ["logits"])
    return model


def test_a_nan_shows() -> None:
    """Also where a logit is NaN with it, which would lead the kernels' choice astray."""
    model = dense()
    lower_mixtures(model)
    given = feeds(model, spread(5, 6))
    given["x"][1, 3], given["logits"][1, 2] = np.nan, np.nan
    given["x"][3, 0], given["logits"][3] = np.inf, np.nan
    hurt = np.isnan(run(model, given)["y"])
    assert hurt[[1, 3]].all()
    assert not hurt[[0, 2, 4]].any()


def test_experts_weights_are_read_in_the_type_of_the_rows() -> None:
    model = dense(x="bfloat16", w="float16")
    lower_mixtures(model)
    (node,) = [node for node in model.graph if node.op_type == "MoE"]
    assert [None if value is None else value.dtype for value in node.inputs] == [
        *[ir.DataType.BFLOAT16] * 3, None, ir.DataType.BFLOAT16,
    ]  # fmt: skip
    whole = node.inputs[2]
    assert whole is not None
    assert whole.shape == ir.Shape([6, 48, 16])
    cast = whole.producer()
    assert cast is not None
    assert cast.inputs[0] is not None
    ordered = cast.inputs[0].producer()
    assert ordered is not None
    assert ordered.inputs[0] is not None
    joined = ordered.inputs[0].producer()
    assert joined is not None
    for maker, op in ((ordered, "Gather"), (joined, "Concat")):
        assert (maker.op_type, maker.attributes["axis"].as_int()) == (op, 1)
    assert integers(ordered.inputs[1]) == [row + half for row in range(24) for half in (0, 24)]
    assert [value.name for value in joined.inputs if value is not None] == ["gate", "up"]


@pytest.mark.parametrize(
    ("bits", "size", "zero"), [(4, 32, False), (4, 32, True), (4, 64, False), (8, 32, True), (8, 64, False)]
)
def test_quantised_experts(bits: int, size: int, zero: bool) -> None:
    """With numbers of 8 bits the kernel on the CPU rounds the rows to 8 bits as well."""
    model = exact_products(quantized_experts(bits, size=size, zero=zero))
    given = feeds(model, spread(7, 3))
    want = run(model, given)["y"]
    assert lower_mixtures(model) == 1
    step = 2.0**-20 if bits == 4 else 2.0**-4
    np.testing.assert_allclose(run(_constant(model, given), given)["y"], want, atol=step * np.abs(want).max())


def _constant(model: ir.Model, given: Arrays) -> ir.Model:
    """QMoE orders its weights anew before it runs, and wants them as constants."""
    for value in list(model.graph.inputs):
        name = str(value.name)
        if name not in ("x", "logits"):
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(given.pop(name), name=name)
            model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_experts_are_told_how_they_lie(bits: int) -> None:
    model = quantized_experts(bits, zero=True, x="float16")
    lower_mixtures(model)
    (node,) = [node for node in model.graph if node.op_type == "QMoE"]
    told = {"expert_weight_bits": bits, "block_size": 32, "k": 2, "weights_prepacked": 0}
    assert {key: node.attributes[key].as_int() for key in told} == told
    shapes = [None if value is None or value.shape is None else value.shape.numpy() for value in node.inputs[2:]]
    bytes_of = bits * 4
    assert shapes == [
        (3, 256, 2 * bytes_of), (3, 256, 2), None, (3, 64, 4 * bytes_of), (3, 64, 4), None,
        None, None, None, (3, 256, bits // 4), (3, 64, bits // 2),
    ]  # fmt: skip
    assert node.inputs[3] is not None
    assert node.inputs[3].dtype == ir.DataType.FLOAT16


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: dense(activation="gelu"), "activation gelu.*silu only.*--backend"),
        (lambda: dense(C=20), "from 20 numbers to 24.*multiples of 8"),
        (lambda: dense(I=28), "from 16 numbers to 28.*multiples of 8"),
        (lambda: dense(C=8), "from 8 numbers to 24.*at least 16"),
        (lambda: quantized_experts(size=16), "blocks of 16.*--block-size"),
        (lambda: quantized_experts(C=96), "from 96 numbers to 128.*multiples of 64"),
        (lambda: quantized_experts(I=96), "from 64 numbers to 96.*multiples of 64"),
        (lambda: quantized_experts(size=128), "from 64 numbers to 128 with blocks of 128"),
        (lambda: quantized_experts(size=64, zero=True), "has 1 blocks of 64 with zero points of 4 bits.*even number"),
        (lambda: quantized_experts(I=192, size=64, C=128, zero=True), "has 3 blocks of 64 with zero points"),
        (lambda: _other_weights(dense()), "do not come from one MoEGate"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(model: object, message: str) -> None:
    assert callable(model)
    with pytest.raises(FusionError, match=message):
        lower_mixtures(model())


def _other_weights(model: ir.Model) -> ir.Model:
    (node,) = [node for node in model.graph if node.op_type == "MixtureOfExperts"]
    halved = ir.Value(name="halved", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, 2]))
    weight = node.inputs[1]
    model.graph.insert_before(node, ir.Node("", "Sqrt", [weight], outputs=[halved]))
    node.replace_input_with(1, halved)
    return model
