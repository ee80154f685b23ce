"""Reading a graph, cutting regions out of it, and dumping it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graph_passes.dump import dump
from graph_passes.graph import (
    Refusal,
    constant,
    data_leaves,
    dims,
    integers,
    is_made_by,
    made_by,
    operand,
    permutation,
    refuse_reduction,
    scalar,
    scope,
    sole_consumer,
    static_dim,
)
from graph_passes.region import Region
from graph_passes.unbound import UnboundWeight
from tests.support.graphs import parse, run, serialised

GRAPH = """g (float[B,4] x, int64[B] n, float[B,?] z) => (float[B,4] y)
    <float[B,4] a, float[4] bias = {1, 2, 3, 4}, int64[1] axis = {1}, float one = {1}>
{
    size = Shape (z)
    wide = Unsqueeze (n, axis)
    long = Cast <to = 1> (wide)
    a = Add (x, bias)
    t = Transpose <perm = [1, 0]> (a)
    u = Transpose (t)
    m = Mul (u, long)
    c = Clip (m, , one)
    s = Expand (c, size)
    y = Mul (s, one)
}"""


@pytest.fixture
def model() -> ir.Model:
    return parse(GRAPH)


@pytest.fixture
def value(model: ir.Model) -> dict[str, ir.Value]:
    return dict(ir.convenience.create_value_mapping(model.graph))


def test_constants_are_read_and_nothing_else(value: dict[str, ir.Value]) -> None:
    bias = constant(value["bias"])
    assert bias is not None
    assert bias.tolist() == [1, 2, 3, 4]
    assert (scalar(value["one"]), scalar(value["axis"]), scalar(value["bias"]), scalar(value["x"])) == (
        1,
        1,
        None,
        None,
    )
    assert (integers(value["axis"]), integers(value["bias"]), integers(value["n"]), integers(None)) == (
        [1],
        None,
        None,
        None,
    )
    weight = ir.Value(name="w", const_value=UnboundWeight("w", ir.DataType.FLOAT, ir.Shape([2])))
    assert constant(weight) is None


def test_an_extent_without_a_name_equals_no_other(value: dict[str, ir.Value]) -> None:
    assert dims(value["x"]) == ("B", 4)
    other = ir.Value(name="other", shape=ir.Shape([None, None]))
    assert len({*dims(other), dims(value["z"])[1]}) == 3
    assert static_dim(value["x"], 1) == 4


def test_walking(value: dict[str, ir.Value]) -> None:
    node = made_by(value["m"], "Add", "Mul")
    assert operand(node, 1) is value["long"]
    assert is_made_by(value["m"], "Mul")
    assert not is_made_by(value["m"], "Add")
    assert not is_made_by(value["x"], "Mul")
    assert sole_consumer(value["m"], "Clip") is made_by(value["c"], "Clip")


def test_the_axes_of_a_transpose(value: dict[str, ir.Value]) -> None:
    assert permutation(made_by(value["t"], "Transpose")) == [1, 0]
    value["t"].shape = ir.Shape([4, 5, 6])
    assert permutation(made_by(value["u"], "Transpose")) == [2, 1, 0]


def test_data_leaves_leave_out_constants_and_shapes(value: dict[str, ir.Value]) -> None:
    assert {leaf.name for leaf in data_leaves(value["y"])} == {"x", "n"}
    assert data_leaves(value["y"], [value["m"]]) == [value["m"]]
    assert data_leaves(value["size"]) == []


def test_every_refusal_names_the_place(model: ir.Model, value: dict[str, ir.Value]) -> None:
    clip = made_by(value["c"], "Clip")
    clip.name = "clip_1"
    with pytest.raises(Refusal, match="input 1 is missing at Clip 'clip_1'"):
        operand(clip, 1)
    with pytest.raises(Refusal, match="input 7 is missing"):
        operand(clip, 7)
    with pytest.raises(Refusal, match="'c' should come from Add or Mul, but comes from Clip at Clip 'clip_1'"):
        made_by(value["c"], "Add", "Mul")
    with pytest.raises(Refusal, match="'x' should come from Add, but comes from a graph input or weight"):
        made_by(value["x"], "Add")
    with pytest.raises(Refusal, match="'nothing' should come from Add"):
        made_by(None, "Add")
    with pytest.raises(Refusal, match="'one' has 2 readers, but must have one"):
        sole_consumer(value["one"], "Mul")
    with pytest.raises(Refusal, match="'m' should go into Mul, but goes into Clip"):
        sole_consumer(value["m"], "Mul")
    with pytest.raises(Refusal, match="'y' has 0 readers"):
        sole_consumer(value["y"], "Mul")
    with pytest.raises(Refusal, match="axis 0 of 'x' is B, but must be a fixed size"):
        static_dim(value["x"], 0)
    with pytest.raises(Refusal, match="the shape of 'm' is unknown at Mul"):
        dims(value["m"])


def test_a_plugin_op_is_no_standard_operator_of_the_same_name() -> None:
    x = ir.Value(name="x")
    foreign = ir.node("Mul", [x, x], domain="elsewhere")
    assert not is_made_by(foreign.outputs[0], "Mul")
    with pytest.raises(Refusal, match="should come from Mul"):
        made_by(foreign.outputs[0], "Mul")
    with pytest.raises(Refusal, match="has 2 readers"):
        sole_consumer(x, "Mul")


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
def test_a_reducing_scatter_is_refused(reduction: str) -> None:
    refuse_reduction(ir.node("ScatterElements", [], {"reduction": "none"}))
    refuse_reduction(ir.node("ScatterElements", []))
    with pytest.raises(Refusal, match=rf"the scatter reduces \({reduction}\)"):
        refuse_reduction(ir.node("ScatterElements", [], {"reduction": reduction}))


def test_scope_is_the_module_around_the_operator() -> None:
    node = ir.node("Mul", [])
    assert scope(node) == ""
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layers.0', 'layers.0.self_attn', 'mul_3']"
    assert scope(node) == "layers.0.self_attn"


def test_a_region_runs_on_its_own(model: ir.Model, value: dict[str, ir.Value]) -> None:
    untouched = serialised(model)
    region = Region(model, [value["a"], value["n"]], [value["m"], value["t"]])
    a, n = np.ones((3, 4), np.float32), np.array([1, 2, 3], np.int64)
    m, t = region.run([a, n])
    np.testing.assert_array_equal(m, [[1] * 4, [2] * 4, [3] * 4])
    assert t.shape == (4, 3)
    assert serialised(model) == untouched


def test_a_region_gets_the_extents_that_it_asks_other_inputs_for() -> None:
    model = parse("""g (int64[B,T] ids, float[N,2] x, float[B] v) => (float[B,T] y) {
        size = Shape (ids) flat = Neg (v) one = Constant <value_ints = [1]> () column = Unsqueeze (flat, one)
        y = Expand (column, size) }""")
    value = ir.convenience.create_value_mapping(model.graph)
    region = Region(model, [value["v"]], [value["y"]])
    v = np.array([1, 2], np.float32)
    assert region.run([v], {"T": 3})[0].tolist() == [[-1] * 3, [-2] * 3]
    assert region.run([v])[0].shape == (2, 1)


def test_what_is_asked_for_its_shape_alone_is_never_allocated() -> None:
    """The ring of a model with many KV heads and a long context would be tens of terabytes of zeros here."""
    model = parse("""g (float[B,64,S,128] ring, int64[B] last) => (int64[?,?] y) {
        slots = Shape <start = 2, end = 3> (ring) heads = Shape <start = -3, end = -2> (ring) all = Shape (ring)
        count = Concat <axis = 0> (slots, heads, all) axis = Constant <value_ints = [1]> ()
        column = Unsqueeze (last, axis) y = Add (column, count) }""")
    value = ir.convenience.create_value_mapping(model.graph)
    region = Region(model, [value["last"]], [value["y"]])
    (y,) = region.run([np.array([0], np.int64)], {"S": 1 << 30})
    assert y.tolist() == [[1 << 30, 64, 1, 64, 1 << 30, 128]]


def test_a_product_of_extents_is_split() -> None:
    model = ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
        g (float[B,T] ids, float[N,2] x) => (int64[2] y) { size = Shape (ids) zero = Mul (x, x)
        n = Cast <to = 7> (zero) top = ReduceMin <keepdims = 0> (n) y = Add (size, top) }""")
    value = ir.convenience.create_value_mapping(model.graph)
    value["x"].shape = ir.Shape(["T*B", 2])
    region = Region(model, [value["x"]], [value["y"]])
    x = np.zeros((6, 2), np.float32)
    assert region.run([x])[0].tolist() == [1, 6]
    for known in ({"B": 3}, {"T": 2}, {"B": 3, "T": 2}):
        assert region.run([x], known)[0].tolist() == [3, 2]
    with pytest.raises(Refusal, match=r"T\*B is 6 in 'x' and 20 in the other inputs"):
        region.run([x], {"B": 4, "T": 5})


