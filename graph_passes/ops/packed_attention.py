"""PackedRollingAttention: RollingAttention on queries, keys and values that one product made.

A kernel reads them where they lie, and nobody has to cut the product apart first.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION


def _body(attributes: Attributes) -> str:
    H, G = int(attributes["heads"]), int(attributes["kv_heads"])
    return f"""
    heads = Constant <value_ints = [{H}, {G}, {G}]> ()
    query_BTHD, key_BTGD, value_BTGD = Split <axis = 2> (projected_BTPD, heads)
    attended_BTHD, present_key_BGSD, present_value_BGSD = cierzo.RollingAttention
        <scale: float = @scale, window: int = @window, interleaved: int = @interleaved, rounds: int = @rounds>
        (query_BTHD, key_BTGD, value_BTGD, cos_BTd, sin_BTd, past_key_BGSD, past_value_BGSD, start_B, count_B)
    """


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """Those of RollingAttention, side by side: two query heads on one key head."""
    for query, key, value, *rest in ROLLING_ATTENTION.examples(rng, attributes, shapes):
        yield np.concatenate([query, key, value], axis=2), *rest


PACKED_ROLLING_ATTENTION = PluginOp(
    name="PackedRollingAttention",
    inputs=("projected_BTPD", *ROLLING_ATTENTION.inputs[3:]),
    outputs=ROLLING_ATTENTION.outputs,
    attributes={**ROLLING_ATTENTION.attributes, "heads": "int", "kv_heads": "int"},
    body=_body,
    examples=_examples,
    calls=(ROLLING_ATTENTION,),
)
"""projected [B, T, P, D], of P = H + 2 G heads first the H queries, then the G keys, then the G values; all else as in
RollingAttention. Only in graphs that engines are built from."""
