"""The router of ONNX Runtime's mixtures of experts: its logits in the type of the rows, with the choice made before.

MoE and QMoE choose by logits of the rows' type, and a rounded logit may send a token to another expert. So the choice
is made here in float32, as MoEGate's, and what they are given leaves them none:

    fed[n, e] = logit[n, e] − max logit[n]   for the K experts with the largest logits, ties to the lower expert number
                UNCHOSEN                     for all others

Their softmax over the K largest gives MoEGate's weights, since it does not see what is subtracted; differences to the
largest are small where weights are large, so that rounding them rounds the weights about as storing those would.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.lower.ort.rewriting import constant, fresh, insert, integers, like, shape_of

FARTHEST = -1000.0
"""What lies farther behind the largest logit is taken to lie here: a weight of e⁻¹⁰⁰⁰ is zero as well.

A NaN is taken to lie here too. The kernels sort logits, and with a NaN among them they reach for experts that do not
exist; the rows that made it a NaN are NaN or infinite themselves, and so is what the experts make of them.
"""

UNCHOSEN = -2000.0
"""Lower than any that are chosen. Like FARTHEST it is the same number in float16 and bfloat16, or nearly."""


def routed_logits(model: ir.Model, before: ir.Node, logits_NE: ir.Value, top_k: int, dtype: ir.DataType) -> ir.Value:
    """Nodes in front of `before` that turn float32 logits [N, E] into those that MoE and QMoE are fed, of `dtype`."""
    tokens, _ = shape_of(logits_NE)
    base, wide = str(logits_NE.name), ir.DataType.FLOAT
    best_NK = fresh(f"{base}.best", wide, [tokens, top_k])
    chosen_NK = fresh(f"{base}.chosen", ir.DataType.INT64, [tokens, top_k])
    insert(model, before, "TopK", [logits_NE, integers(model, [top_k])], [best_NK, chosen_NK], {"axis": -1})
    largest_N1 = fresh(f"{base}.largest", wide, [tokens, 1])
    insert(model, before, "Gather", [best_NK, integers(model, [0])], largest_N1, {"axis": 1})
    behind_NK = insert(model, before, "Sub", [best_NK, largest_N1], like(best_NK, f"{base}.behind"))
    farthest = constant(model, np.array(FARTHEST, np.float32))
    near_NK = fresh(f"{base}.near", ir.DataType.BOOL, [tokens, top_k])
    insert(model, before, "Greater", [behind_NK, farthest], near_NK)
    kept_NK = insert(model, before, "Where", [near_NK, behind_NK, farthest], like(best_NK, f"{base}.kept"))
    extents = insert(model, before, "Shape", [logits_NE], fresh(f"{base}.extents", ir.DataType.INT64, [2]))
    unchosen_NE = insert(model, before, "ConstantOfShape", [extents], like(logits_NE, f"{base}.unchosen"))
    filler = unchosen_NE.producer()
    assert filler is not None
    filler.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array([UNCHOSEN], np.float32)))
    routed_NE = like(logits_NE, f"{base}.routed")
    insert(model, before, "ScatterElements", [unchosen_NE, chosen_NK, kept_NK], routed_NE, {"axis": 1})
    if dtype == wide:
        return routed_NE
    narrow_NE = fresh(f"{base}.routed.{dtype.name.lower()}", dtype, shape_of(logits_NE))
    return insert(model, before, "Cast", [routed_NE], narrow_NE, {"to": int(dtype)})
