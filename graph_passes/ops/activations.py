"""The activations that gated layers use, as statements of a function body.

silu and gelu: Hendrycks and Gimpel 2016, arXiv:1606.08415 (silu is their sigmoid-weighted unit); quick_gelu: the same
paper's x·σ(1.702x); relu2: So et al. 2021, arXiv:2109.08668.
"""

from __future__ import annotations

import re

ACTIVATIONS = {
    "silu": """
    gate_sigmoid = Sigmoid (gate)
    active = Mul (gate, gate_sigmoid)
    """,
    "gelu": """
    active = Gelu <approximate = "none"> (gate)
    """,
    "gelu_tanh": """
    active = Gelu <approximate = "tanh"> (gate)
    """,
    "quick_gelu": """
    slope_raw = Constant <value_float = 1.702> ()
    slope = CastLike (slope_raw, gate)
    gate_steep = Mul (gate, slope)
    gate_sigmoid = Sigmoid (gate_steep)
    active = Mul (gate, gate_sigmoid)
    """,
    "relu": """
    active = Relu (gate)
    """,
    "relu2": """
    gate_positive = Relu (gate)
    active = Mul (gate_positive, gate_positive)
    """,
    "sigmoid": """
    active = Sigmoid (gate)
    """,
    "tanh": """
    active = Tanh (gate)
    """,
}
"""Statements that make `active` from `gate`, by the value of a node's attribute `activation`."""


def activation_body(name: str, gate: str, active: str, suffix: str = "") -> str:
    """The statements of the activation, with the two values named as the body around them needs.

    suffix: put behind the names in between, for a body that has the activation more than once.
    """
    text = re.sub(r"\b(gate_\w+|slope\w*)\b", rf"\g<1>{suffix}", ACTIVATIONS[name].strip())
    for old, new in (("gate", gate), ("active", active)):
        text = re.sub(rf"\b{old}\b", new, text)
    return text
