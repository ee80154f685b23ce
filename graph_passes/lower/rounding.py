"""Lets attention round, where the products around it do so anyway.

Attention to the tokens of a chunk is mostly products, which are twice as fast in bfloat16; its 8 bits are about what
activations in front of quantised weights keep.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.ops.base import DOMAIN
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION, ROLLING_ATTENTION_INT8

_ROUNDING = (ROLLING_ATTENTION.name, ROLLING_ATTENTION_INT8.name)


def allow_rounding(model: ir.Model) -> None:
    """Set `rounds` of every RollingAttention and RollingAttentionInt8 of `model` to 1, in place."""
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type in _ROUNDING:
            node.attributes["rounds"] = ir.AttrInt64("rounds", 1)
