"""RollingAttention: everything between a layer's projections, in one node: RoPE, ring write, windowed attention.

Its body calls those of RotaryEmbedding, RollingKVWrite and SlidingWindowAttention, where each is defined. One node,
since a kernel then turns, writes and attends in one pass over the ring, and reads the layout that the projections give.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes
from graph_passes.ops.rolling_kv import ROLLING_KV_WRITE
from graph_passes.ops.rotary_embedding import ROTARY_EMBEDDING
from graph_passes.ops.sliding_window_attention import SLIDING_WINDOW_ATTENTION, example_rows

_TURNED = """
    query_BHTD = Transpose <perm = [0, 2, 1, 3]> (query_BTHD)
    key_BGTD = Transpose <perm = [0, 2, 1, 3]> (key_BTGD)
    value_BGTD = Transpose <perm = [0, 2, 1, 3]> (value_BTGD)
    query_like_cos = CastLike (query_BHTD, cos_BTd)
    key_like_cos = CastLike (key_BGTD, cos_BTd)
    turned_query = cierzo.RotaryEmbedding <interleaved: int = @interleaved> (query_like_cos, cos_BTd, sin_BTd)
    rotated_key = cierzo.RotaryEmbedding <interleaved: int = @interleaved> (key_like_cos, cos_BTd, sin_BTd)
    rotated_query = CastLike (turned_query, query_BTHD)
"""
_ATTENDED = """
    attended = cierzo.SlidingWindowAttention <scale: float = @scale, window: int = @window>
        (rotated_query, held_key, held_value, start_B, count_B)
    attended_BTHD = Transpose <perm = [0, 2, 1, 3]> (attended)
"""
_CALLS = (ROTARY_EMBEDDING, ROLLING_KV_WRITE, SLIDING_WINDOW_ATTENTION)


def _body(attributes: Attributes) -> str:
    return f"""
    {_TURNED}
    stored_key = CastLike (rotated_key, past_key_BGSD)
    stored_value = CastLike (value_BGTD, past_value_BGSD)
    {_marked("key")}
    {_marked("value")}
    present_key_BGSD = cierzo.RollingKVWrite (past_key_BGSD, marked_key, start_B, count_B)
    present_value_BGSD = cierzo.RollingKVWrite (past_value_BGSD, marked_value, start_B, count_B)
    held_key = CastLike (present_key_BGSD, query_BTHD)
    held_value = CastLike (present_value_BGSD, query_BTHD)
    {_ATTENDED}
    """


def _marked(what: str) -> str:
    """Infinities become NaN: x + (x - x).

    An infinite key that a query points away from would have no weight at all, and nobody would see that the ring's type
    could not hold it.
    """
    return f"""
    wide_{what} = CastLike (stored_{what}, query_BTHD)
    nothing_{what} = Sub (wide_{what}, wide_{what})
    whole_{what} = Add (wide_{what}, nothing_{what})
    marked_{what} = CastLike (whole_{what}, past_{what}_BGSD)
    """


def _int8_write(what: str, new: str) -> str:
    """Integers travel as float32, which is exact and what every runtime can choose between.

    The scale of a vector that is not finite is NaN, since no integer is.
    """
    return f"""
    {what}_nothing = Sub ({new}, {new})
    {what}_fault = ReduceSum <keepdims = 1> ({what}_nothing, last_axis)
    {what}_magnitude = Abs ({new})
    {what}_largest = ReduceMax <keepdims = 1> ({what}_magnitude, last_axis)
    {what}_finite_unit = Div ({what}_largest, most)
    {what}_unit = Add ({what}_finite_unit, {what}_fault)
    {what}_empty = Equal ({what}_unit, zero)
    {what}_divisor = Where ({what}_empty, one, {what}_unit)
    {what}_ratio = Div ({new}, {what}_divisor)
    {what}_whole = Round ({what}_ratio)
    past_{what}_number = CastLike (past_{what}_BGSD, query_BTHD)
    present_{what}_number = cierzo.RollingKVWrite (past_{what}_number, {what}_whole, start_B, count_B)
    present_{what}_BGSD = CastLike (present_{what}_number, past_{what}_BGSD)
    past_{what}_scale_1 = Unsqueeze (past_{what}_scale_BGS, last_axis)
    present_{what}_scale_1 = cierzo.RollingKVWrite (past_{what}_scale_1, {what}_unit, start_B, count_B)
    present_{what}_scale_BGS = Squeeze (present_{what}_scale_1, last_axis)
    held_{what} = Mul (present_{what}_number, present_{what}_scale_1)
    """


def _int8_body(attributes: Attributes) -> str:
    return f"""
    last_axis = Constant <value_ints = [-1]> ()
    zero_raw = Constant <value_float = 0.0> ()
    zero = CastLike (zero_raw, query_BTHD)
    one_raw = Constant <value_float = 1.0> ()
    one = CastLike (one_raw, query_BTHD)
    most_raw = Constant <value_float = 127.0> ()
    most = CastLike (most_raw, query_BTHD)
    {_TURNED}
    new_key = CastLike (rotated_key, query_BTHD)
    {_int8_write("key", "new_key")}
    {_int8_write("value", "value_BGTD")}
    {_ATTENDED}
    """


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """Rows at every border of window and ring, two at a time, with two query heads on one small key head.

    Cosine and sine are not on the unit circle, so that nothing cancels.
    """
    for tokens, slots, start, count in example_rows(int(attributes["window"])):
        query = rng.standard_normal((2, tokens, 2, 4), dtype=np.float32)
        key, value = rng.standard_normal((2, 2, tokens, 1, 4), dtype=np.float32)
        cos, sin = rng.standard_normal((2, 2, tokens, 2), dtype=np.float32)
        past_key, past_value = rng.standard_normal((2, 2, 1, slots, 4), dtype=np.float32)
        yield query, key, value, cos, sin, past_key, past_value, start, count


_INPUTS = ("query_BTHD", "key_BTGD", "value_BTGD", "cos_BTd", "sin_BTd", "past_key_BGSD", "past_value_BGSD")
_ROWS = ("start_B", "count_B")
_ATTRIBUTES = {"scale": "float", "window": "int", "interleaved": "int", "rounds": "int"}

ROLLING_ATTENTION = PluginOp(
    name="RollingAttention",
    inputs=(*_INPUTS, *_ROWS),
    outputs=("attended_BTHD", "present_key_BGSD", "present_value_BGSD"),
    attributes=_ATTRIBUTES,
    body=_body,
    examples=_examples,
    calls=_CALLS,
)
"""query [B, T, H, D], key and value [B, T, G, D], float32 or what an engine computes in (float16, bfloat16); cos and
sin [B, T, D/2] float32; rings [B, G, S, D] float32, float16, bfloat16 or float8 (e4m3, without a scale); start and
count int64 [B]; to attended [B, T, H, D], as the query, and the rings after the write. Queries and keys are turned in
the type of cos and sin.

