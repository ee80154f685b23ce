"""The patterns of the fusions, written by hand, and what the driver makes of a rule on a graph.

Shapes: B rows, T tokens, S slots, H = 4 query heads, G = 2 KV heads, D = 6, N tokens, C = 12, I = 10, E = 4, K = 2.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.driver import apply
from graph_passes.driver_types import FusionRecord, Rule
from tests.support.graphs import canonical, serialised

ROPE = """g (float[B,4,T,6] x, float[B,T,3] cos, float[B,T,3] sin) => (float[B,4,T,6] y) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    axis = Constant <value_ints = [3]> ()
    half = Constant <value_ints = [3]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    low = Slice (x, zero, half, axis, one)
    high = Slice (x, half, end, axis, one)
    cos_head = Unsqueeze (cos, one)
    sin_head = Unsqueeze (sin, one)
    low_cos = Mul (low, cos_head)
    high_sin = Mul (high, sin_head)
    first = Sub (low_cos, high_sin)
    high_cos = Mul (high, cos_head)
    low_sin = Mul (sin_head, low)
    second = Add (high_cos, low_sin)
    y = Concat <axis = -1> (first, second)
}"""

RING = """g (float[B,2,S,6] ring, float[B,2,T,6] new, int64[B] start, int64[B] count) => (float[B,2,S,6] rolled) {
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_1 = Constant <value_ints = [1]> ()
    axes = Constant <value_ints = [1, 3]> ()
    slots = Shape <start = 2, end = 3> (ring)
    tokens_1 = Shape <start = 2, end = 3> (new)
    tokens = Squeeze (tokens_1)
    offset = Range (zero, tokens, one)
    start_B1 = Unsqueeze (start, axis_1)
    count_B1 = Unsqueeze (count, axis_1)
    position = Add (start_B1, offset)
    slot = Mod (position, slots)
    valid = Less (offset, count_B1)
    slot_B1T1 = Unsqueeze (slot, axes)
    valid_B1T1 = Unsqueeze (valid, axes)
    chunk = Shape (new)
    index = Expand (slot_B1T1, chunk)
    kept = GatherElements <axis = 2> (ring, index)
    update = Where (valid_B1T1, new, kept)
    rolled = ScatterElements <axis = 2> (ring, index, update)
}"""

ATTENTION = """g (float[B,4,T,6] query, float[B,2,S,6] key, float[B,2,S,6] value, int64[B] start, int64[B] count)
    => (float[B,4,T,6] attended)
    <float[B,2,2,S,6] key_wide, float[B,4,S,6] key_heads, float[B,2,2,S,6] value_wide, float[B,4,S,6] value_heads,
    bool[B,1,T,S] visible>
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_1 = Constant <value_ints = [1]> ()
    axis_2 = Constant <value_ints = [2]> ()
    axes_12 = Constant <value_ints = [1, 2]> ()
    axes_13 = Constant <value_ints = [1, 3]> ()
    two = Constant <value_ints = [2]> ()
    four = Constant <value_ints = [4]> ()
    six = Constant <value_ints = [6]> ()
    tokens_1 = Shape <start = 2, end = 3> (query)
    tokens = Squeeze (tokens_1)
    slots_1 = Shape <start = 2, end = 3> (key)
    slots = Squeeze (slots_1)
    offset = Range (zero, tokens, one)
    slot = Range (zero, slots, one)
    start_B1 = Unsqueeze (start, axis_1)
    count_B1 = Unsqueeze (count, axis_1)
    position = Add (start_B1, offset)
    end = Add (start_B1, count_B1)
    last = Sub (end, one)
    behind = Sub (last, slot)
    age = Mod (behind, slots_1)
    held = Sub (last, age)
    query_at = Unsqueeze (position, axes_13)
    key_at = Unsqueeze (held, axes_12)
    written = GreaterOrEqual (key_at, zero)
    causal = LessOrEqual (key_at, query_at)
    seen = And (written, causal)
    distance = Sub (query_at, key_at)
    window = Constant <value_int = 5> ()
    near = Less (distance, window)
    visible = And (seen, near)
    rows = Shape <start = 0, end = 1> (key)
    wide = Concat <axis = 0> (rows, two, two, slots_1, six)
    flat = Concat <axis = 0> (rows, four, slots_1, six)
    key_5 = Unsqueeze (key, axis_2)
    key_wide = Expand (key_5, wide)
    key_heads = Reshape (key_wide, flat)
    value_5 = Unsqueeze (value, axis_2)
    value_wide = Expand (value_5, wide)
    value_heads = Reshape (value_wide, flat)
    key_t = Transpose <perm = [0, 1, 3, 2]> (key_heads)
    product = MatMul (query, key_t)
    scale = Constant <value_float = 0.4> ()
    scores = Mul (product, scale)
    lowest = Constant <value_float = -3.0e38> ()
    masked = Where (visible, scores, lowest)
    weights = Softmax <axis = -1> (masked)
    attended = MatMul (weights, value_heads)
}"""

GATE = """g (float[N,4] logits) => (float[N,2] weight, int64[N,2] expert) {
    k = Constant <value_ints = [2]> ()
    axis = Constant <value_ints = [-1]> ()
    probability = Softmax <axis = -1> (logits)
    best, expert = TopK <axis = -1> (probability, k)
    total = ReduceSum <keepdims = 1> (best, axis)
    weight = Div (best, total)
}"""

GATE_TOP_K_FIRST = """g (float[N,4] logits) => (float[N,2] weight, int64[N,2] expert) {
    k = Constant <value_ints = [2]> ()
    best, expert = TopK <axis = -1> (logits, k)
    weight = Softmax <axis = -1> (best)
}"""

EXPERTS = """g (float[N,12] x, float[N,2] weight, int64[N,2] expert, float[4,10,12] gate, float[4,10,12] up,
    float[4,12,10] down) => (float[N,12] y) <float[N,4] nothing>
{
    axis_0 = Constant <value_ints = [0]> ()
    axis_2 = Constant <value_ints = [2]> ()
    four = Constant <value_ints = [4]> ()
    zero = Constant <value_float = 0.0> ()
    tokens = Shape <start = 0, end = 1> (x)
    shape = Concat <axis = 0> (tokens, four)
    nothing = Expand (zero, shape)
    scattered = ScatterElements <axis = 1> (nothing, expert, weight)
    weight_EN = Transpose <perm = [1, 0]> (scattered)
    weight_EN1 = Unsqueeze (weight_EN, axis_2)
    gate_t = Transpose <perm = [0, 2, 1]> (gate)
    up_t = Transpose <perm = [0, 2, 1]> (up)
    down_t = Transpose <perm = [0, 2, 1]> (down)
    gate_x = MatMul (x, gate_t)
    up_x = MatMul (x, up_t)
    sigmoid = Sigmoid (gate_x)
    active = Mul (gate_x, sigmoid)
    gated = Mul (active, up_x)
    out = MatMul (gated, down_t)
    weighted = Mul (out, weight_EN1)
    y = ReduceSum <keepdims = 0> (weighted, axis_0)
}"""


SWIGLU = """g (float[N,12] x, float[12,10] gate_weight, float[12,10] up_weight) => (float[N,10] gated) {
    gate = MatMul (x, gate_weight)
    up = MatMul (x, up_weight)
    slope = Sigmoid (gate)
    active = Mul (gate, slope)
    gated = Mul (active, up)
}"""


NORM = """g (float[B,T,12] x, float[12] weight) => (float[B,T,12] y) {
    two = Constant <value_float = 2.0> ()
    epsilon = Constant <value_float = 1.0e-5> ()
    axis = Constant <value_ints = [-1]> ()
    square = Pow (x, two)
    mean = ReduceMean <keepdims = 1> (square, axis)
    shifted = Add (mean, epsilon)
    root = Sqrt (shifted)
    inverse = Reciprocal (root)
    normed = Mul (x, inverse)
    y = Mul (weight, normed)
}"""

LINEAR = """g (float[N,12] x, float[10,12] weight) => (float[N,10] y) {
    y = Gemm <transB = 1> (x, weight)
}"""


def fuse(
    text: str, *rules: Rule, proving: bool = True, weights: tuple[str, ...] = ()
) -> tuple[ir.Model, list[FusionRecord]]:
    """The canonical graph after the rules, and what they did; each must have fired. weights: see `unbind`."""
    model, done = canonical(text, *weights), []
    for rule in rules:
        fused, refused = apply(model, rule, proving=proving)
        assert fused, f"{rule.name}: {[r.reason for r in refused]}"
        done += fused
    return model, done


def refusal(text: str, rule: Rule, *before: Rule, weights: tuple[str, ...] = ()) -> str:
    """Why `rule` refuses every one of its anchors in the graph; the graph must stay as it was."""
    model = canonical(text, *weights)
    for earlier in before:
        assert apply(model, earlier)[0]
    untouched = serialised(model)
    fused, refused = apply(model, rule)
    assert fused == []
    assert refused
    assert serialised(model) == untouched
    return "; ".join(record.reason for record in refused)
