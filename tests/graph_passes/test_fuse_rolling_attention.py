"""Rolling attention: which nodes of a layer become one, and why the others do not."""

from __future__ import annotations

import numpy as np
import pytest

from graph_passes.driver import apply
from graph_passes.fuse import rolling_attention
from tests.graph_passes.layer_texts import BEFORE, ROLLING, RULES, inlined
from tests.graph_passes.texts import ROPE, fuse, refusal
from tests.support.graphs import Arrays, assert_same_outputs, mutate, op_types, parse, statements

Spelling = list[tuple[str, str]]
NODE = (
    "attended, present_key, present_value = "
    "cierzo.RollingAttention(query, key, value, cos, sin, past_key, past_value, start, count)"
)
NEIGHBOURS = mutate(
    ROPE,
    ("half = Constant <value_ints = [3]> ()", "two = Constant <value_ints = [2]> ()"),
    ("low = Slice (x, zero, half, axis, one)", "low = Slice (x, zero, end, axis, two)"),
    ("high = Slice (x, half, end, axis, one)", "high = Slice (x, one, end, axis, two)"),
    (
        "y = Concat <axis = -1> (first, second)",
        """column = Constant <value_ints = [4]> ()
    flat = Constant <value_ints = [0, 0, 0, 6]> ()
    first_5 = Unsqueeze (first, column)
    second_5 = Unsqueeze (second, column)
    joined = Concat <axis = 4> (first_5, second_5)
    y = Reshape (joined, flat)""",
    ),
)
"""The rotation of element 2i against 2i + 1, for any number of heads."""


def turned(text: str, suffix: str, rotation: str, **ends: str) -> str:
    """The graph with another rotation in the place of the one whose names end in `suffix`."""
    old = inlined(ROPE, suffix, cos="cos", sin="sin", **ends)
    return mutate(text, (old, inlined(rotation, suffix, **({"cos": "cos", "sin": "sin"} | ends))))


QUERY = {"x": "query_heads", "y": "query_turned"}
KEY = {"x": "key_heads", "y": "key_turned"}


def feeds(window: int = 5, tokens: int = 3) -> Arrays:
    """Rows from an empty ring to the third wrap; W − 1, W and W + 1 are among them.

    Some have padding, if it sees anything at all: its output is unspecified otherwise.
    """
    rng = np.random.default_rng(0)
    slots = max(window, 4) + tokens - 1
    full = {0, 1, slots - tokens}
    starts = sorted(full if window == 0 else full | {window - 1, window, window + 1, slots - 1, slots, 3 * slots + 1})
    rows = len(starts)

    def numbers(*shape: int) -> np.ndarray:
        return rng.standard_normal((rows, *shape), dtype=np.float32)

    return {
        "query": 2 * numbers(tokens, 4, 6),
        "key": numbers(tokens, 2, 6),
        "value": numbers(tokens, 2, 6),
        "cos": numbers(tokens, 3),
        "sin": numbers(tokens, 3),
        "past_key": numbers(2, slots, 6),
        "past_value": numbers(2, slots, 6),
        "start": np.array(starts, np.int64),
        "count": np.array([tokens - (row % 3 == 2 and tokens > 1 != window) for row in range(rows)], np.int64),
    }


