"""What lies between a layer's projections, as one graph: rotations, ring writes, attention, put together from `texts`.

Shapes: B rows, T tokens, S slots, H = 4 query heads, G = 2 KV heads, D = 6; a window of 5.
"""

from __future__ import annotations

import re

from graph_passes.driver_types import Rule
from graph_passes.fuse import gqa, rolling_attention, rolling_kv, rope, sliding_window
from tests.graph_passes.texts import ATTENTION, RING, ROPE

BEFORE: tuple[Rule, ...] = (rope.RULE, rolling_kv.RULE, gqa.RULE, sliding_window.RULE)
"""The rules whose nodes rolling attention takes in, in the pipeline's order."""

RULES = (*BEFORE, rolling_attention.RULE)


def inlined(text: str, suffix: str, **outer: str) -> str:
    """The statements of a graph with every name told apart by `suffix`; `outer` maps its ends to names outside."""
    body = text[text.index("{\n") + 2 : text.rindex("}")]
    own = set(re.findall(r"^\s*(\w+) =", body, flags=re.MULTILINE)) | outer.keys()

    def renamed(found: re.Match[str]) -> str:
        name = found.group()
        return outer.get(name, f"{name}_{suffix}" if name in own else name)

    parts = re.split(r"(<[^<>]*>)", body)  # attributes may be called like values
    return "".join(part if part.startswith("<") else re.sub(r"\w+", renamed, part) for part in parts)


def _rotated(x: str, y: str, suffix: str) -> str:
    return inlined(ROPE, suffix, x=x, cos="cos", sin="sin", y=y)


def _written(ring: str, new: str, rolled: str, suffix: str) -> str:
    return inlined(RING, suffix, ring=ring, new=new, start="start", count="count", rolled=rolled)


ROLLING = f"""g (float[B,T,4,6] query, float[B,T,2,6] key, float[B,T,2,6] value, float[B,T,3] cos, float[B,T,3] sin,
    float[B,2,S,6] past_key, float[B,2,S,6] past_value, int64[B] start, int64[B] count)
    => (float[B,T,4,6] attended, float[B,2,S,6] present_key, float[B,2,S,6] present_value)
    <float[B,2,2,S,6] key_wide_a, float[B,4,S,6] key_heads_a, float[B,2,2,S,6] value_wide_a,
    float[B,4,S,6] value_heads_a, bool[B,1,T,S] visible_a>
{{
    query_heads = Transpose <perm = [0, 2, 1, 3]> (query)
    key_heads = Transpose <perm = [0, 2, 1, 3]> (key)
    value_heads = Transpose <perm = [0, 2, 1, 3]> (value)
{_rotated("query_heads", "query_turned", "q")}
{_rotated("key_heads", "key_turned", "k")}
{_written("past_key", "key_turned", "present_key", "kw")}
{_written("past_value", "value_heads", "present_value", "vw")}
{
    inlined(
        ATTENTION,
        "a",
        query="query_turned",
        key="present_key",
        value="present_value",
        start="start",
        count="count",
        attended="attended_heads",
    )
}
    attended = Transpose <perm = [0, 2, 1, 3]> (attended_heads)
}}"""
"""Every name carries the letters of its part: q and k for the rotations, kw and vw for the writes, a for attention."""
