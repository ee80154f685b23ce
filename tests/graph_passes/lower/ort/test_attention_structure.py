"""What lowering makes of attention nodes: which operators, of which shapes, and what layers share or wait for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.lower.ort import plan
from graph_passes.lower.ort.attention import lower_attention
from graph_passes.lower.ort.plan import BOUNDS, PAGE, AttentionPlan, Ring, ScratchMemory
from runtime import step_engine_info
from runtime.engine_info import DECODE, PREFILL
from tests.graph_passes.lower.ort.attention_cases import attention_only
from tests.support.graphs import Arrays, check, op_types, run

CHUNK = 4


def lowered(step: str, windows: tuple[int, ...], dtype: str = "bfloat16", packed: bool = True) -> ir.Model:
    model = attention_only(dtype, windows, packed)
    lower_attention(model, step, CHUNK)
    check(model)
    return model


def added(step: str, windows: tuple[int, ...], dtype: str = "bfloat16", packed: bool = True) -> Counter[str]:
    """Operators that the last of the layers adds."""
    fewer = Counter(op_types(lowered(step, windows[:-1], dtype, packed)))
    return Counter(op_types(lowered(step, windows, dtype, packed))) - fewer


def maker(model: ir.Model, name: str) -> ir.Node:
    (node,) = [node for node in model.graph if name in [value.name for value in node.outputs]]
    return node


# What the test's own graph has in each layer: the shaping into heads, which has no reader afterwards, and its output.
OWN = Counter({"Reshape": 1, "Neg": 1})
DECODED = Counter({"Split": 1, "RotaryEmbedding": 2, "TensorScatter": 2, "Attention": 1})


@pytest.mark.parametrize("window", [5, 0])
def test_a_layer_that_decodes_is_six_kernels(window: int) -> None:
    assert added(DECODE, (window, window)) == DECODED + OWN


def test_float16_marks_what_it_cannot_hold() -> None:
    assert added(DECODE, (5, 5), "float16") == DECODED + OWN + Counter({"Sub": 2, "Add": 2})


def test_projections_that_are_apart_need_no_split() -> None:
    expected = DECODED - Counter(["Split"]) + Counter({"Reshape": 3, "Neg": 1})
    assert added(DECODE, (5, 5), packed=False) == expected


def test_many_tokens_without_a_window_are_the_same() -> None:
    assert added(PREFILL, (0, 0)) == DECODED + OWN


def test_many_tokens_over_a_window() -> None:
    """Beside attention, what makes a layer wait for the one before it, and Reshapes, which move nothing."""
    paged = Counter({"Split": 1, "RotaryEmbedding": 2, "PagedAttention": 1, "Gather": 4})
    waiting = Counter({"Gather": 2, "Add": 2, "Cast": 1, "Mul": 1, "Reshape": 2})
    shaped = Counter({"Reshape": 2 + 3 + 2 + 1, "Shape": 1})
    assert added(PREFILL, (5, 5)) == paged + waiting + shaped + OWN


@pytest.mark.parametrize("windows", [(5,), (5, 5, 5), (5, 3, 5, 3), (5, 0, 5)])
@pytest.mark.parametrize("step", [PREFILL, DECODE])
def test_numbers_are_worked_out_once_for_each_window(step: str, windows: tuple[int, ...]) -> None:
    """The rotary tables are cast once, and the indices of a window made once, for all its layers."""
    model = lowered(step, windows)
    names = [str(value.name) for node in model.graph for value in node.outputs]
    assert len(names) == len(set(names))
    assert [name for name in names if name.startswith(("cos", "sin"))] == ["cos.bfloat16", "sin.bfloat16"]
    suffix = ".kept" if step == PREFILL else ".slot"
    made = [f"attention.window_{window}{suffix}" for window in dict.fromkeys(w for w in windows if w)]
    assert [name for name in names if name.startswith("attention.window") and name.endswith(suffix)] == made


def test_decoding_looks_at_no_shape_and_no_count() -> None:
    """Nothing comes from or goes to the host, so that a CUDA graph can be captured."""
    model = lowered(DECODE, (5, 0, 3))
    assert not {"Shape", "Expand", "Range", "PagedAttention"} & set(op_types(model))
    (count,) = [value for value in model.graph.inputs if value.name == "count"]
    assert not count.uses()


def test_no_arithmetic_on_shapes() -> None:
    """ONNX Runtime would do it on the CPU: what a Shape node says goes into a Reshape or an Expand as it is."""
    model = lowered(PREFILL, (5, 0, 3))
    shapes = [node.outputs[0] for node in model.graph if node.op_type == "Shape"]
    assert shapes
    assert {use.node.op_type for shape in shapes for use in shape.uses()} == {"Reshape", "Expand"}


def behind(node: ir.Node) -> set[ir.Node]:
    """All nodes whose results `node` needs."""
    found: set[ir.Node] = set()
    stack = [node]
    while stack:
        for value in stack.pop().inputs:
            source = value.producer() if value is not None else None
            if source is not None and source not in found:
                found.add(source)
                stack.append(source)
    return found


def test_a_layer_waits_for_the_one_that_had_the_scratch_memory_before_it() -> None:
    """Also across a layer without a window, and where the layers have nothing else to do with one another."""
    model = lowered(PREFILL, (5, 0, 3, 5))
    for earlier, later in ((0, 2), (2, 3)):
        written = {maker(model, f"present_{earlier}_{kind}") for kind in ("key", "value")}
        for kind in ("key", "value"):
            assert written <= behind(maker(model, f"past_{later}_{kind}.gathered"))
            assert not written & behind(maker(model, f"past_{earlier}_{kind}.gathered"))


@pytest.mark.parametrize("step", [PREFILL, DECODE])
@pytest.mark.parametrize("packed", [True, False])
def test_every_value_has_its_type_and_shape(step: str, packed: bool) -> None:
    model = lowered(step, (5, 0, 3), packed=packed)
    for node in model.graph:
        for value in node.outputs:
            assert value.dtype is not None, value.name
            assert value.shape is not None, value.name
            assert all(isinstance(extent, int) or extent.value for extent in value.shape), value.name


def test_the_plan_and_what_the_graph_takes_and_gives() -> None:
    plans: dict[str, AttentionPlan] = {}
    for step in (PREFILL, DECODE):
        model = attention_only(windows=(5, 0))
        names = [[str(value.name) for value in values] for values in (model.graph.inputs, model.graph.outputs)]
        plans[step] = lower_attention(model, step, CHUNK)
        scratch = plans[step].scratch
        more = [f"past_0_{kind}.{when}" for kind in ("key", "value") for when in ("gathered", "written")]
        now = [[str(value.name) for value in values] for values in (model.graph.inputs, model.graph.outputs)]
        assert now == [names[0] + ([BOUNDS] if scratch else []), names[1] + (more if scratch else [])]
        shapes = {str(value.name): str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)}
        for ring in plans[step].rings:
            for name in (ring.past_key, ring.past_value, ring.present_key, ring.present_value):
                assert shapes[name] == f"[B,{ring.slots},16]"
        if scratch:
            assert {shapes[name] for name in (*scratch.keys, *scratch.values)} == {"[B,256,2,8]"}
            assert shapes[BOUNDS] == "[2]"
    assert plans[DECODE] == AttentionPlan(plans[PREFILL].rings, None)
    assert plans[PREFILL].rings == (
        Ring("past_0_key", "past_0_value", "present_0_key", "present_0_value", 5, 5),
        Ring("past_1_key", "past_1_value", "present_1_key", "present_1_value", 8 + CHUNK, None),
    )
    assert plans[PREFILL].scratch == ScratchMemory(
        256,
        ("past_0_key.gathered", "past_0_key.written"),
        ("past_0_value.gathered", "past_0_value.written"),
    )


@pytest.mark.parametrize(("window", "chunk", "slots"), [(5, 252, 256), (5, 253, 512), (4096, 512, 4608), (1, 256, 256)])
def test_the_scratch_memory_holds_a_window_and_a_chunk(window: int, chunk: int, slots: int) -> None:
    """W − 1 positions before the step's first token and the step, in whole pages."""
    scratch = lower_attention(attention_only(windows=(window, 3 if window > 3 else 1)), PREFILL, chunk).scratch
    assert scratch is not None
    assert scratch.slots == slots