@pytest.mark.parametrize(
    ("text", "window", "interleaved"),
    [
        (ROLLING, 5, 0),
        *((mutate(ROLLING, ("<value_int = 5>", f"<value_int = {window}>")), window, 0) for window in (1, 2, 33)),
        (mutate(ROLLING, ("visible_a = And (seen_a, near_a)", "visible_a = Identity (seen_a)")), 0, 0),
        (turned(turned(ROLLING, "q", NEIGHBOURS, **QUERY), "k", NEIGHBOURS, **KEY), 5, 1),
    ],
    ids=["as it is", "window 1", "window 2", "window 33", "no window", "neighbours"],
)
def test_fuses(text: str, window: int, interleaved: int) -> None:
    model, (*_, record) = fuse(text, *RULES)
    assert statements(model) == [NODE]
    settings = {"window": window, "interleaved": interleaved, "rounds": 0}
    assert record.attributes == {"scale": pytest.approx(0.4), **settings}
    assert record.replaced_ops == {
        "RollingKVWrite": 2,
        "RotaryEmbedding": 2,
        "SlidingWindowAttention": 1,
        "Transpose": 4,
    }
    assert [function.name for function in model.functions.values()] == [
        "RotaryEmbedding",
        "RollingKVWrite",
        "SlidingWindowAttention",
        "RollingAttention",
    ]
    for tokens in (1, 3):
        assert_same_outputs(parse(text), model, feeds(window, tokens))


def heads_first(name: str, heads: int) -> Spelling:
    """The graph gets that input with heads before tokens, and does not turn it."""
    return [
        (f"float[B,T,{heads},6] {name},", f"float[B,{heads},T,6] {name}_heads,"),
        (f"{name}_heads = Transpose <perm = [0, 2, 1, 3]> ({name})", ""),
    ]


@pytest.mark.parametrize(("name", "heads", "place"), [("query", 4, 0), ("key", 2, 1), ("value", 2, 2)])
def test_what_comes_with_heads_first_is_turned(name: str, heads: int, place: int) -> None:
    text = mutate(ROLLING, *heads_first(name, heads))
    model, _ = fuse(text, *RULES)
    assert op_types(model) == ["Transpose", "RollingAttention"]
    assert model.graph[1].inputs[place] is model.graph[0].outputs[0]
    given = feeds()
    arrays = {f"{name}_heads" if key == name else key: array for key, array in given.items()}
    arrays[f"{name}_heads"] = given[name].transpose(0, 2, 1, 3)
    assert_same_outputs(parse(text), model, arrays)


def test_a_value_turned_in_another_order_is_turned_once_more() -> None:
    text = mutate(
        ROLLING,
        ("float[B,T,2,6] value,", "float[2,B,T,6] value,"),
        (
            "value_heads = Transpose <perm = [0, 2, 1, 3]> (value)",
            "value_heads = Transpose <perm = [1, 0, 2, 3]> (value)",
        ),
    )
    model, _ = fuse(text, *RULES)
    assert op_types(model) == ["Transpose", "Transpose", "RollingAttention"]
    assert_same_outputs(parse(text), model, feeds() | {"value": feeds()["value"].transpose(2, 0, 1, 3)})


def test_rings_stay_those_that_were_written() -> None:
    """Keys in the ring called past_value, and the other way round: odd, but the same function."""
    text = mutate(
        ROLLING,
        ("float[B,2,S,6] past_key", "float[B,2,S,6] ring_0"),
        ("float[B,2,S,6] past_value", "float[B,2,S,6] past_key"),
    )
    text = mutate(text, ("float[B,2,S,6] ring_0", "float[B,2,S,6] past_value"))
    model, _ = fuse(text, *RULES)
    assert statements(model) == [NODE]
    assert [value.name for value in model.graph.inputs][5:7] == ["past_value", "past_key"]
    assert_same_outputs(parse(text), model, feeds())


def test_what_others_read_stays_and_is_read_after_the_node() -> None:
    """A rotated key leaves the graph as well, and somebody reads the new ring before anybody attends to it."""
    text = mutate(
        ROLLING,
        ("float[B,2,S,6] present_value)",
         "float[B,2,S,6] present_value, float[B,2,T,6] key_turned, float[B,2,S,6] low)"),
        ("present_key = ScatterElements <axis = 2> (past_key, index_kw, update_kw)",
         "present_key = ScatterElements <axis = 2> (past_key, index_kw, update_kw) low = Neg (present_key)"),
    )  # fmt: skip
    model, _ = fuse(text, *RULES)
    assert op_types(model) == ["Transpose", "RotaryEmbedding", "RollingAttention", "Neg"]
    assert_same_outputs(parse(text), model, feeds())


