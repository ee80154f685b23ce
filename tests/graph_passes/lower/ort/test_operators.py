"""Whole models with all operators rewritten, for steps of many tokens and of one: the numbers, and what there is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.lower.ort.decode import specialize_decode
from graph_passes.lower.ort.operators import OperatorCounts, lower_operators
from graph_passes.lower.ort.steps import unflatten_steps
from graph_passes.lower.ort.unused import remove_unused
from runtime.errors import FusionError
from tests.support.graphs import Arrays, run
from tests.support.ort_lowering import MODELS, a_step, exact_products, lowered_graph

COUNTS = {
    "window": OperatorCounts(11, 0, 5, 2, 0),
    "no window, biases, tied": OperatorCounts(11, 0, 5, 2, 0),
    "norms of heads, experts": OperatorCounts(7, 0, 9, 0, 2),
    "queries scaled by their positions": OperatorCounts(11, 0, 5, 2, 0),
    "traced from transformers": OperatorCounts(11, 0, 5, 2, 0),
    "experts, traced from transformers": OperatorCounts(7, 0, 5, 0, 2),
    "quantised": OperatorCounts(0, 11, 5, 2, 0),
    "quantised experts": OperatorCounts(2, 5, 5, 0, 2),
}
ROUNDINGS = 2e-5
"""Of the largest number: a few hundred float32 roundings."""


def graph_of(model: str, arithmetic: str = "float32") -> ir.Model:
    return exact_products(lowered_graph(arithmetic, **MODELS[model]))


def rewritten(model: str, arithmetic: str = "float32") -> ir.Model:
    graph = graph_of(model, arithmetic)
    unflatten_steps(graph)
    lower_operators(graph)
    return graph


def hold(got: Arrays, want: Arrays) -> None:
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_allclose(got[name], want[name], atol=ROUNDINGS * np.abs(want[name]).max(), err_msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_the_same_numbers(model: str) -> None:
    before, after = graph_of(model), graph_of(model)
    unflatten_steps(after)
    assert lower_operators(after) == COUNTS[model]
    assert {node.op_type for node in after.graph if node.domain == "cierzo"} <= {
        "RollingAttention", "PackedRollingAttention",
    }  # fmt: skip
    assert not [node for node in after.graph if node.op_type == "Split" and len(node.outputs) == 2]
    step = a_step(before)
    hold(run(after, step), run(before, step))


@pytest.mark.parametrize("model", MODELS)
def test_a_single_token(model: str) -> None:
    before, after = graph_of(model), rewritten(model)
    specialize_decode(after)
    step = a_step(before, tokens=1, asked=1, batch=3)
    want = run(before, step)
    del step["logit_positions"]
    hold(run(after, step), want)


@pytest.mark.parametrize("model", MODELS)
def test_nothing_depends_on_a_number_of_tokens(model: str) -> None:
    graph = rewritten(model, "float32" if "quantised" in model else "bfloat16")
    specialize_decode(graph)
    extents = {str(value.name): [str(extent) for extent in value.shape or ()] for value in graph.graph.inputs}
    assert extents["input_ids"] == ["B", "1"]
    assert "logit_positions" not in extents
    assert [str(extent) for extent in graph.graph.outputs[0].shape or ()] == ["B", "1", "64"]
    assert not {"Range", "CumSum", "GatherND", "Squeeze"} & {node.op_type for node in graph.graph}
    for node in graph.graph:
        if node.op_type == "Shape":  # the constant that experts are not chosen by
            assert [use.node.op_type for use in node.outputs[0].uses()] == ["ConstantOfShape"]
        for value in node.outputs:
            assert not {"T", "R"} & {letter for extent in value.shape or () for letter in str(extent).split("*")}


def test_inputs_that_nothing_reads_are_removed() -> None:
    graph = rewritten("window")
    for node in [node for node in graph.graph if "RollingAttention" in node.op_type]:
        counts = next(index for index, value in enumerate(node.inputs) if value and value.name == "token_counts")
        node.replace_input_with(counts, node.inputs[counts - 1])
    kept, dropped = graph.clone(), graph
    remove_unused(kept, keep=["token_counts"])
    assert "token_counts" in [value.name for value in kept.graph.inputs]
    remove_unused(dropped)
    assert "token_counts" not in [value.name for value in dropped.graph.inputs]
    assert not {"RMSNorm", "StoredMatMul", "GatedActivation"} & {name for _, name, _ in dropped.functions}


def _not_unflattened(graph: ir.Model) -> None:
    pass


def _without_rows(graph: ir.Model) -> None:
    next(value for value in graph.graph.inputs if value.name == "logit_positions").name = "asked"


def _rows_read_otherwise(graph: ir.Model) -> None:
    unflatten_steps(graph)
    node = next(node for node in graph.graph if node.op_type == "GatherND")
    node.op_type = "Gather"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_not_unflattened, "positions of a step are computed in another way"),
        (_without_rows, "has other inputs"),
        (_rows_read_otherwise, "logit_positions is read in another way"),
    ],
)
def test_other_graphs_are_no_steps_of_one_token(change: Callable[[ir.Model], None], message: str) -> None:
    graph = graph_of("window")
    change(graph)
    with pytest.raises(FusionError, match=message):
        specialize_decode(graph)