def test_the_runtime_knows_the_same_names() -> None:
    assert (PAGE, BOUNDS) == (step_engine_info.PAGE, step_engine_info.BOUNDS)
    assert (plan.PREFILL, plan.DECODE) == (PREFILL, DECODE)
    for ours, its in ((Ring, step_engine_info.StepRing), (ScratchMemory, step_engine_info.Scratch)):
        assert ours.__slots__ == its.__slots__


def test_without_a_window_there_is_no_scratch_memory() -> None:
    model = attention_only(windows=(0, 0))
    assert lower_attention(model, PREFILL, CHUNK).scratch is None
    assert BOUNDS not in [value.name for value in model.graph.inputs]


def test_an_infinite_key_is_marked_in_float16() -> None:
    """All queries point away from it, so that it would have no weight at all."""
    model = attention_only("float16", (5,), packed=False)
    lower_attention(model, DECODE, CHUNK)
    feeds: Arrays = {name: np.ones((1, 1, 4), np.float32) for name in ("cos", "sin")}
    feeds["start"], feeds["count"] = np.array([1]), np.array([1])
    feeds["query_0"] = np.full((1, 1, 32), -1, np.float16)
    feeds["key_0"], feeds["value_0"] = np.zeros((2, 1, 1, 16), np.float16)
    feeds["past_0_key"], feeds["past_0_value"] = np.zeros((2, 1, 5, 16), np.float16)
    assert np.isfinite(run(model, feeds)["y_0"]).all()
    feeds["query_0"][..., 4:8] = feeds["query_0"][..., 12:16] = 0  # turned: −1 and −1 beside zeros
    feeds["key_0"][..., 0] = np.inf
    marked = run(model, feeds)
    assert np.isnan(marked["present_0_key"][0, 1]).any()
    assert np.isnan(marked["y_0"][..., :16]).all()
    unmarked = model.clone()
    for node in [node for node in unmarked.graph if node.op_type == "TensorScatter"]:
        update = node.inputs[1]
        add = update.producer() if update is not None else None
        assert add is not None
        node.replace_input_with(1, add.inputs[0])
    assert np.isfinite(run(unmarked, feeds)["y_0"]).any()
