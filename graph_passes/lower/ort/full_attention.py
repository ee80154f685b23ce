"""Attention without a window: a buffer of the whole context, and FlashAttention over as much of it as is written.

The buffer has as many slots beyond the context as a step has tokens. There the padding of a row lies, behind its last
token, where no token of the row sees it, and where the row's next tokens overwrite it.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.lower.ort.attention_nodes import AttentionNode
from graph_passes.lower.ort.nodes import extents
from graph_passes.lower.ort.step import Step


def attend_to_all(
    step: Step, layer: AttentionNode, turned: tuple[ir.Value, ir.Value, ir.Value], slots: int
) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
    """Attended [B, T, H·D], and the buffers [B, slots, G·D] of keys and values after the write.

    turned: query [B, T, H·D], key and value [B, T, G·D]. The layer's past is [B, slots, G·D] by now.
    """
    query, key, value = turned
    present = write(step, layer, (key, value), step.start_B, slots, mode="linear")
    return attend(step, layer, query, present, step.reached_B), present


def write(
    step: Step, layer: AttentionNode, new: tuple[ir.Value, ir.Value], at_B: ir.Value, slots: int, mode: str
) -> tuple[ir.Value, ir.Value]:
    """The layer's buffers [B, slots, G·D] with the T keys and values of each row from slot at_B on; at the same place
    in memory where a runtime binds past and present to one buffer."""
    shape = [step.batch, slots, layer.kv_heads * layer.head_dim]
    made = [
        step.nodes.one(
            "TensorScatter", [past, rows, at_B], f"{present.name}.written", layer.dtype, shape,
            {"mode": mode, "axis": 1},
        )
        for past, present, rows in zip(layer.past, layer.present, new, strict=True)
    ]  # fmt: skip
    return made[0], made[1]


def attend(
    step: Step, layer: AttentionNode, query: ir.Value, held: tuple[ir.Value, ir.Value], seen_B: ir.Value
) -> ir.Value:
    """Attention of T queries a row over the first seen_B slots, each over those up to its own: bottom-right causal.

    Three axes and no mask, which FlashAttention takes as they are: with four axes there would be transposes, and with
    a mask the keys would be repeated for each query head.
    """
    attributes = {
        "q_num_heads": layer.heads,
        "kv_num_heads": layer.kv_heads,
        "scale": layer.scale,
        "is_causal": int(not step.decodes),  # a single query sees all that is written
    }
    inputs = [query, *held, None, None, None, seen_B]
    return step.nodes.one(
        "Attention", inputs, f"{layer.attended.name}.attended", layer.dtype, extents(query), attributes
    )
