"""Canonical form: graphs before and after as text, and the same numbers on both sides."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.canonical import canonicalise
from graph_passes.unbound import UnboundWeight, is_unbound
from tests.support.graphs import assert_same_outputs, canonical, op_types, parse, statements

X = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)


def after(text: str) -> list[str]:
    """The statements of the canonical form, once the numbers were found unchanged."""
    assert_same_outputs(parse(text), canonical(text), {"x": X})
    return statements(canonical(text))


@pytest.mark.parametrize(
    "no_op",
    [
        "same = Identity (x)",
        "same = Cast <to = 1> (x)",
        "shape = Constant <value_ints = [0, 0, 6]> () same = Reshape (x, shape)",
        "shape = Constant <value_ints = [1, 1, 6]> () same = Expand (x, shape)",
        "shape = Shape (x) same = Expand (x, shape)",
        """first = Constant <value_ints = [0]> () last = Constant <value_ints = [9223372036854775807]> ()
        axis = Constant <value_ints = [2]> () same = Slice (x, first, last, axis)""",
        """first = Constant <value_ints = [0]> () last = Constant <value_ints = [6]> ()
        axis = Constant <value_ints = [2]> () step = Constant <value_ints = [1]> ()
        same = Slice (x, first, last, axis, step)""",
    ],
    ids=["identity", "cast", "reshape", "expand", "expand to its own shape", "slice", "slice with step"],
)
def test_no_op_goes(no_op: str) -> None:
    assert after(f"g (float[B,T,6] x) => (float[B,T,6] y) {{ {no_op} y = Neg (same) }}") == ["y = Neg(x)"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("g (float[B,T,6] x) => (float[B,T,6] y) { y = Identity (x) }", ["y = Identity(x)"]),
        ("g (float[B,T,6] x) => (double[B,T,6] y) { y = Cast <to = 11> (x) }", ["y = Cast(x)"]),
        (
            """g (float[B,T,6] x) => (float[B,T,6] y) {
            last = Constant <value_ints = [-1]> () low = Constant <value_ints = [-9223372036854775808]> ()
            axis = Constant <value_ints = [2]> () y = Slice (x, last, low, axis, last) }""",
            ["y = Slice(x, [-1], [-9223372036854775808], [2], [-1])"],
        ),
        (
            """g (float[B,T,6] x) => (float[A,C,6] y) {
            shape = Constant <value_ints = [5, 2, 6]> () y = Reshape (x, shape) }""",
            ["y = Reshape(x, [5, 2, 6])"],
        ),
    ],
    ids=["identity between input and output", "cast to another type", "reversing slice", "reshape to other extents"],
)
def test_what_changes_something_stays(text: str, kept: list[str]) -> None:
    assert after(text) == kept


def test_no_op_before_an_output_leaves_the_output_its_name() -> None:
    text = "g (float[B,T,6] x) => (float[B,T,6] y) { n = Neg (x) same = Cast <to = 1> (n) y = Identity (same) }"
    assert after(text) == ["y = Neg(x)"]


def test_two_outputs_of_one_value_stay_two() -> None:
    text = "g (float[B,T,6] x) => (float[B,T,6] y, float[B,T,6] z) { y = Neg (x) z = Identity (y) }"
    assert after(text) == ["y = Neg(x)", "z = Identity(y)"]


def test_equal_constants_and_equal_computations_are_shared() -> None:
    text = """g (float[B,T,6] x) => (float[B,T,6] y) {
        one = Constant <value_float = 2.0> () two = Constant <value_float = 2.0> ()
        a = Mul (x, one) b = Mul (x, two) y = Add (a, b) }"""
    assert after(text) == ["a = Mul(x, 2.0)", "y = Add(a, a)"]
    assert len(canonical(text).graph.initializers) == 1


def test_constants_that_differ_in_type_shape_or_value_stay_apart() -> None:
    text = """g (float[B,T,6] x) => (float[B,T,6] y) {
        a = Constant <value_float = 2.0> () b = Constant <value_floats = [2.0]> () c = Constant <value_float = -2.0> ()
        d = Constant <value_int = 2> () e = Cast <to = 11> (x) f = Pow (e, d) g = Cast <to = 1> (f)
        h = Mul (x, a) i = Mul (h, b) j = Mul (i, c) y = Add (j, g) }"""
    after(text)
    assert len(canonical(text).graph.initializers) == 4


def test_what_can_be_known_is_worked_out_and_what_nobody_reads_goes() -> None:
    text = """g (float[B,T,6] x) => (float[B,T,6] y) {
        a = Constant <value_float = 3.0> () b = Constant <value_float = 4.0> () c = Mul (a, b)
        size = Shape <start = 2, end = 3> (x) size_float = Cast <to = 1> (size) d = Add (c, size_float)
        unused = Neg (x) y = Mul (x, d) }"""
    assert after(text) == ["y = Mul(x, [18.0])"]


@pytest.mark.parametrize(
    ("node", "axis"),
    [
        ("y = Softmax (x)", 2),
        ("y = Softmax <axis = -2> (x)", 1),
        ("y = Concat <axis = -3> (x, x)", 0),
        ("i = Constant <value_ints = [1, 0]> () y = Gather <axis = -1> (x, i)", 2),
        ("i = Constant <value_ints = [1, 0]> () y = Gather (x, i)", 0),
        ("k = Constant <value_ints = [2]> () y, z = TopK (x, k)", 2),
        ("y, z = Split <axis = -1, num_outputs = 2> (x)", 2),
    ],
)
def test_axes_count_from_the_front(node: str, axis: int) -> None:
    text = f"g (float[B,T,6] x) => (float[K,L,M] y) {{ {node} }}"
    after(text)
    assert canonical(text).graph[-1].attributes["axis"].as_int() == axis


def test_extents_are_asked_of_the_first_input_that_has_them() -> None:
    text = """g (int64[B,T] ids, float[B,T,6] x) => (int64[1] rows, int64[1] tokens, int64[K] both) {
        n = Neg (x) rows = Shape <start = 0, end = 1> (n) tokens = Shape <start = 1, end = 2> (x)
        both = Shape <start = 0, end = 2> (x) }"""
    model = canonical(text)
    assert statements(model) == ["rows = Shape(ids)", "tokens = Shape(ids)", "both = Shape(x)"]
    assert [model.graph[1].attributes[name].as_int() for name in ("start", "end")] == [1, 2]
    assert_same_outputs(parse(text), model, {"ids": np.zeros((2, 5), np.int64), "x": X})


def test_an_extent_without_a_name_is_no_other_input_s() -> None:
    text = """g (float[B,?] a, float[B,?] x) => (int64[1] n) { m = Neg (x) n = Shape <start = 1, end = 2> (m) }"""
    feeds = {"a": np.zeros((2, 3), np.float32), "x": np.zeros((2, 7), np.float32)}
    assert_same_outputs(parse(text), canonical(text), feeds)


def with_weights(text: str, **shapes: tuple[int, ...]) -> ir.Model:
    """The graph, with some of its inputs made weights without data."""
    model = parse(text)
    for name, shape in shapes.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = UnboundWeight(name, ir.DataType.FLOAT, ir.Shape(shape))
        model.graph.register_initializer(value)
    return model


def test_values_of_unknown_shape_stay_as_they_are() -> None:
    model = parse(
        "g (float[B,4] x, int64[T] at) => (y, size) { size = Shape <start = 0, end = 1> (x) y = Gather (x, at) }"
    )
    for value in model.graph.inputs:
        value.shape = None
    canonicalise(model)
    assert op_types(model) == ["Shape", "Gather"]


def test_weights_without_data_are_not_read_and_stay() -> None:
    """Equal expressions of weights are shared, equal weights are not, and no arithmetic on weights is worked out."""
    model = with_weights(
        """g (float[B,4] x, float[4,4] v, float[4,4] w) => (float[B,4] y) {
        v_t = Transpose <perm = [1, 0]> (v) v_u = Transpose <perm = [1, 0]> (v) w_t = Transpose <perm = [1, 0]> (w)
        a = MatMul (x, v_t) b = MatMul (a, v_u) c = MatMul (b, w_t) s = Add (v, w) y = MatMul (c, s) }""",
        v=(4, 4),
        w=(4, 4),
    )
    canonicalise(model)
    assert statements(model) == [
        "v_t = Transpose(v)",
        "w_t = Transpose(w)",
        "a = MatMul(x, v_t)",
        "b = MatMul(a, v_t)",
        "c = MatMul(b, w_t)",
        "s = Add(v, w)",
        "y = MatMul(c, s)",
    ]
    assert {name: is_unbound(value) for name, value in model.graph.initializers.items()} == {"v": True, "w": True}


def test_reading_a_weight_without_data_is_refused() -> None:
    weight = UnboundWeight("layers.0.w", ir.DataType.FLOAT, ir.Shape([3, 5]))
    assert (weight.size, weight.nbytes) == (15, 60)
    assert "layers.0.w" in repr(weight)
    for read in (weight.numpy, weight.tobytes, weight.__array__, weight.__dlpack__):
        with pytest.raises(FileNotFoundError, match=r"layers\.0\.w is not bound"):
            read()


def test_canonical_form_is_stable() -> None:
    text = """g (float[B,T,6] x) => (float[B,T,6] y) {
        a = Constant <value_float = 3.0> () s = Softmax (x) i = Identity (s) m = Mul (i, a) y = Cast <to = 1> (m) }"""
    once = canonical(text)
    before = statements(once)
    canonicalise(once)
    assert statements(once) == before == ["s = Softmax(x)", "y = Mul(s, 3.0)"]
