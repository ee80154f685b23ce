"""Small ONNX graphs around one plugin node each, with every weight as an input, as engines are built from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Range = tuple[Sequence[int], Sequence[int], Sequence[int]]
Dim = int | str
TYPES = {
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "float8": TensorProto.FLOAT8E4M3FN,
    "int64": TensorProto.INT64,
}


@dataclass(frozen=True, slots=True)
class PluginGraph:
    """inputs: type and shape of each, with letters for dynamic dims."""

    nodes: tuple[onnx.NodeProto, ...]
    inputs: Mapping[str, tuple[str, tuple[Dim, ...]]]
    outputs: Mapping[str, str]
    constants: Mapping[str, Sequence[int]]

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            list(self.nodes),
            "graph",
            [helper.make_tensor_value_info(name, TYPES[dtype], shape) for name, (dtype, shape) in self.inputs.items()],
            [helper.make_tensor_value_info(name, TYPES[dtype], None) for name, dtype in self.outputs.items()],
            [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in self.constants.items()],
        )
        sets = [helper.make_opsetid("", 24), helper.make_opsetid("cierzo", 1)]
        return helper.make_model(graph, opset_imports=sets, ir_version=11)

    def profile(self, **dims: tuple[int, int, int]) -> dict[str, Range]:
        """The ranges of all dynamic inputs, given least, usual and largest size of each letter."""
        ranges: dict[str, Range] = {}
        for name, (_, shape) in self.inputs.items():
            if any(isinstance(dim, str) for dim in shape):
                low, usual, high = (
                    [dims[dim][which] if isinstance(dim, str) else dim for dim in shape] for which in range(3)
                )
                ranges[name] = (low, usual, high)
        return ranges


def plugin_node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        op, inputs, outputs, name=f"layers.0.{op}", domain="cierzo", plugin_namespace="cierzo", plugin_version="1",
        **attributes,
    )  # fmt: skip


def attention_graph(
    *,
    packed: bool = True,
    activations: str = "bfloat16",
    ring: str = "bfloat16",
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 128,
    slots: int = 24,
    window: int = 16,
    **other: Any,
) -> PluginGraph:
    """The projection of 1024 channels, RollingAttention with window 16, and the output projection.

    packed: one projection and PackedRollingAttention; else three, and RollingAttention.
    """
    C, D, P = 1024, head_dim, heads + 2 * kv_heads
    attributes = {"scale": 0.25, "window": window, "interleaved": 0, "rounds": 0, **other}
    parts = {"qkv": P} if packed else {"q": heads, "k": kv_heads, "v": kv_heads}
    nodes = [helper.make_node("Reshape", ["x", "rows"], ["x_rows"])]
    for name in parts:
        nodes += [
            helper.make_node("Transpose", [f"w_{name}"], [f"wt_{name}"], perm=[1, 0]),
            helper.make_node("MatMul", ["x_rows", f"wt_{name}"], [f"{name}_rows"], name=f"project_{name}"),
            helper.make_node("Shape", ["x"], [f"leading_{name}"], start=0, end=2),
            helper.make_node("Concat", [f"leading_{name}", "heads_open"], [f"shape_{name}"], axis=0),
            helper.make_node("Reshape", [f"{name}_rows", f"shape_{name}"], [name]),
        ]
    rings = ["cos", "sin", "past_key", "past_value", "start", "count"]
    outputs = ["attended", "present_key", "present_value"]
    if packed:
        more = {"heads": heads, "kv_heads": kv_heads}
        nodes.append(plugin_node("PackedRollingAttention", ["qkv", *rings], outputs, **attributes, **more))
    else:
        nodes.append(plugin_node("RollingAttention", ["q", "k", "v", *rings], outputs, **attributes))
    nodes += [
        helper.make_node("Reshape", ["attended", "attended_shape"], ["attended_rows"]),
        helper.make_node("Transpose", ["w_out"], ["wt_out"], perm=[1, 0]),
        helper.make_node("MatMul", ["attended_rows", "wt_out"], ["y"], name="project_out"),
    ]
    weights = {f"w_{name}": (activations, (count * D, C)) for name, count in parts.items()}
    return PluginGraph(
        nodes=tuple(nodes),
        inputs={
            "x": (activations, ("B", "T", C)),
            **weights,
            "w_out": (activations, (C, heads * D)),
            "cos": ("float32", ("B", "T", D // 2)),
            "sin": ("float32", ("B", "T", D // 2)),
            "past_key": (ring, ("B", kv_heads, slots, D)),
            "past_value": (ring, ("B", kv_heads, slots, D)),
            "start": ("int64", ("B",)),
            "count": ("int64", ("B",)),
        },
        outputs={"y": activations, "present_key": ring, "present_value": ring},
        constants={"rows": [-1, C], "heads_open": [-1, D], "attended_shape": [-1, heads * D]},
    )


def mixture_graph(
    *, element: str = "bfloat16", activation: str = "silu", top_k: int = 2, hidden: int = 1024
) -> PluginGraph:
    """The router's product, MoEGate, and MixtureOfExperts on 4 experts of 32 channels."""
    C, I, E = hidden, 32, 4
    return PluginGraph(
        nodes=(
            helper.make_node("Transpose", ["router"], ["router_t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "router_t"], ["narrow_logits"], name="route"),
            helper.make_node("Cast", ["narrow_logits"], ["logits"], to=TensorProto.FLOAT),
            plugin_node("MoEGate", ["logits"], ["weight", "expert"], top_k=top_k),
            plugin_node(
                "MixtureOfExperts", ["x", "weight", "expert", "gate", "up", "down"], ["y"], activation=activation
            ),
        ),
        inputs={
            "x": (element, ("N", C)),
            "router": (element, (E, C)),
            "gate": (element, (E, I, C)),
            "up": (element, (E, I, C)),
            "down": (element, (E, C, I)),
        },
        outputs={"y": element, "weight": "float32", "expert": "int64"},
        constants={},
    )