def test_values_may_be_anything_that_is_computed_before() -> None:
    """Rotated values are no other function of the node: it takes them as they come."""
    angles = "float[B,T,3] cos, float[B,T,3] sin"
    rotation = inlined(ROPE, "v", x="value_heads", y="value_turned", cos="cos_2", sin="sin_2")
    text = mutate(
        ROLLING,
        (angles, f"{angles}, float[B,T,3] cos_2, float[B,T,3] sin_2"),
        ("value_heads = Transpose <perm = [0, 2, 1, 3]> (value)",
         f"value_heads = Transpose <perm = [0, 2, 1, 3]> (value)\n{rotation}"),
        ("tokens_1_vw = Shape <start = 2, end = 3> (value_heads)",
         "tokens_1_vw = Shape <start = 2, end = 3> (value_turned)"),
        ("chunk_vw = Shape (value_heads)", "chunk_vw = Shape (value_turned)"),
        ("Where (valid_B1T1_vw, value_heads, kept_vw)", "Where (valid_B1T1_vw, value_turned, kept_vw)"),
    )  # fmt: skip
    model, _ = fuse(text, *RULES)
    assert op_types(model) == ["Transpose", "RotaryEmbedding", "Transpose", "RollingAttention"]
    given = feeds()
    assert_same_outputs(parse(text), model, given | {"cos_2": 2 * given["sin"], "sin_2": 3 * given["cos"]})


ANGLES = ("float[B,T,3] sin,", "float[B,T,3] sin, float[B,T,3] other,")
LATER = ("int64[B] count)", "int64[B] count, int64[B] later)")
TURN_BACK = "attended = Transpose <perm = [0, 2, 1, 3]> (attended_heads)"
MEAN_OF_RING = """slots_axis = Constant <value_ints = [2]> ()
    mean_ring = ReduceMean <keepdims = 1> (present_key, slots_axis)
    mean_tokens = Transpose <perm = [0, 2, 1, 3]> (mean_ring)"""
LAST_KEY_WRITE = "present_key = ScatterElements <axis = 2> (past_key, index_kw, update_kw)"


ONE_RING = [
    ("float[B,2,S,6] past_value,", "float[B,2,S,6] unused,"),
    *((f"({old}", f"({new}") for old, new in (
        ("past_value)", "past_key)"), ("past_value, index_vw)", "past_key, index_vw)"),
        ("past_value, index_vw, update_vw)", "past_key, index_vw, update_vw)"))),
]  # fmt: skip


