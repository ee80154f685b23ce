"""Rows with both axes: the same numbers to the last bit, no arithmetic on shapes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.graph import integers
from graph_passes.lower.ort.steps import unflatten_steps
from runtime.errors import FusionError
from tests.support.graphs import run
from tests.support.ort_lowering import MODELS, a_step, lowered_graph


@pytest.mark.parametrize("model", MODELS)
def test_the_same_numbers(model: str) -> None:
    graph = lowered_graph(**MODELS[model])
    steps = [a_step(graph, *sizes) for sizes in ((3, 2, 2), (1, 1, 1), (4, 3, 3))]
    before = [run(graph, step) for step in steps]
    unflatten_steps(graph)
    for step, want in zip(steps, before, strict=True):
        got = run(graph, step)
        assert list(got) == list(want)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_shapes_are_constants(model: str) -> None:
    graph = lowered_graph("float32" if "quantised" in model else "bfloat16", **MODELS[model])
    inputs = [(value.name, value.shape) for value in graph.graph.inputs]
    unflatten_steps(graph)
    assert [(value.name, value.shape) for value in graph.graph.inputs] == inputs
    ops = [node.op_type for node in graph.graph]
    mixtures = sum("MixtureOfExperts" in op for op in ops)
    assert ops.count("Shape") == mixtures
    assert not {"Range", "Size", "Squeeze"} & set(ops)
    assert (ops.count("CumSum"), ops.count("GatherND")) == (1, 1)
    computed = [node for node in graph.graph if node.op_type == "Reshape" and integers(node.inputs[1]) is None]
    assert len(computed) == mixtures
    logits = graph.graph.outputs[0]
    assert logits.shape == ir.Shape([ir.SymbolicDim("B"), ir.SymbolicDim("R"), 64])
    rows = [value for node in graph.graph for value in node.outputs if value.shape and str(value.shape[0]) == "B*T"]
    assert bool(rows) == bool(mixtures)


def _without_input(graph: ir.Model) -> None:
    next(value for value in graph.graph.inputs if value.name == "start_positions").name = "begins"


def _other_positions(graph: ir.Model) -> None:
    """t begins with 1."""
    step = next(node for node in graph.graph if node.op_type == "Range")
    step.replace_input_with(0, step.inputs[2])


def _other_rows(graph: ir.Model) -> None:
    """The last of those asked for comes first."""
    asked = next(value for value in graph.graph.inputs if value.name == "logit_positions")
    (use,) = [use for use in asked.uses() if use.node.op_type == "Add"]
    use.node.op_type = "Sub"


def _another_operator(graph: ir.Model) -> None:
    node = next(node for node in graph.graph if node.op_type == "GatedActivation")
    node.domain, node.op_type = "", "BitwiseAnd"


def _split_across(graph: ir.Model) -> None:
    node = [node for node in graph.graph if node.op_type == "Split"][-1]
    node.attributes["axis"] = ir.AttrInt64("axis", 0)


def _table_of_rows(graph: ir.Model) -> None:
    """A second operand with a row of its own for each row."""
    node = next(node for node in graph.graph if node.op_type == "GatedActivation")
    table = ir.Value(name="table", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([6, 48]))
    graph.graph.inputs.append(table)
    node.domain, node.op_type = "", "Mul"
    node.attributes.clear()
    node.replace_input_with(1, table)


def _heads_of_all_rows(graph: ir.Model) -> None:
    node = [node for node in graph.graph if node.op_type == "Reshape"][-1]
    assert node.outputs[0].shape is not None
    node.outputs[0].shape = ir.Shape([2, 64])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_input, "has no input start_positions"),
        (_other_positions, "computes with shapes"),
        (_other_rows, "picks rows in a way"),
        (_another_operator, "BitwiseAnd .* treats rows in a way"),
        (_split_across, "splits rows across"),
        (_table_of_rows, "Mul .* treats rows in a way"),
        (_heads_of_all_rows, "takes rows apart"),
    ],
)
def test_what_is_not_followed_is_refused(change: Callable[[ir.Model], None], message: str) -> None:
    graph = lowered_graph("float16")
    change(graph)
    with pytest.raises(FusionError, match=message):
        unflatten_steps(graph)
