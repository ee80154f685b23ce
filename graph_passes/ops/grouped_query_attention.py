"""GroupedQueryAttention: softmax(scale · Q Kᵀ where visible) V with shared key and value heads.

Ainslie et al. 2023, arXiv:2305.13245. H = G is ordinary multi-head attention, G = 1 multi-query attention.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes, static


def _body(attributes: Attributes) -> str:
    return """
    attended_BHTD = Attention <scale: float = @scale> (query_BHTD, key_BGSD, value_BGSD, visible_B1TS)
    """


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """Scores with a spread, masks that leave one key, some and all; every query sees at least one key.

    What the graph holds fixed stays so, and where queries and keys share an extent (no cache) they share it here.
    """
    (rows, _, tokens, _), slots = shapes[0], shapes[1][2]
    H, D = static(shapes[0], 1, 4), static(shapes[0], 3, 8)
    G = static(shapes[1], 1, 2)
    for B, T, S in ((1, 1, 6), (2, 3, 7)):
        S = slots if isinstance(slots, int) else S
        T = tokens if isinstance(tokens, int) else S if tokens == slots else T
        B = rows if isinstance(rows, int) else B
        query = 2 * rng.standard_normal((B, H, T, D), dtype=np.float32)
        key, value = rng.standard_normal((2, B, G, S, D), dtype=np.float32)
        for share in (0.0, 0.5, 1.0):
            visible = rng.random((B, 1, T, S)) < share
            visible[..., rng.integers(S)] = True
            yield query, key, value, visible


GROUPED_QUERY_ATTENTION = PluginOp(
    name="GroupedQueryAttention",
    inputs=("query_BHTD", "key_BGSD", "value_BGSD", "visible_B1TS"),
    outputs=("attended_BHTD",),
    attributes={"scale": "float"},
    body=_body,
    examples=_examples,
)
"""query [B, H, T, D], key and value [B, G, S, D], visible bool [B, 1, T, S] to [B, H, T, D].

Query head h reads key and value head h // (H / G). The output of a query that sees no key is unspecified.
"""