def test_what_is_no_region_is_refused(model: ir.Model, value: dict[str, ir.Value]) -> None:
    with pytest.raises(Refusal, match="the region also needs the data of 'x'"):
        Region(model, [value["long"]], [value["m"]])
    with pytest.raises(Refusal, match="the region has no clear border"):
        Region(model, [parse(GRAPH).graph.inputs[0]], [value["size"]])
    region = Region(model, [value["a"], value["n"]], [value["m"]])
    with pytest.raises(Refusal, match="the region cannot run on these inputs"):
        region.run([np.ones((3, 4), np.float32), np.ones(3, np.float32)])
    text = "g (float[2] x) => (float[3] y) { a = NoSuchOperator (x) y = Neg (a) }"
    broken = parse(text)
    with pytest.raises(Refusal, match="the region is no graph of its own"):
        Region(broken, broken.graph.inputs, broken.graph.outputs)


def test_a_dump_loads_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = parse("g (float[B,4] x) => (float[B,4] y) <float[4] b = {1, 2, 3, 4}> { z = Mul (x, w) y = Add (z, b) }")
    weight = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    weight.const_value = UnboundWeight("w", ir.DataType.FLOAT, ir.Shape([4]))
    mul, add = model.graph
    mul.replace_input_with(1, weight)
    late = model.graph.initializers.pop("b")
    model.graph.register_initializer(weight)
    model.graph.register_initializer(late)
    untouched = serialised(model)
    dump(model, tmp_path / "deep" / "00.onnx")
    assert serialised(model) == untouched
    assert [value.name for value in model.graph.initializers.values()] == ["w", "b"]
    loaded = onnx.load(tmp_path / "deep" / "00.onnx")
    onnx.checker.check_model(loaded, full_check=True)
    assert [value.name for value in loaded.graph.input] == ["x", "w"]
    x, w = np.ones((2, 4), np.float32), np.full(4, 5, np.float32)
    assert run(ir.from_proto(loaded), {"x": x, "w": w})["y"].tolist() == [[6, 7, 8, 9]] * 2
    assert add.op_type == "Add"
