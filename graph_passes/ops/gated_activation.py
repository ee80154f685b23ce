"""GatedActivation: act(gate) · up, what lies between the two projections of a gated feed-forward layer.

Shazeer 2020, arXiv:2002.05202. With the activation "silu" it is the SwiGLU of Mistral and Mixtral.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graph_passes.ops.activations import activation_body
from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes


def _body(attributes: Attributes) -> str:
    return f"""
    {activation_body(str(attributes["activation"]), "gate", "active")}
    gated = Mul (active, up)
    """


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """Gates from deep saturation to the bend at zero, zero itself included. Two sizes: no constant fits both."""
    rank = len(shapes[0])
    for rows, width in ((1, 8), (3, 17)):
        shape = (*(1,) * (rank - 2), rows, width)[-rank:]
        gate = 6 * rng.standard_normal(shape, dtype=np.float32)
        gate[..., 0] = 0.0
        gate[..., 1], gate[..., 2] = 60.0, -60.0
        yield gate, rng.standard_normal(shape, dtype=np.float32)


GATED_ACTIVATION = PluginOp(
    name="GatedActivation",
    inputs=("gate", "up"),
    outputs=("gated",),
    attributes={"activation": "string"},
    body=_body,
    examples=_examples,
    pointwise=True,
)
"""gate and up of one shape, of any rank, to act(gate) · up of that shape.

activation: a name in `graph_passes.ops.activations.ACTIVATIONS`.
"""