def _interleaved_keys() -> str:
    return turned(ROLLING, "k", NEIGHBOURS, **KEY)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (mutate(ROLLING, LATER, ("start_B1_kw = Unsqueeze (start,", "start_B1_kw = Unsqueeze (later,")),
         "the ring is written at other positions than are attended to"),
        (mutate(ROLLING, LATER, ("start_B1_vw = Unsqueeze (start,", "start_B1_vw = Unsqueeze (later,")),
         "the ring is written at other positions than are attended to"),
        (mutate(ROLLING, LATER, ("count_B1_vw = Unsqueeze (count,", "count_B1_vw = Unsqueeze (later,")),
         "the ring is written at other positions than are attended to"),
        (mutate(ROLLING, ("start_B1_a = Unsqueeze (start,", "start_B1_a = Unsqueeze (count,"),
                ("count_B1_a = Unsqueeze (count,", "count_B1_a = Unsqueeze (start,")),
         "the ring is written at other positions than are attended to"),
        (mutate(ROLLING, (", float[B,2,S,6] present_value)", ")")), "the written ring does not leave the graph"),
        (mutate(ROLLING, ("float[B,2,S,6] present_key, ", "")), "the written ring does not leave the graph"),
        (mutate(ROLLING, ANGLES, ("cos_head_k = Unsqueeze (cos,", "cos_head_k = Unsqueeze (other,")),
         "keys are turned by other angles than queries"),
        (mutate(ROLLING, ANGLES, ("sin_head_q = Unsqueeze (sin,", "sin_head_q = Unsqueeze (other,")),
         "keys are turned by other angles than queries"),
        (mutate(ROLLING, ("cos_head_k = Unsqueeze (cos,", "cos_head_k = Unsqueeze (sin,"),
                ("sin_head_k = Unsqueeze (sin,", "sin_head_k = Unsqueeze (cos,")),
         "keys are turned by other angles than queries"),
        (_interleaved_keys(), "keys are turned in other pairs than queries"),
        (mutate(ROLLING, (TURN_BACK, ""), ("(float[B,T,4,6] attended", "(float[B,4,T,6] attended_heads")),
         "'attended_heads' has 0 readers, but must have one"),
        (mutate(ROLLING, (TURN_BACK, "attended = Neg (attended_heads)"),
                ("(float[B,T,4,6] attended", "(float[B,4,T,6] attended")),
         "'attended_heads' should go into Transpose, but goes into Neg"),
        (mutate(ROLLING, (TURN_BACK, TURN_BACK.replace("0, 2, 1, 3", "0, 2, 3, 1")),
                ("(float[B,T,4,6] attended", "(float[B,T,6,4] attended")),
         "what was attended to is not brought back into the order of tokens and heads"),
        (mutate(ROLLING, (TURN_BACK, f"{TURN_BACK} twice = Add (attended_heads, attended_heads)"),
                ("(float[B,T,4,6] attended", "(float[B,4,T,6] twice, float[B,T,4,6] attended")),
         "'attended_heads' has 3 readers, but must have one"),
        (mutate(ROLLING, ("product_a = MatMul (query_turned,", "product_a = MatMul (query_heads,")),
         "'query_heads' should come from RotaryEmbedding, but comes from Transpose"),
        (mutate(ROLLING, ("tokens_1_kw = Shape <start = 2, end = 3> (key_turned)",
                          "tokens_1_kw = Shape <start = 2, end = 3> (key_heads)"),
                ("chunk_kw = Shape (key_turned)", "chunk_kw = Shape (key_heads)"),
                ("Where (valid_B1T1_kw, key_turned, ", "Where (valid_B1T1_kw, key_heads, ")),
         "'key_heads' should come from RotaryEmbedding, but comes from Transpose"),
        (mutate(ROLLING, ("key_5_a = Unsqueeze (present_key,", "key_5_a = Unsqueeze (past_key,")),
         "'past_key' should come from RollingKVWrite, but comes from a graph input or weight"),
        (mutate(ROLLING, ("value_5_a = Unsqueeze (present_value,", "value_5_a = Unsqueeze (past_value,")),
         "'past_value' should come from RollingKVWrite, but comes from a graph input or weight"),
        (mutate(ROLLING, ("value_5_a = Unsqueeze (present_value,", "value_5_a = Unsqueeze (present_key,"),
                ("key_5_a = Unsqueeze (present_key, axis_2_a)", "key_5_a = Unsqueeze (present_value, axis_2_a)")),
         "'value_heads' should come from RotaryEmbedding, but comes from Transpose"),
        (mutate(ROLLING, *ONE_RING), "RollingKVWrite reads the old ring 'past_key' as well, and may find it written"),
        (mutate(ROLLING, ("float[B,2,S,6] present_value)", "float[B,2,S,6] present_value, float[B,2,S,6] old)"),
                ("cos_head_k =", "old = Neg (past_value) cos_head_k =")),
         "Neg reads the old ring 'past_value' as well, and may find it written"),
        (mutate(ROLLING, ("float[B,2,S,6] past_key,", "float[B,2,S,6] given,"),
                ("query_heads =", "past_key = Neg (given) query_heads =")),
         "the ring 'past_key' does not come from outside"),
        (mutate(ROLLING, ("Transpose <perm = [0, 2, 1, 3]> (value)", "Transpose <perm = [0, 2, 1, 3]> (key)")),
         "'key' is key_BTGD and value_BTGD"),
    ],
    ids=["key written elsewhere", "value written elsewhere", "value counted otherwise", "start and count exchanged",
         "value ring stays inside", "key ring stays inside", "other cosine", "other sine", "cosine and sine exchanged",
         "other pairs", "not turned back", "no turn at all", "turned in another order", "read by others",
         "query not turned", "key not turned", "old keys", "old values", "values and keys exchanged",
         "one ring for both", "old ring read as well", "computed ring", "keys are the values"],
)  # fmt: skip
def test_refuses(text: str, reason: str) -> None:
    assert reason in refusal(text, rolling_attention.RULE, *BEFORE)


