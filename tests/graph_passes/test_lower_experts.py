"""Experts in the types that they are stored in: initializers, nodes and numbers after lowering, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.lower.formats import TYPES, LinearFormat, Quantized, Stored, packed_name, scale_name, zero_name
from graph_passes.lower.linears import lower_linears
from graph_passes.unbound import UnboundWeight
from runtime.errors import FusionError
from tests.graph_passes import oracles
from tests.graph_passes.lowering import HALVES, QUANTIZED, bound, fused, quantized, rounded, weights
from tests.graph_passes.op_cases import of_127ths
from tests.graph_passes.texts import EXPERTS
from tests.support.graphs import Arrays, op_types, run

STACKS = {name: f"layers.0.moe.{name}_proj" for name in ("gate", "up", "down")}
FORM = Quantized(4, 16, False, "F16")


def experts() -> ir.Model:
    return fused(EXPERTS, STACKS)


def routed() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "x": of_127ths(rng.standard_normal((5, 12)), 16),
        "weight": rng.random((5, 2), dtype=np.float32),
        "expert": np.stack([rng.permutation(4)[:2] for _ in range(5)]).astype(np.int64),
    }


@pytest.mark.parametrize("form", HALVES, ids=str)
def test_experts_are_read_as_they_are_stored(form: Stored) -> None:
    model, formats = experts(), dict.fromkeys(STACKS.values(), form)
    values = weights(model)
    want = run(bound(model, rounded(values, formats)), routed())["y"]
    lower_linears(model, formats)
    assert op_types(model) == ["MixtureOfExperts"]
    assert {value.dtype for value in model.graph.initializers.values()} == {TYPES[form.dtype]}
    np.testing.assert_allclose(run(bound(model, values), routed())["y"], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", QUANTIZED, ids=str)
def test_quantised_experts_are_one_node_with_all_their_numbers(form: Quantized) -> None:
    model = experts()
    lower_linears(model, dict.fromkeys(STACKS.values(), form))
    shapes = {"gate": (4, 10, 12), "up": (4, 10, 12), "down": (4, 12, 10)}
    made = {name: quantized(STACKS[name], shape, form) for name, shape in shapes.items()}
    values = {key: array for parts, _ in made.values() for key, array in parts.items()}
    (node,) = model.graph
    assert node.op_type == "QuantizedMixtureOfExperts"
    held = [name for stack in STACKS.values() for name in (packed_name(stack), scale_name(stack))]
    zeros = [zero_name(stack) for stack in STACKS.values()] if form.zero_points else []
    assert [v.name for v in node.inputs if v is not None] == ["x", "weight", "expert", *held, *zeros]
    due = {"bits": form.bits, "block_size": form.block_size, "zero_points": int(form.zero_points)}
    due |= {"hidden": 12, "intermediate": 10, "num_experts": 4}
    assert {key: node.attributes[key].as_int() for key in due} == due
    assert node.attributes["activation"].as_string() == "silu"
    assert [function.name for function in model.functions.values()] == ["QuantizedMixtureOfExperts"]
    got = run(bound(model, values), routed())["y"]
    x, weight, expert = routed().values()
    wide = [matrix for _, matrix in made.values()]
    want = oracles.experts(x, weight, expert, *wide, activation="silu")
    room = oracles.gated_rounding(x, weight, expert, *wide, activation="silu", block=form.block_size)
    assert (np.abs(got - want) <= 2e-5 + 2e-5 * np.abs(want) + room).all()


@pytest.mark.parametrize("other", [Stored("F16"), Stored("F32"), FORM, Quantized(8, 16, False, "F16")], ids=str)
def test_experts_in_two_formats_are_refused(other: LinearFormat) -> None:
    formats = dict.fromkeys(STACKS.values(), Stored("BF16")) | {STACKS["up"]: other}
    with pytest.raises(FusionError, match="one node reads them all in one format"):
        lower_linears(experts(), formats)
    del formats[STACKS["up"]]  # float32, then
    with pytest.raises(FusionError, match="one node reads them all in one format"):
        lower_linears(experts(), formats)


def test_layers_that_need_two_bodies_are_refused() -> None:
    """Experts with zero points in one layer and without in another: a file holds one body."""
    model, second = experts(), experts()
    for value in list(second.graph.initializers.values()):
        value.name = str(value.name).replace("layers.0", "layers.1")
    node = model.graph[0]
    stacks = []
    for value in second.graph.initializers.values():
        assert value.shape is not None
        weight = UnboundWeight(str(value.name), ir.DataType.FLOAT, value.shape)
        stacks.append(ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=weight))
        model.graph.register_initializer(stacks[-1])
    by_name = {str(value.name): value for value in stacks}
    again = [by_name[name.replace("layers.0", "layers.1")] for name in STACKS.values()]
    result = ir.Value(name="y_2", type=node.outputs[0].type, shape=node.outputs[0].shape)
    inputs = [node.outputs[0], *node.inputs[1:3], *again]
    model.graph.append(
        ir.Node("cierzo", "MixtureOfExperts", inputs, list(node.attributes.values()), outputs=[result], name="second")
    )
    model.graph.outputs.append(result)
    formats: dict[str, LinearFormat] = dict.fromkeys(STACKS.values(), FORM)
    same = formats | {str(value.name): FORM for value in again}
    lowered = model.clone()
    lower_linears(lowered, same)
    assert op_types(lowered) == ["QuantizedMixtureOfExperts"] * 2
    other = formats | {str(value.name): Quantized(4, 16, True, "F16") for value in again}
    with pytest.raises(FusionError, match="second: this node needs another function body of QuantizedMixtureOfExperts"):
        lower_linears(model, other)
