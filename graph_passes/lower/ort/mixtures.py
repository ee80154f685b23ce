"""Mixtures of experts as ONNX Runtime's MoE and, with quantised weights, QMoE.

    MixtureOfExperts(x, MoEGate(logits), gate, up, down)  →  MoE(x, routed logits, gate and up in turn, down)

One weight [E, 2 I, C] has a row of an expert's gate, one of its up projection, and so on in turn (swiglu_fusion = 1).
One half behind the other (2) would be less to move when weights are loaded, but two of ONNX Runtime 1.31's kernels
disagree on which half the gate is, and the CPU provider has none. routing.py has what the router feeds.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.lower.ort.gated_activations import SILU
from graph_passes.lower.ort.nodes import MICROSOFT
from graph_passes.lower.ort.quantized_products import scales_as
from graph_passes.lower.ort.rewriting import (
    dtype_of,
    fresh,
    input_of,
    insert,
    integers,
    is_op,
    like,
    shape_of,
    substitute,
    weight_as,
)
from graph_passes.lower.ort.routing import routed_logits
from graph_passes.lower.products import joined_name
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from graph_passes.ops.moe_gate import MOE_GATE
from graph_passes.ops.quantized_moe import QUANTIZED_MIXTURE_OF_EXPERTS
from runtime.errors import FusionError

LEAST_HIDDEN, STEP = 16, 8
"""MoE's kernels read rows of at least LEAST_HIDDEN numbers, and STEP of them at a time."""

QUANTIZED_STEP = 64
"""QMoE's kernels want both sizes of an expert to be multiples of this."""

QUANTIZED_BLOCKS = (32, 64, 128, 256)

_SWIGLU: dict[str, int | float | str] = {
    "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0,
    "normalize_routing_weights": 1,
}  # fmt: skip
"""silu(gate) · up, and weights that sum to one."""


def lower_mixtures(model: ir.Model) -> int:
    """Rewrite every mixture of experts of `model` in place; returns how many there were.

    Raises FusionError for experts that the kernels have not: another activation than silu, sizes or blocks that they
    cannot read, scales that would be rounded. The function body, every expert on every token, is no way out: it
    computes with shapes, which ONNX Runtime does on the CPU only.
    """
    found = [node for node in model.graph if is_op(node, MIXTURE_OF_EXPERTS.name, QUANTIZED_MIXTURE_OF_EXPERTS.name)]
    for node in found:
        _lower(model, node)
    return len(found)


def _lower(model: ir.Model, node: ir.Node) -> None:
    gate = input_of(node, 1).producer()
    if gate is None or not is_op(gate, MOE_GATE.name) or list(node.inputs[1:3]) != list(gate.outputs):
        raise FusionError(
            f"{node.name}: the experts' weights do not come from one MoEGate, and ONNX Runtime's mixtures choose "
            "experts themselves. Export the checkpoint again with this version."
        )
    activation = node.attributes["activation"].as_string()
    if activation != SILU:
        raise FusionError(
            f"{node.name}: the experts have the activation {activation}, and ONNX Runtime's mixtures on a GPU have "
            f"gated experts with {SILU} only. Build the engine with another --backend."
        )
    rows_NC = input_of(node, 0)
    attributes: dict[str, int | float | str] = dict(_SWIGLU)
    if node.op_type == MIXTURE_OF_EXPERTS.name:
        _refuse_sizes(node, *shape_of(input_of(node, 3))[1:])
        op, inputs = "MoE", _dense(model, node)
    else:
        _refuse_quantized(node)
        op, inputs = "QMoE", _quantized(model, node)
        attributes["expert_weight_bits"] = node.attributes["bits"].as_int()
        attributes["block_size"] = node.attributes["block_size"].as_int()
        attributes["weights_prepacked"] = 0
    top_k = attributes["k"] = gate.attributes["top_k"].as_int()
    logits = routed_logits(model, node, input_of(gate, 0), top_k, dtype_of(rows_NC))
    old = node.outputs[0]
    made = like(old, f"{old.name}.mixed")
    insert(model, node, op, [rows_NC, logits, *inputs], made, attributes, MICROSOFT)
    substitute(model, node, old, made)
    if not any(value.uses() for value in gate.outputs):
        model.graph.remove(gate, safe=True)


def _dense(model: ir.Model, node: ir.Node) -> list[ir.Value | None]:
    """MoE's inputs behind the logits; None for biases."""
    gate, up, down = (input_of(node, index) for index in (3, 4, 5))
    dtype = dtype_of(input_of(node, 0))
    return [
        weight_as(model, node, _interleaved(model, node, gate, up), dtype),
        None,
        weight_as(model, node, down, dtype),
    ]