def test_a_value_that_depends_on_the_new_keys_is_refused() -> None:
    """The nodes before can be computed one after the other; one node for all would wait for itself."""
    behind = f"""{LAST_KEY_WRITE}
    {MEAN_OF_RING}
    value_more = Add (value, mean_tokens)
    value_heads = Transpose <perm = [0, 2, 1, 3]> (value_more)"""
    text = mutate(ROLLING, ("value_heads = Transpose <perm = [0, 2, 1, 3]> (value)\n", "\n"), (LAST_KEY_WRITE, behind))
    reason = "an input depends on 'present_key', which the node would give"
    assert reason in refusal(text, rolling_attention.RULE, *BEFORE)


def test_a_query_that_depends_on_the_new_keys_is_refused() -> None:
    rotation = inlined(ROPE, "q", cos="cos", sin="sin", **QUERY)
    behind = f"""{LAST_KEY_WRITE}
    {MEAN_OF_RING}
    mean_heads = Concat <axis = 2> (mean_tokens, mean_tokens)
    query_more = Add (query, mean_heads)
    query_heads = Transpose <perm = [0, 2, 1, 3]> (query_more)
    {rotation}"""
    text = mutate(
        ROLLING,
        ("query_heads = Transpose <perm = [0, 2, 1, 3]> (query)\n", "\n"),
        (rotation, ""),
        (LAST_KEY_WRITE, behind),
    )
    reason = "an input depends on 'present_key', which the node would give"
    assert reason in refusal(text, rolling_attention.RULE, *BEFORE)


def test_one_ring_serves_one_layer() -> None:
    """A second attention over the same rings finds them written by the first one's node, and stays as it is."""
    second = f"""more_heads = Transpose <perm = [0, 2, 1, 3]> (more)
    {inlined(ROPE, "m", x="more_heads", cos="cos", sin="sin", y="more_turned")}
    product_m = MatMul (more_turned, key_t_a)
    scores_m = Mul (product_m, scale_a)
    masked_m = Where (visible_a, scores_m, lowest_a)
    weights_m = Softmax <axis = -1> (masked_m)
    again_heads = MatMul (weights_m, value_heads_a)
    again = Transpose <perm = [0, 2, 1, 3]> (again_heads)"""
    text = mutate(
        ROLLING,
        ("g (", "g (float[B,T,4,6] more, "),
        ("=> (float[B,T,4,6] attended,", "=> (float[B,T,4,6] again, float[B,T,4,6] attended,"),
        (TURN_BACK, f"{TURN_BACK}\n    {second}"),
    )
    model, _ = fuse(text, *BEFORE)
    assert op_types(model).count("SlidingWindowAttention") == 2
    fused, (refused,) = apply(model, rolling_attention.RULE)
    assert len(fused) == 1
    assert "'present_key' should come from RollingKVWrite, but comes from RollingAttention" in refused.reason
    assert_same_outputs(parse(text), model, feeds() | {"more": feeds()["query"] + 1})
