"""Small graphs of what engines for ONNX Runtime's CUDA provider are made of, as `Step`s with their bindings.

Letters: B batch rows, T tokens, S slots of a ring, H heads, G KV heads, D head dim, L slots laid out straight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.support.onnxruntime_gpu import Step

BFLOAT16, FLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT
INT32, INT64, UINT8, BOOL = TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.BOOL
MICROSOFT = "com.microsoft"
PAGE = 256
Value = tuple[str, int, Sequence[int | str]]


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    initializers: Sequence[onnx.TensorProto] = (),
) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "step",
        [helper.make_tensor_value_info(name, dtype, list(dims)) for name, dtype, dims in inputs],
        [helper.make_tensor_value_info(name, dtype, list(dims)) for name, dtype, dims in outputs],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(MICROSOFT, 1)]
    serialized: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return serialized


def one_node(
    op: str,
    inputs: Sequence[Value | None],
    outputs: Sequence[Value],
    *,
    domain: str = "",
    constants: Collection[str] = (),
    cuda_graph: bool = False,
    runs: int = 1,
    **attributes: Any,
) -> Step:
    """A step of one node. constants: inputs that are initializers instead, whose content the session is given."""
    given = [value for value in inputs if value is not None]
    node = helper.make_node(
        op,
        [value[0] if value else "" for value in inputs],
        [name for name, _, _ in outputs],
        domain=domain,
        **attributes,
    )
    weights = [outside(name, dtype, dims) for name, dtype, dims in given if name in constants]
    graph = model([node], [value for value in given if value[0] not in constants], outputs, weights)
    contents = {tensor.name: np.zeros(tuple(tensor.dims), _numpy_type(tensor.data_type)) for tensor in weights}
    return Step(graph, constants=contents, cuda_graph=cuda_graph, runs=runs)


def outside(name: str, dtype: int, dims: Sequence[int | str]) -> onnx.TensorProto:
    """An initializer without content, as engines have it."""
    tensor = TensorProto(name=name, data_type=dtype, dims=[int(dim) for dim in dims])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="given when the session is made")
    return tensor


def _numpy_type(dtype: int) -> Any:
    return helper.tensor_dtype_to_np_dtype(dtype)


def ring_decode(dtype: int, *, B: int = 1, H: int = 32, G: int = 8, D: int = 128, S: int = 4096, **how: Any) -> Step:
    """A token is written into the ring, and attention sees the whole of it: no mask, the number of keys alone."""
    rings: list[Value] = [(name, dtype, [B, S, G * D]) for name in ("past_key", "past_value")]
    new: list[Value] = [("query", dtype, [B, 1, H * D]), *((name, dtype, [B, 1, G * D]) for name in ("key", "value"))]
    counts: list[Value] = [("slot", INT64, [B]), ("keys", INT64, [B])]
    nodes = [
        helper.make_node("TensorScatter", [f"past_{it}", it, "slot"], [f"present_{it}"], mode="circular", axis=1)
        for it in ("key", "value")
    ]
    read = ["query", "present_key", "present_value", "", "", "", "keys"]
    nodes.append(helper.make_node("Attention", read, ["attended"], q_num_heads=H, kv_num_heads=G))
    out: list[Value] = [("attended", dtype, [B, 1, H * D])]
    out += [(f"present_{it}", dtype, [B, S, G * D]) for it in ("key", "value")]
    shares = {"present_key": "past_key", "present_value": "past_value"}
    return Step(model(nodes, [*new, *rings, *counts], out), shares=shares, **how)


def causal_attention(
    dtype: int, *, T: int, L: int, B: int = 1, H: int = 32, G: int = 8, D: int = 128, masked: bool = False
) -> Step:
    """Attention of T new tokens over L slots: causal with the number of keys, or with a mask."""
    inputs: list[Value] = [("query", dtype, [B, T, H * D]), *((it, dtype, [B, L, G * D]) for it in ("key", "value"))]
    last: Value = ("mask", dtype, [B, 1, T, L]) if masked else ("keys", INT64, [B])
    node = helper.make_node(
        "Attention",
        ["query", "key", "value", *(["mask"] if masked else ["", "", "", "keys"])],
        ["attended"],
        q_num_heads=H,
        kv_num_heads=G,
        is_causal=0 if masked else 1,
    )
    return Step(model([node], [*inputs, last], [("attended", dtype, [B, T, H * D])]))


def windowed_prefill(
    dtype: int,
    *,
    window: int,
    B: int = 2,
    T: int = 5,
    H: int = 4,
    G: int = 2,
    D: int = 64,
    L: int = PAGE,
    bounds: bool = True,
    in_place: bool = True,
    reshaped: bool = False,
) -> Step:
    """Rings are laid out straight into the scratch memory, pages of which PagedAttention writes and reads.

    bounds: whether it is told the largest counts, in the host's memory. in_place: whether its caches after the step are
    bound to those before. reshaped: whether the scratch memory gets its shape only after the rings were gathered.
    """
    pages = B * L // PAGE
    scratch = [pages, PAGE, G, D]
    inputs: list[Value] = [("query", dtype, [B * T, H * D])]
    inputs += [(it, dtype, [B * T, G * D]) for it in ("key", "value")]
    inputs += [(f"past_{it}", dtype, [B * window, *([G * D] if reshaped else [G, D])]) for it in ("key", "value")]
    inputs += [("slots", INT64, [pages, PAGE]), ("cumulative", INT32, [B + 1]), ("past", INT32, [B])]
    inputs += [("block_table", INT32, [B, L // PAGE])]
    nodes, outputs = [], list[Value]([("attended", dtype, [B * T, H * D])])
    for it in ("key", "value"):
        gathered = f"gathered_{it}" if reshaped else f"scratch_{it}"
        nodes.append(helper.make_node("Gather", [f"past_{it}", "slots"], [gathered]))
        if reshaped:
            nodes.append(helper.make_node("Reshape", [gathered, "shape"], [f"scratch_{it}"]))
        outputs += [(f"scratch_{it}", dtype, scratch), (f"after_{it}", dtype, scratch)]
    read = ["query", "key", "value", "scratch_key", "scratch_value", "cumulative", "past", "block_table"]
    if bounds:
        read += [""] * 8 + ["attention_bounds"]
        inputs.append(("attention_bounds", INT32, [2]))
    written = ["attended", "after_key", "after_value"]
    how: Mapping[str, Any] = {"num_heads": H, "kv_num_heads": G, "local_window_size": window}
    nodes.append(helper.make_node("PagedAttention", read, written, domain=MICROSOFT, **how))
    shape = helper.make_tensor("shape", INT64, [4], scratch)
    past = min(window, L - T)
    values = {
        "cumulative": np.arange(B + 1, dtype=np.int32) * T,
        "past": np.full(B, past, np.int32),
        "block_table": np.arange(pages, dtype=np.int32).reshape(B, -1),
        "attention_bounds": np.array([T, past + T], np.int32),
    }
    return Step(
        model(nodes, inputs, outputs, [shape] if reshaped else []),
        values={name: value for name, value in values.items() if bounds or name != "attention_bounds"},
        on_host=["attention_bounds"],
        shares={f"after_{it}": f"scratch_{it}" for it in ("key", "value")} if in_place else {},
    )


def nodes_of_engines(t: int) -> dict[str, Step]:
    """A step of each kind of node that engines computing in the type t have, to be captured as a CUDA graph."""
    many: dict[str, Any] = {"cuda_graph": True, "runs": 2}
    ms: dict[str, Any] = {"domain": MICROSOFT, **many}

    def x(name: str, dims: list[int], dtype: int = t) -> Value:
        return (name, dtype, dims)

    experts: dict[str, Any] = {"k": 2, "normalize_routing_weights": 1, "activation_type": "swiglu", "swiglu_fusion": 1}
    experts |= {"activation_alpha": 1.0, "activation_beta": 0.0}
    routed = [x("x", [3, 64]), x("router", [3, 4])]
    gate_up, down = x("gate_up", [4, 256, 64]), x("down", [4, 64, 128])
    steps = {
        "RMSNormalization": one_node("RMSNormalization", [x("x", [4, 64]), x("w", [64])], [x("y", [4, 64])], **many),
        "residual and norm": one_node(
            "SkipSimplifiedLayerNormalization",
            [x("x", [4, 64], FLOAT), x("skip", [4, 64], FLOAT), x("w", [64], FLOAT)],
            [x("y", [4, 64], FLOAT)],
            epsilon=1e-5,
            **ms,
        ),
        "RotaryEmbedding": one_node(
            "RotaryEmbedding",
            [x("x", [2, 3, 64]), x("cos", [2, 3, 8]), x("sin", [2, 3, 8])],
            [x("y", [2, 3, 64])],
            num_heads=4,
            **many,
        ),
        "silu": one_node("ScaledSiLU", [x("x", [4, 64])], [x("y", [4, 64])], alpha=1.0, **ms),
        "product": one_node("FusedMatMul", [x("x", [2, 3, 64]), x("w", [8, 64])], [x("y", [2, 3, 8])], transB=1, **ms),
        "MoE": one_node("MoE", [*routed, gate_up, None, down], [x("y", [3, 64])], **experts, **ms),
        "Cast": one_node("Cast", [x("x", [4])], [x("y", [4], FLOAT)], to=FLOAT, **many),
        "rows": one_node(
            "GatherND",
            [x("x", [2, 3, 64]), x("i", [2, 1, 1], INT64)],
            [x("y", [2, 1, 64])],
            batch_dims=1,
            **many,
        ),
        "embedding": one_node("Gather", [x("x", [9, 64]), x("i", [2, 3], INT64)], [x("y", [2, 3, 64])], **many),
    }
    for bits, block in ((4, 16), (4, 32), (4, 128), (8, 32), (8, 128)):
        weight = [x("w", [32, 256 // block, block * bits // 8], UINT8), x("scales", [32, 256 // block])]
        steps[f"MatMulNBits {bits} {block}"] = one_node(
            "MatMulNBits",
            [x("x", [3, 256]), *weight],
            [x("y", [3, 32])],
            K=256,
            N=32,
            bits=bits,
            block_size=block,
            **ms,
        )
    for bits, block in ((4, 32), (8, 64)):
        packed = 8 // bits
        up = [x("up", [4, 256, 64 // packed], UINT8), x("up_scales", [4, 256, 64 // block])]
        low = [x("low", [4, 64, 128 // packed], UINT8), x("low_scales", [4, 64, 128 // block])]
        steps[f"QMoE {bits} {block}"] = one_node(
            "QMoE",
            [*routed, *up, None, *low, None],
            [x("y", [3, 64])],
            constants=["up", "up_scales", "low", "low_scales"],
            expert_weight_bits=bits,
            block_size=block,
            weights_prepacked=0,
            **experts,
            **ms,
        )
    return steps