What becomes infinite in a ring, or is beyond what float8 holds, is stored as NaN. (The body clips to float8, since ONNX
lets only casts to that type say otherwise; `exporter.build.lower` makes them say so.) A runtime binds past and present
to one buffer. scale, window, interleaved: see the three ops that the body calls. rounds: 1 allows a runtime to round
queries, keys, values and weights of attention to bfloat16 before they are multiplied, where a row has several tokens in
a step, as long as it adds in float32; 0, or none, does not. What the rings hold is not rounded by it, and the body
never rounds.
"""


def _int8_examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """The rows of RollingAttention over rings of all numbers from −127 to 127, each vector with a scale of its own."""
    for *inputs, past_key, past_value, start, count in _examples(rng, attributes, shapes):
        rings = [rng.integers(-127, 128, past.shape, dtype=np.int8) for past in (past_key, past_value)]
        scales = [rng.random(past.shape[:3], dtype=np.float32) / 64 for past in (past_key, past_value)]
        yield *inputs, *rings, *scales, start, count


ROLLING_ATTENTION_INT8 = PluginOp(
    name="RollingAttentionInt8",
    inputs=(*_INPUTS, "past_key_scale_BGS", "past_value_scale_BGS", *_ROWS),
    outputs=(*ROLLING_ATTENTION.outputs, "present_key_scale_BGS", "present_value_scale_BGS"),
    attributes=_ATTRIBUTES,
    body=_int8_body,
    examples=_int8_examples,
    calls=_CALLS,
)
"""RollingAttention over rings of int8 [B, G, S, D] with a float32 scale for each head of each token, [B, G, S].

A vector v (a key after RoPE, or a value) is stored as round(v / s), ties to even, with s = max|v| / 127, or NaN
where an element of v is infinite or NaN.
"""