def _quantized(model: ir.Model, node: ir.Node) -> list[ir.Value | None]:
    """QMoE's inputs behind the logits; None for biases, and for the third projection, which lies in the first."""
    dtype = dtype_of(input_of(node, 0))
    gate, gate_scale, up, up_scale, down, down_scale = (input_of(node, index) for index in range(3, 9))
    numbers = [_flat_rows(model, node, stack) for stack in (_interleaved(model, node, gate, up), down)]
    scales = [
        scales_as(model, node, stack, dtype) for stack in (_interleaved(model, node, gate_scale, up_scale), down_scale)
    ]
    zeros: list[ir.Value | None] = []
    if node.attributes["zero_points"].as_int():
        gate_zero, up_zero, down_zero = (input_of(node, index) for index in range(9, 12))
        zeros = [None, None, None, _interleaved(model, node, gate_zero, up_zero), down_zero]
    return [numbers[0], scales[0], None, numbers[1], scales[1], None, *zeros]


def _interleaved(model: ir.Model, node: ir.Node, gate: ir.Value, up: ir.Value) -> ir.Value:
    """Stacks [E, I, ...] as one [E, 2 I, ...], rows of gate and up in turn."""
    experts, rows, *rest = shape_of(gate)
    assert isinstance(rows, int)
    name = joined_name([str(gate.name), str(up.name)])
    behind = fresh(f"{name}.joined", dtype_of(gate), [experts, 2 * rows, *rest])
    insert(model, node, "Concat", [gate, up], behind, {"axis": 1})
    return insert(model, node, "Gather", [behind, _in_turn(model, rows)], like(behind, name), {"axis": 1})


def _in_turn(model: ir.Model, rows: int) -> ir.Value:
    """0, I, 1, I + 1, ...: one row of the first half, and one of the second."""
    name = f"ort.interleaved.{rows}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.arange(2 * rows).reshape(2, rows).T.reshape(-1).astype(np.int64), name=name)
        shape = ir.Shape([2 * rows])
        order = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=shape, const_value=tensor)
        model.graph.register_initializer(order)
    return model.graph.initializers[name]


def _flat_rows(model: ir.Model, node: ir.Node, stack: ir.Value) -> ir.Value:
    """Numbers [E, R, B, b] as [E, R, B · b]."""
    assert stack.shape is not None
    experts, rows, blocks, size = stack.shape.numpy()
    extents = [experts, rows, blocks * size]
    made = fresh(f"{stack.name}.rows", dtype_of(stack), extents)
    return insert(model, node, "Reshape", [stack, integers(model, extents)], made)


def _refuse_sizes(node: ir.Node, intermediate: int | ir.SymbolicDim, hidden: int | ir.SymbolicDim) -> None:
    assert isinstance(intermediate, int)
    assert isinstance(hidden, int)
    if hidden < LEAST_HIDDEN or hidden % STEP or intermediate % STEP:
        raise FusionError(
            f"{node.name}: the experts go from {hidden} numbers to {intermediate}, and ONNX Runtime's mixtures on a "
            f"GPU take multiples of {STEP}, and at least {LEAST_HIDDEN} to start from. Build the engine with another "
            "--backend."
        )


def _refuse_quantized(node: ir.Node) -> None:
    sizes = {key: node.attributes[key].as_int() for key in ("hidden", "intermediate")}
    block = node.attributes["block_size"].as_int()
    if block not in QUANTIZED_BLOCKS or any(size % block or size % QUANTIZED_STEP for size in sizes.values()):
        raise FusionError(
            f"{node.name}: the experts go from {sizes['hidden']} numbers to {sizes['intermediate']} with blocks of "
            f"{block}, and ONNX Runtime's quantised mixtures on a GPU take multiples of {QUANTIZED_STEP} in whole "
            f"blocks of {', '.join(map(str, QUANTIZED_BLOCKS))}. Export the checkpoint with another --block-size, or "
            "with weights of two bytes."
        )
    odd = [size // block for size in sizes.values() if size // block % 2]
    if odd and node.attributes["bits"].as_int() == 4 and node.attributes["zero_points"].as_int():
        # The kernel that prepares zero points takes their bytes times two for the number of blocks, and so reads the
        # scales of every expert but the first from wrong places.
        raise FusionError(
            f"{node.name}: a row of the experts' weights has {odd[0]} blocks of {block} with zero points of 4 bits, "
            "and ONNX Runtime's quantised mixtures on a GPU read those of an even number of blocks only. Build the "
            "engine with another --backend, or export the original checkpoint with another --block-size or without "
            "zero points."
        )
