"""Faults in a bundle's graph, each a change of one node, one constant or one function body."""

from __future__ import annotations

import numpy as np
import onnx

from tests.support.planted import attribute, body_node, node


def scale_of_layer_2(model: onnx.ModelProto) -> None:
    attribute(model, "RollingAttention", "scale", 2).f *= 1.001


def keys_from_the_ring_of_values(model: onnx.ModelProto) -> None:
    """Both rings are empty in the first step, so that it comes out right."""
    attention = node(model, "RollingAttention", 1)
    assert attention.input[5] == "past.1.key"
    attention.input[5] = "past.1.value"


def slots_that_do_not_wrap(model: onnx.ModelProto) -> None:
    """The write counts slots modulo 2³¹ − 1 in effect: right until the ring is full."""
    modulo = body_node(model, "RollingKVWrite", "Mod")
    modulo.op_type = "Min"
    modulo.input[1] = "last_slot"
    body = next(body for body in model.functions if body.name == "RollingKVWrite")
    body.node.insert(list(body.node).index(modulo), onnx.helper.make_node("Sub", ["slots_1", "one"], ["last_slot"]))


def body_with_another_window(model: onnx.ModelProto) -> None:
    body_node(model, "SlidingWindowAttention", "Less").op_type = "LessOrEqual"


def frequencies(model: onnx.ModelProto) -> None:
    _scale(model, "rotary.inverse_frequency_d", slice(None))


def smallest_frequency(model: onnx.ModelProto) -> None:
    _scale(model, "rotary.inverse_frequency_d", slice(-1, None))


def epsilon(model: onnx.ModelProto) -> None:
    """That of one RMSNorm, 1 % larger."""
    attribute(model, "RMSNorm", "epsilon", 2).f *= 1.01


def _scale(model: onnx.ModelProto, name: str, which: slice) -> None:
    (constant,) = [c for c in model.graph.initializer if c.name == name]
    array = onnx.numpy_helper.to_array(constant).copy()
    array.reshape(-1)[which] *= np.float32(1.01)
    constant.CopyFrom(onnx.numpy_helper.from_array(array, constant.name))


def one_node_more(model: onnx.ModelProto) -> None:
    place = next(i for i, n in enumerate(model.graph.node) if n.output[0] == "layers.2.linear_3")
    model.graph.node[place].output[0] = "raw"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1.01, np.float32), "factor"))
    more = onnx.helper.make_node("Mul", ["raw", "factor"], ["layers.2.linear_3"], name="one_more")
    model.graph.node.insert(place + 1, more)


def renamed_with_a_narrower_window(model: onnx.ModelProto) -> None:
    """As if another version had named every inner value; golden then knows only the rings and the modules."""
    attribute(model, "RollingAttention", "window", 2).i -= 1
    fixed = {value.name for value in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    for one in model.graph.node:
        for names in (one.input, one.output):
            names[:] = [name if name in fixed or not name else f"other.{name}" for name in names]
    for value in model.graph.value_info:
        value.name = f"other.{value.name}"
