"""com.microsoft.PagedAttention as a function of standard operators, for machines without a GPU.

ONNX Runtime has a CUDA kernel for it and no other. The body is written from the operator's documentation, for what
Cierzo's graphs use of it: packed queries, keys and values, caches of pages, causal attention, aligned bottom-right,
over a window; no rotary embedding, no quantised caches.
"""

from __future__ import annotations

import onnx
import onnx.parser

OP = "PagedAttention"
DOMAIN = "cierzo.test"

_BODY = f"""<domain: "{DOMAIN}", opset_import: ["" : 24]>
{OP} <num_heads: int, kv_num_heads: int, local_window_size: int, scale: float> (
    query, key, value, key_cache, value_cache, cumulative_sequence_length, past_seqlens, block_table,
    cos_cache, sin_cache, slot_mapping, head_sink, q_norm_weight, k_norm_weight, k_scale, v_scale, attention_metadata
) => (output, key_cache_out, value_cache_out)
{{
    # Of which row each of the N packed tokens is, and at which position of the row's cache it goes.
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    minus_1 = Constant <value_ints = [-1]> ()
    axis_1 = Constant <value_ints = [1]> ()
    tokens_1 = Shape <start = 0, end = 1> (query)
    tokens = Squeeze (tokens_1)
    token_N = Range (zero, tokens, one)
    token_N1 = Unsqueeze (token_N, axis_1)
    cumulative = Cast <to = 7> (cumulative_sequence_length)
    begun_NB = LessOrEqual (cumulative, token_N1)
    begun_int_NB = Cast <to = 7> (begun_NB)
    begun_N = ReduceSum <keepdims = 0> (begun_int_NB, axis_1)
    row_N = Sub (begun_N, one)
    row_start_N = Gather (cumulative, row_N)
    within_N = Sub (token_N, row_start_N)
    past = Cast <to = 7> (past_seqlens)
    past_N = Gather (past, row_N)
    position_N = Add (past_N, within_N)

    # Its place in the pages.
    page_size_1 = Shape <start = 1, end = 2> (key_cache)
    pages_NP = Gather (block_table, row_N)
    pages_long_NP = Cast <to = 7> (pages_NP)
    page_of_N = Div (position_N, page_size_1)
    page_of_N1 = Unsqueeze (page_of_N, axis_1)
    page_N1 = GatherElements <axis = 1> (pages_long_NP, page_of_N1)
    inside_N = Mod (position_N, page_size_1)
    inside_N1 = Unsqueeze (inside_N, axis_1)
    place_N2 = Concat <axis = 1> (page_N1, inside_N1)

    # Keys and values go there.
    kv_heads_0 = Constant <value_int: int = @kv_num_heads> ()
    kv_heads_1 = Reshape (kv_heads_0, minus_1)
    heads_0 = Constant <value_int: int = @num_heads> ()
    heads_1 = Reshape (heads_0, minus_1)
    new_shape = Concat <axis = 0> (tokens_1, kv_heads_1, minus_1)
    key_NGD = Reshape (key, new_shape)
    value_NGD = Reshape (value, new_shape)
    key_cache_out = ScatterND (key_cache, place_N2, key_NGD)
    value_cache_out = ScatterND (value_cache, place_N2, value_NGD)

    # Each token is a row of its own that attends to all slots of its row's pages which it sees.
    one_1 = Constant <value_ints = [1]> ()
    query_shape = Concat <axis = 0> (tokens_1, heads_1, one_1, minus_1)
    query_NH1D = Reshape (query, query_shape)
    head_dim_1 = Shape <start = 2, end = 3> (key_NGD)
    held_shape = Concat <axis = 0> (tokens_1, minus_1, kv_heads_1, head_dim_1)
    held_key_pages = Gather (key_cache_out, pages_long_NP)
    held_key_NSGD = Reshape (held_key_pages, held_shape)
    held_key = Transpose <perm = [0, 2, 1, 3]> (held_key_NSGD)
    held_value_pages = Gather (value_cache_out, pages_long_NP)
    held_value_NSGD = Reshape (held_value_pages, held_shape)
    held_value = Transpose <perm = [0, 2, 1, 3]> (held_value_NSGD)
    slots_1 = Shape <start = 2, end = 3> (held_key)
    slots = Squeeze (slots_1)
    slot_S = Range (zero, slots, one)
    position_N1 = Unsqueeze (position_N, axis_1)
    distance_NS = Sub (position_N1, slot_S)
    causal_NS = GreaterOrEqual (distance_NS, zero)
    window = Constant <value_int: int = @local_window_size> ()
    near_NS = Less (distance_NS, window)
    unlimited = Less (window, zero)
    inside_NS = Or (near_NS, unlimited)
    visible_NS = And (causal_NS, inside_NS)
    axes_1_2 = Constant <value_ints = [1, 2]> ()
    visible_N11S = Unsqueeze (visible_NS, axes_1_2)
    attended_NH1D = Attention <scale: float = @scale> (query_NH1D, held_key, held_value, visible_N11S)
    output_shape = Concat <axis = 0> (tokens_1, minus_1)
    output = Reshape (attended_NH1D, output_shape)
}}
"""


def with_paged_body(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` whose PagedAttention nodes are the function in this file."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = [node for node in copy.graph.node if (node.domain, node.op_type) == ("com.microsoft", OP)]
    for node in nodes:
        node.domain = DOMAIN
    if nodes:
        text = "\n".join(line for line in _BODY.splitlines() if not line.strip().startswith("#"))
        copy.functions.append(onnx.parser.parse_function(text))
        copy.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return copy
