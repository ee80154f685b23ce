"""SwiGLU in the type of the products around it, without the casts to float32 and back.

    GatedActivation<silu>(Cast(g), Cast(u)) → Cast   becomes   Mul(ScaledSiLU(g), u)

ScaledSiLU computes its sigmoid in float32 and rounds that, and then the product; Sigmoid and QuickGelu compute all of
it in the narrow type, where 1 − 1 / (1 + eˣ) leaves little of a negative gate. What overflows shows: it is infinite or
NaN.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.lower.ort.nodes import MICROSOFT
from graph_passes.lower.ort.rewriting import dtype_of, fresh, input_of, insert, is_op, shape_of, substitute
from graph_passes.ops.gated_activation import GATED_ACTIVATION

SILU = "silu"


def lower_gated_activations(model: ir.Model) -> int:
    """Rewrite every GatedActivation of silu in `model` in place; returns how many. Others keep their bodies."""
    found = [
        node
        for node in model.graph
        if is_op(node, GATED_ACTIVATION.name) and node.attributes["activation"].as_string() == SILU
    ]
    for node in found:
        old = node.outputs[0]
        wide = [input_of(node, 0), input_of(node, 1)]
        casts = [use.node for use in old.uses()]
        narrow = _narrow(wide, casts, old)
        gate, up = narrow or wide
        active = fresh(f"{old.name}.active", dtype_of(gate), shape_of(gate))
        gated = fresh(f"{old.name}.gated", dtype_of(gate), shape_of(gate))
        insert(model, node, "ScaledSiLU", [gate], active, {"alpha": 1.0}, MICROSOFT)
        insert(model, node, "Mul", [active, up], gated)
        if narrow is None:
            substitute(model, node, old, gated)
            continue
        for cast in casts:
            ir.convenience.replace_all_uses_with(cast.outputs[0], gated)
            model.graph.remove(cast, safe=True)
        model.graph.remove(node, safe=True)
    return len(found)


def _narrow(wide: list[ir.Value], casts: list[ir.Node], gated: ir.Value) -> list[ir.Value] | None:
    """Gate and up before they were widened, if all that reads the result rounds it back to their type."""
    sources = []
    for value in wide:
        maker = value.producer()
        if maker is None or maker.domain != "" or maker.op_type != "Cast":
            return None
        sources.append(input_of(maker, 0))
    types = {source.dtype for source in sources}
    types |= {cast.outputs[0].dtype if cast.op_type == "Cast" else gated.dtype for cast in casts}
    ends = gated.is_graph_output() or any(cast.outputs[0].is_graph_output() for cast in casts)
    return sources if len(types) == 1 and casts and not ends and gated.dtype not in types else None
