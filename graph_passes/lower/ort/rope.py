"""Queries, keys and values as ONNX Runtime's attention takes them: [B, T, heads · D], the first two turned by RoPE.

Su et al. 2021, arXiv:2104.09864. RotaryEmbedding-23 wants cosine and sine in the type of what it turns.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.graph import is_made_by
from graph_passes.lower.ort.attention_nodes import AttentionNode
from graph_passes.lower.ort.nodes import extents
from graph_passes.lower.ort.step import Step


def projections(step: Step, layer: AttentionNode) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The layer's query [B, T, H·D], key and value [B, T, G·D], in its type; query and key after RoPE.

    In float16 whatever is infinite in a key or a value has become NaN.
    """
    query, key, value = _apart(step, layer)
    key = _turned(step, layer, key, layer.kv_heads)
    return _turned(step, layer, query, layer.heads), _marked(step, key), _marked(step, value)


def _apart(step: Step, layer: AttentionNode) -> list[ir.Value]:
    H, G, D = layer.heads, layer.kv_heads, layer.head_dim
    if len(layer.projected) == 3:
        widths = (H * D, G * D, G * D)
        return [_in_rows(step, value, width) for value, width in zip(layer.projected, widths, strict=True)]
    product = _in_rows(step, layer.projected[0], (H + 2 * G) * D)
    batch, tokens, _ = extents(product)
    parts = [("query", H * D), ("key", G * D), ("value", G * D)]
    outputs = [(f"{layer.attended.name}.{name}", layer.dtype, [batch, tokens, width]) for name, width in parts]
    sizes = step.nodes.integers([width for _, width in parts])
    return step.nodes.several("Split", [product, sizes], outputs, {"axis": 2})


def _in_rows(step: Step, heads: ir.Value, width: int) -> ir.Value:
    """[B, T, heads, D] as [B, T, heads · D]; what was shaped into heads from there is read where it was made."""
    maker = heads.producer()
    source = maker.inputs[0] if maker is not None and is_made_by(heads, "Reshape") else None
    if source is not None and source.shape is not None and len(source.shape) == 3 and source.shape[2] == width:
        return source
    batch, tokens = extents(heads)[:2]
    constant = step.nodes.integers([0, 0, width])
    return step.nodes.one("Reshape", [heads, constant], f"{heads.name}.rows", heads.dtype, [batch, tokens, width])


def _turned(step: Step, layer: AttentionNode, rows: ir.Value, heads: int) -> ir.Value:
    cos, sin = (step.nodes.cast(table, layer.dtype) for table in (layer.cos, layer.sin))
    attributes = {"num_heads": heads, "interleaved": layer.interleaved}
    return step.nodes.one(
        "RotaryEmbedding", [rows, cos, sin], f"{rows.name}.turned", layer.dtype, extents(rows), attributes
    )


def _marked(step: Step, rows: ir.Value) -> ir.Value:
    """Infinities become NaN: x + (x − x).

    An infinite key that a query points away from would have no weight at all, and nobody would see that float16 could
    not hold it. What bfloat16 cannot hold, float32 cannot either.
    """
    if rows.dtype != ir.DataType.FLOAT16:
        return rows
    nothing = step.nodes.one("Sub", [rows, rows], f"{rows.name}.nothing", rows.dtype, extents(rows))
    return step.nodes.one("Add", [rows, nothing], f"{rows.name}.marked", rows.dtype, extents(rows))
