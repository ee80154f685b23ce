"""The plugin ops, by name. A new one is a file beside these and a line here."""

from __future__ import annotations

from graph_passes.ops.base import DOMAIN, OPSET, VERSION, PluginOp
from graph_passes.ops.gated_activation import GATED_ACTIVATION
from graph_passes.ops.grouped_query_attention import GROUPED_QUERY_ATTENTION
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from graph_passes.ops.moe_gate import MOE_GATE
from graph_passes.ops.packed_attention import PACKED_ROLLING_ATTENTION
from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL
from graph_passes.ops.quantized_moe import QUANTIZED_MIXTURE_OF_EXPERTS
from graph_passes.ops.rms_norm import RMS_NORM
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION, ROLLING_ATTENTION_INT8
from graph_passes.ops.rolling_kv import ROLLING_KV_WRITE
from graph_passes.ops.rotary_embedding import ROTARY_EMBEDDING
from graph_passes.ops.sliding_window_attention import SLIDING_WINDOW_ATTENTION
from graph_passes.ops.stored_matmul import STORED_MATMUL

OPS: dict[str, PluginOp] = {
    op.name: op
    for op in (
        ROTARY_EMBEDDING,
        ROLLING_KV_WRITE,
        GROUPED_QUERY_ATTENTION,
        SLIDING_WINDOW_ATTENTION,
        MOE_GATE,
        MIXTURE_OF_EXPERTS,
        GATED_ACTIVATION,
        RMS_NORM,
        ROLLING_ATTENTION,
        ROLLING_ATTENTION_INT8,
        PACKED_ROLLING_ATTENTION,
        STORED_MATMUL,
        QUANTIZED_MATMUL,
        QUANTIZED_MIXTURE_OF_EXPERTS,
    )
}

__all__ = ["DOMAIN", "OPS", "OPSET", "VERSION", "PluginOp"]
