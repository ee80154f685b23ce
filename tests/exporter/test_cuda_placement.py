"""Where nodes would run on a GPU: function bodies inlined, and whatever would leave the device refused."""

from __future__ import annotations

import onnx
import onnx.parser
import pytest

from exporter.build.cuda_placement import flat, placement
from exporter.build.cuda_provider import CUDA
from runtime.errors import BackendError

TWICE = """
<domain: "own", opset_import: ["" : 24]> Twice (x) => (y) {
    two = Constant <value_float = 2.0> ()
    same = CastLike (two, x)
    y = Mul (x, same)
}
"""


def graph(text: str, *functions: str) -> onnx.ModelProto:
    """A model of a graph in ONNX's text format."""
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24, "com.microsoft" : 1, "own" : 1]> {text}')
    model.functions.extend(onnx.parser.parse_function(function) for function in functions)
    return model


def refusal(text: str, *host: str) -> str:
    with pytest.raises(BackendError) as caught:
        placement(graph(text), host)
    assert "\n" not in str(caught.value)
    assert "with another backend" in str(caught.value)
    return str(caught.value)


def test_bodies_are_inlined_and_constants_are_no_nodes() -> None:
    model = graph("agraph (float16[N] x) => (float16[N] z) { y = own.Twice (x) z = own.Twice (y) }", TWICE)
    assert placement(model) == {CUDA: {"Cast": 2, "Mul": 2}}
    casts = [node for node in flat(model).graph.node if node.op_type == "Cast"]
    assert [node.attribute[0].i for node in casts] == [onnx.TensorProto.FLOAT16] * 2
    assert [node.op_type for node in model.graph.node] == ["Twice"] * 2  # a copy was inlined


def test_types_follow_from_op_to_op() -> None:
    text = """
    agraph (float16[N, C] x, uint8[C, 1, 16] w, float16[C] s) => (float[N, C] out) {
        y = com.microsoft.MatMulNBits <K = 32, N = 32, bits = 4, block_size = 32> (x, w, s)
        k = Constant <value_ints = [2]> ()
        best, place = TopK (y, k)
        wide = Cast <to = 1> (best)
        index = Cast <to = 1> (place)
        small = Less (wide, index)
        out = Where (small, wide, index)
    }
    """
    assert placement(graph(text)) == {CUDA: {"Cast": 2, "Less": 1, "MatMulNBits": 1, "TopK": 1, "Where": 1}}


def test_an_op_without_a_kernel_is_refused() -> None:
    found = refusal("agraph (float[N] x) => (float[N] y) { y = Mish (x) }")
    assert "y (Mish) has no kernel" in found
    assert "no kernel" in refusal("agraph (float[N] x) => (float[N] y) { y = own.Gemm (x) }")


def test_a_type_without_a_kernel_is_refused() -> None:
    found = refusal("agraph (bfloat16[N] x, bfloat16[N] y) => (bool[N] z) { z = Less (x, y) }")
    assert "reads x as bfloat16" in found
    unknown = "agraph (float[N] x) => (float[N] z) { z = Where (mode, x, x) }"
    assert "reads mode as an unknown type" in refusal(unknown)


@pytest.mark.parametrize(
    "arithmetic",
    ["t = Mul (s, two)", "t = Concat <axis = 0> (s, two)", "t = Add (s, given)"],
)
def test_shape_arithmetic_is_refused(arithmetic: str) -> None:
    text = f"""
    agraph (float[N] x, float[M] z, int64[1] given) => (float[K] y) <int64[1] two = {{2}}> {{
        s = Shape (x)
        {arithmetic}
        y = Reshape (z, t)
    }}
    """
    assert f"{'(' + arithmetic.split()[2]}) on the CPU" in refusal(text)


def test_a_shape_that_goes_straight_into_a_reshape_is_not() -> None:
    text = "agraph (float[N] x, float[M] z) => (float[N] y) { s = Shape (x) y = Reshape (z, s) }"
    assert placement(graph(text)) == {CUDA: {"Reshape": 1, "Shape": 1}}


def test_copies_are_refused() -> None:
    to_device = "agraph (float[N] x, int64[M] j) => (int64[M] y) { s = Shape (x) i = Neg (j) y = Gather (s, i) }"
    assert "copy s to the device" in refusal(to_device)
    to_host = "agraph (float[N] x, int64[1] n) => (float[M] y) { m = Neg (n) y = Expand (x, m) }"
    assert "copy m to the host" in refusal(to_host)


def test_inputs_of_the_host_are_for_the_host() -> None:
    text = "agraph (float[N] x, int64[1] n) => (float[M] y) { y = Expand (x, n) }"
    assert placement(graph(text), ["n"]) == {CUDA: {"Expand": 1}}
    assert "copy n to the host" in refusal(text)
    assert "copy n to the device" in refusal("agraph (int64[1] n) => (int64[1] y) { y = Neg (n) }", "n")
