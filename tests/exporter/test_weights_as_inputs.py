"""Weights of a graph as inputs: what is made of files alone, and the expression that makes it again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from exporter.build.weights_as_inputs import Reader, WeightInputs
from runtime.engine_info import INPUT
from runtime.step_engine_info import CONSTANT
from runtime.weight_expression import pieces
from tests.support.graphs import parse

FILE = "weights"
STACK = (3, 2, 4)
"""Experts, rows and columns."""
GATE, UP = np.random.default_rng(0).standard_normal((2, *STACK), dtype=np.float32)
TOGETHER = np.concatenate([GATE, UP], axis=1)


def graph(nodes: str, result: str = "float[3, 4, 4]") -> ir.Model:
    """A graph that adds `w`, which `nodes` make of the weights `gate` and `up`, to its input."""
    stack = "float[3, 2, 4]"
    model = parse(
        f"step ({result} x, {stack} gate, {stack} up) => ({result} y) "
        f"<int64[3] turned = {{2, 0, 1}}, int64[2] flat = {{3, 16}}, "
        f"int64[2] swapped = {{1, 0}}, int64[4] mixed = {{0, 2, 1, 3}}> {{ {nodes} y = Add (x, w) }}"
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    for offset, value in enumerate([value for value in model.graph.inputs if value.name in ("gate", "up")]):
        model.graph.inputs.remove(value)
        assert value.shape is not None
        size = GATE.nbytes
        value.const_value = ir.ExternalTensor(
            FILE, offset * size, size, ir.DataType.FLOAT, shape=value.shape, name=str(value.name)
        )
        model.graph.register_initializer(value)
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / FILE).write_bytes(GATE.tobytes() + UP.tobytes())
    return tmp_path / FILE


def detached(model: ir.Model, file: Path) -> dict[str, NDArray[np.float32]]:
    """The weights that the graph asks for afterwards, as their expressions make them."""
    weights = WeightInputs(model, {})
    weights.detach_all()
    assert {weight.role for weight in weights.made()} == {INPUT}
    return {
        weight.name: np.concatenate(list(pieces(weight.expression, lambda _: file, weights.orders)))
        .view(np.float32)
        .reshape(weight.shape)
        for weight in weights.made()
    }


@pytest.mark.parametrize(
    ("nodes", "result", "want"),
    [
        ("w = Concat <axis = 1> (gate, up)", "float[3, 4, 4]", TOGETHER),
        ("w = Concat <axis = 0> (gate, up)", "float[6, 2, 4]", np.concatenate([GATE, UP])),
        ("both = Concat <axis = 1> (gate, up) w = Reshape (both, flat)", "float[3, 16]", TOGETHER.reshape(3, 16)),
        ("w = Gather <axis = 1> (gate, swapped)", "float[3, 2, 4]", GATE[:, [1, 0]]),
        (
            "both = Concat <axis = 1> (gate, up) w = Gather <axis = 1> (both, mixed)",
            "float[3, 4, 4]",
            TOGETHER[:, [0, 2, 1, 3]],
        ),
        ("w = Gather <axis = 0> (gate, turned)", "float[3, 2, 4]", GATE[[2, 0, 1]]),
        (
            "first = Concat <axis = 0> (gate, up) second = Concat <axis = 0> (up, gate) "
            "w = Concat <axis = 1> (first, second)",
            "float[6, 4, 4]",
            np.concatenate([TOGETHER, np.concatenate([UP, GATE], axis=1)]),
        ),
    ],
)
def test_what_is_made_of_weights_alone_is_one_weight(
    nodes: str, result: str, want: NDArray[np.float32], file: Path
) -> None:
    model = graph(nodes, result)
    (made,) = detached(model, file).values()
    np.testing.assert_array_equal(made, want)


def test_experts_that_are_rounded_stay_one_behind_the_other(file: Path) -> None:
    nodes = "a = Cast <to = 10> (gate) b = Cast <to = 10> (up) c = Concat <axis = 1> (a, b) w = Cast <to = 1> (c)"
    (made,) = detached(graph(nodes), file).values()
    np.testing.assert_array_equal(made, TOGETHER.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    "nodes",
    [
        "w = Concat <axis = 2> (gate, up)",  # neither of the orders that a file can be read in
        "t = Gather <axis = 0> (gate, turned) w = Concat <axis = 1> (t, up)",  # whose experts are where is not seen
        "t = Neg (gate) w = Concat <axis = 1> (t, up)",
        "t = Gather <axis = 0> (gate, turned) u = Concat <axis = 1> (t, up) w = Gather <axis = 1> (u, mixed)",
    ],
)
def test_what_cannot_be_read_from_files_stays_with_its_node(nodes: str, file: Path) -> None:
    result = "float[3, 2, 8]" if "axis = 2" in nodes else "float[3, 4, 4]"
    model = graph(nodes, result)
    for made in detached(model, file).values():
        assert made.shape == STACK
    assert any(node.op_type == "Concat" and node.outputs[0].uses() for node in model.graph)


def test_an_op_says_what_becomes_of_its_weights(file: Path) -> None:
    model = graph("w = Concat <axis = 1> (gate, up)")
    weights = WeightInputs(model, {("", "Add"): Reader(computed=(), role=CONSTANT)})
    weights.detach_all()
    assert [weight.role for weight in weights.made()] == [CONSTANT]
