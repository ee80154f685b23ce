"""The gated activation: which spellings become a node, and why the others do not."""

from __future__ import annotations

import re

import numpy as np
import pytest

from graph_passes.fuse import gated_activation
from graph_passes.ops.activations import ACTIVATIONS, activation_body
from tests.graph_passes.texts import SWIGLU, fuse, refusal
from tests.support.graphs import assert_same_outputs, mutate, op_types, parse, statements

SILU = "slope = Sigmoid (gate)\n    active = Mul (gate, slope)"
DEEP = SWIGLU.replace("float[N,", "float[B,T,").replace("N,10", "B,T,10")


@pytest.mark.parametrize(
    ("change", "activation"),
    [
        ([], "silu"),
        ([("Mul (active, up)", "Mul (up, active)")], "silu"),
        ([("Mul (gate, slope)", "Mul (slope, gate)")], "silu"),
        ([(SILU, "low = Neg (gate) e = Exp (low) one = Constant <value_float = 1.0> () "
                 "total = Add (one, e) active = Div (gate, total)")], "silu"),
        *[([(SILU, activation_body(name, "gate", "active"))], name) for name in ACTIVATIONS],
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", [SWIGLU, DEEP], ids=["two axes", "three axes"])
def test_fuses(text: str, change: list[tuple[str, str]], activation: str) -> None:
    model, (record,) = fuse(mutate(text, *change), gated_activation.RULE)
    assert record.attributes == {"activation": activation}
    assert statements(model)[-1] == "gated = cierzo.GatedActivation(gate, up)"
    assert op_types(model) == ["MatMul", "MatMul", "GatedActivation"]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 12) if text is SWIGLU else (2, 5, 12), dtype=np.float32)
    gate, up = rng.standard_normal((2, 12, 10), dtype=np.float32)
    assert_same_outputs(parse(mutate(text, *change)), model, {"x": x, "gate_weight": gate, "up_weight": up})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ([("Mul (active, up)", "Mul (active, gate)")], "both factors come from the same product"),
        ([("Mul (active, up)", "Add (active, up)")], "both factors come from the same product"),
        ([(SILU, "active = Identity (gate)")], "not an activated product times another product"),
        ([(SILU, "active = Softmax <axis = -1> (gate)")], "the activation is not elementwise: .* comes from Softmax"),
        ([(SILU, "active = Sin (gate)")], "the activation is none that is known; the nearest, .*, differs by"),
        ([(SILU, "both = Add (gate, up) active = Sigmoid (both)")], "the activation depends on more than the gate"),
        ([(SILU, "active = Sigmoid (x)"), ("float[12,10] up_weight", "float[12,12] up_weight"),
          ("float[12,10] gate_weight", "float[12,12] gate_weight"), ("float[N,10]", "float[N,12]")],
         "there is no product behind the activation"),
    ],
)  # fmt: skip
def test_refuses(change: list[tuple[str, str]], reason: str) -> None:
    assert re.search(reason, refusal(mutate(SWIGLU, *change), gated_activation.RULE))


@pytest.mark.parametrize(
    ("x", "weight", "y"), [("N,12", "12", "N"), ("12", "12,10", "10"), ("A,B,T,12", "12,10", "A,B,T,10")]
)
def test_fuses_gates_of_one_to_four_axes(x: str, weight: str, y: str) -> None:
    text = SWIGLU.replace("[N,12]", f"[{x}]").replace("[12,10]", f"[{weight}]").replace("[N,10]", f"[{y}]")
    model, _ = fuse(text, gated_activation.RULE)
    assert op_types(model) == ["MatMul", "MatMul", "GatedActivation"]


@pytest.mark.parametrize(("x", "weight", "y", "axes"), [("12", "12", "", 0), ("A,B,S,T,12", "12,10", "A,B,S,T,10", 5)])
def test_refuses_gates_of_other_ranks(x: str, weight: str, y: str, axes: int) -> None:
    text = SWIGLU.replace("[N,12]", f"[{x}]").replace("[12,10]", f"[{weight}]")
    text = text.replace("float[N,10]", f"float[{y}]" if y else "float")
    assert f"the gate 'gate' has {axes} axes" in refusal(text, gated_activation.RULE)


def test_two_shapes_that_broadcast_are_refused() -> None:
    text = mutate(SWIGLU, ("float[12,10] up_weight", "float[12,1] up_weight"))
    assert "are not one" in refusal(text, gated_activation.RULE)
