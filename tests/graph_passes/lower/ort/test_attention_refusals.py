"""What the lowering of attention refuses, each with its cause and the way out, and with the graph as it was."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from graph_passes.lower.ort.attention import lower_attention
from runtime.engine_info import DECODE, PREFILL
from runtime.errors import BackendError, CierzoError, FusionError
from tests.graph_passes.lower.ort.attention_cases import attention_only
from tests.support.graphs import serialised


def attention(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.domain == "cierzo")


def refused(model: ir.Model, error: type[CierzoError], message: str, step: str = PREFILL) -> None:
    before = serialised(model)
    with pytest.raises(error, match=message):
        lower_attention(model, step, 4)
    assert serialised(model) == before


@pytest.mark.parametrize("step", [PREFILL, DECODE])
@pytest.mark.parametrize("head_dim", [12, 264])
def test_heads_that_flash_attention_does_not_take(step: str, head_dim: int) -> None:
    """In both steps: an engine needs both."""
    model = attention_only(windows=(0, 5), head_dim=head_dim)
    refused(model, BackendError, rf"heads of {head_dim}.*multiple of 8 and at most 256.*backend", step)


@pytest.mark.parametrize("head_dim", [12, 264])
def test_such_heads_without_a_window_are_no_matter(head_dim: int) -> None:
    assert lower_attention(attention_only(windows=(0,), head_dim=head_dim), PREFILL, 4).scratch is None


def int8_rings(model: ir.Model) -> None:
    attention(model).op_type = "RollingAttentionInt8"


def float8_rings(model: ir.Model) -> None:
    attention(model).inputs[4].type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)  # type: ignore[union-attr]


def float32_rings(model: ir.Model) -> None:
    for index in (3, 4):
        attention(model).inputs[index].type = ir.TensorType(ir.DataType.FLOAT)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (int8_rings, r"int8.*--kv float16"),
        (float8_rings, r"ring past_0_value is FLOAT8E4M3FN.*Build it with rings of the type of its arithmetic"),
        (float32_rings, r"ring past_0_key is FLOAT,.*computes in BFLOAT16"),
    ],
    ids=["int8", "float8", "float32"],
)
def test_rings_of_another_type(change: Callable[[ir.Model], None], message: str) -> None:
    model = attention_only()
    change(model)
    refused(model, BackendError, message)


def another_attribute(model: ir.Model) -> None:
    attention(model).attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)


def an_attribute_less(model: ir.Model) -> None:
    attention(model).attributes.pop("interleaved")


def an_input_less(model: ir.Model) -> None:
    attention(model).replace_input_with(2, None)


def another_window(model: ir.Model) -> None:
    attention(model).attributes["window"] = ir.AttrInt64("window", -1)


def another_turning(model: ir.Model) -> None:
    attention(model).attributes["interleaved"] = ir.AttrInt64("interleaved", 2)


def another_width(model: ir.Model) -> None:
    attention(model).attributes["heads"] = ir.AttrInt64("heads", 6)


def heads_that_do_not_share(model: ir.Model) -> None:
    attention(model).attributes["heads"] = ir.AttrInt64("heads", 3)
    attention(model).inputs[0].shape = ir.Shape(["B", "T", 7, 8])  # type: ignore[union-attr]


def an_open_ring(model: ir.Model) -> None:
    attention(model).inputs[3].shape = ir.Shape(["B", 2, "S", 8])  # type: ignore[union-attr]


def two_kinds_of_rings(model: ir.Model) -> None:
    attention(model).inputs[4].shape = ir.Shape(["B", 2, 9, 8])  # type: ignore[union-attr]


def integers(model: ir.Model) -> None:
    attention(model).inputs[0].type = ir.TensorType(ir.DataType.INT8)  # type: ignore[union-attr]


def another_reader_of_a_ring(model: ir.Model) -> None:
    ring = attention(model).inputs[3]
    model.graph.append(ir.node("Shape", [ring]))


def another_reader_of_a_present(model: ir.Model) -> None:
    model.graph.append(ir.node("Neg", [attention(model).outputs[1]]))


def another_reader(model: ir.Model) -> None:
    model.graph.append(ir.node("Neg", [attention(model).outputs[0]]))


def another_shape(model: ir.Model) -> None:
    """[0, 0, 0, -1] takes the heads' extent from what it reads."""
    rows = next(use.node for use in attention(model).outputs[0].uses())
    tensor = ir.tensor([0, 0, 0, -1], name="four")
    four = ir.Value(name="four", type=ir.TensorType(tensor.dtype), shape=ir.Shape([4]), const_value=tensor)
    model.graph.register_initializer(four)
    rows.replace_input_with(1, four)


def other_rows(model: ir.Model) -> None:
    start = next(value for value in model.graph.inputs if value.name == "start")
    other = ir.Value(name="other", type=start.type, shape=start.shape)
    model.graph.inputs.append(other)
    attention(model).replace_input_with(5, other)


def another_type(model: ir.Model) -> None:
    layer = attention(model)
    for value in (layer.inputs[0], *layer.inputs[3:5]):
        assert value is not None
        value.type = ir.TensorType(ir.DataType.FLOAT16)


def no_attention(model: ir.Model) -> None:
    for node in model.graph:
        node.domain = "elsewhere" if node.domain == "cierzo" else node.domain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_attribute, r"has the attributes .*softcap.*Export the checkpoint again"),
        (an_attribute_less, r"has the attributes heads, kv_heads, rounds"),
        (an_input_less, r"has 6 inputs and 3 outputs"),
        (another_window, r"window -1"),
        (another_turning, r"interleaved 2"),
        (another_width, r"'product_heads_0' of the shape \[B,T,8,8\] for 6 heads on 2 of 8"),
        (heads_that_do_not_share, r"has 3 heads on 2"),
        (an_open_ring, r"'past_0_key' of the shape \[B,2,S,8\], where axis 2 is no fixed size"),
        (two_kinds_of_rings, r"the ring 'past_0_value' of the shape \[B,2,9,8\]"),
        (integers, r"attends in INT8"),
        (another_reader_of_a_ring, r"is not the only one that reads past_0_key and writes present_0_key"),
        (another_reader_of_a_present, r"is not the only one that reads past_0_key and writes present_0_key"),
        (another_reader, r"'attended_0', which others read than Reshapes of it to rows"),
        (another_shape, r"'attended_0', which others read than Reshapes of it to rows"),
        (other_rows, r"different start positions or counts"),
        (another_type, r"compute in different types"),
        (no_attention, r"no attention node of Cierzo's"),
    ],
)
def test_graphs_that_are_none_of_cierzos(change: Callable[[ir.Model], None], message: str) -> None:
    model = attention_only()
    change(model)
    refused(model, FusionError, message)


def test_a_step_of_another_name() -> None:
    refused(attention_only(), FusionError, "prefill or decode, not decode_many", "decode_many")
