"""Bundles with their attention lowered for ONNX Runtime on CUDA and nothing else, and engines that run them here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import onnx
import onnx_ir as ir

from exporter.build.lower import LoweredGraph, lower_for_engine
from graph_passes.lower.ort.attention import lower_attention
from graph_passes.lower.ort.plan import AttentionPlan
from runtime import Session
from runtime.bundle import Bundle, read_bundle
from runtime.engine_info import DECODE, PREFILL
from runtime.step_engine_info import Scratch, StepRing
from tests.support.bundles import Exported
from tests.support.lowered import LoweredEngine, with_weights
from tests.support.step_graphs import StepEngine

ATTENTION = ("RollingAttention", "PackedRollingAttention")
Change = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A bundle's graph in an arithmetic before attention is lowered: weights are inputs, rings are [B, G, S, D]."""

    bundle: Bundle
    graph: LoweredGraph
    arithmetic: str

    def model(self) -> ir.Model:
        """A fresh copy of the graph."""
        return ir.from_proto(onnx.load_from_string(self.graph.onnx))

    def lowered(self, step: str) -> tuple[ir.Model, AttentionPlan]:
        """The graph with its attention lowered for `step`."""
        model = self.model()
        return model, lower_attention(model, step, self.bundle.manifest.kv.chunk)

    def before(self) -> Session:
        """A session that runs the graph as it is."""
        return Session(self.bundle, LoweredEngine(self.bundle, self.graph, self.arithmetic, self.arithmetic))

    def engine(self, change: Change | None = None) -> StepEngine:
        """An engine of the two lowered graphs; change: what is done to each of them first."""
        protos, plans = {}, {}
        for step in (PREFILL, DECODE):
            model, plans[step] = self.lowered(step)
            proto = ir.to_proto(model)
            if change is not None:
                change(proto)
            protos[step] = with_weights(replace(self.graph, onnx=proto.SerializeToString()), self.bundle)
            onnx.checker.check_model(protos[step], full_check=True)
        assert plans[PREFILL].rings == plans[DECODE].rings
        plan = plans[PREFILL]
        rings = tuple(StepRing(**asdict(ring)) for ring in plan.rings)
        scratch = None if plan.scratch is None else Scratch(**asdict(plan.scratch))
        return StepEngine(self.bundle, protos[PREFILL], protos[DECODE], rings, scratch, self.arithmetic)

    def after(self, change: Change | None = None) -> Session:
        """A session on `engine`."""
        return Session(self.bundle, self.engine(change))


def case_of(exported: Exported, arithmetic: str, change: Change | None = None) -> Case:
    """The graph of a bundle; change: what is done to it first."""
    bundle = read_bundle(exported.bundle)
    graph = lower_for_engine(bundle, arithmetic, arithmetic)
    if change is not None:
        model = onnx.load_from_string(graph.onnx)
        change(model)
        graph = replace(graph, onnx=model.SerializeToString())
    return Case(bundle, graph, arithmetic)


def attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Those of `model`, one for each layer."""
    return [node for node in model.graph.node if node.op_type in ATTENTION]


def set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    """Give the node's attribute `name`, which it has, another value."""
    (attribute,) = [attribute for attribute in node.attribute if attribute.name == name]
    attribute.i = value


def attention_only(
    dtype: str = "bfloat16", windows: Sequence[int] = (5, 5), packed: bool = True, head_dim: int = 8
) -> ir.Model:
    """A graph of nothing but attention, layers side by side: 4 query heads on 2, rings of 8 slots.

    Layer n makes y_n [B, T, 4 D] of product_n [B, T, 8 D], or of query_n, key_n and value_n where it is not packed.
    windows: of each layer, 0 for none.
    """
    D = head_dim
    inputs = [f"float[B,T,{D // 2}] cos", f"float[B,T,{D // 2}] sin", "int64[B] start", "int64[B] count"]
    outputs, values, body = [], [f"int64[4] to_heads = {{0, 0, -1, {D}}}", "int64[3] to_rows = {0, 0, -1}"], []
    op, counts = ("PackedRollingAttention", ", heads = 4, kv_heads = 2") if packed else ("RollingAttention", "")
    for n, window in enumerate(windows):
        parts = {"product": 8} if packed else {"query": 4, "key": 2, "value": 2}
        rings = {
            f"{time}_{n}_{kind}": f"{dtype}[B,2,8,{D}]" for time in ("past", "present") for kind in ("key", "value")
        }
        inputs += [f"{dtype}[B,T,{heads * D}] {part}_{n}" for part, heads in parts.items()]
        inputs += [f"{shape} {name}" for name, shape in rings.items() if name.startswith("past")]
        outputs += [f"{dtype}[B,T,{4 * D}] y_{n}"]
        outputs += [f"{shape} {name}" for name, shape in rings.items() if name.startswith("present")]
        values += [f"{dtype}[B,T,{heads},{D}] {part}_heads_{n}" for part, heads in parts.items()]
        values += [f"{dtype}[B,T,4,{D}] attended_{n}", f"{dtype}[B,T,{4 * D}] rows_{n}"]
        body += [f"{part}_heads_{n} = Reshape ({part}_{n}, to_heads)" for part in parts]
        read = [*(f"{part}_heads_{n}" for part in parts), "cos", "sin", f"past_{n}_key", f"past_{n}_value"]
        body += [
            f"attended_{n}, present_{n}_key, present_{n}_value = cierzo.{op}"
            f" <scale = 0.5, window = {window}, interleaved = 0, rounds = 0{counts}>"
            f" ({', '.join(read)}, start, count)",
            f"rows_{n} = Reshape (attended_{n}, to_rows)",
            f"y_{n} = Neg (rows_{n})",
        ]
    lines = "\n".join(body)
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 24, "cierzo" : 1]>\n'
        f"g ({', '.join(inputs)}) => ({', '.join(outputs)}) <{', '.join(values)}> {{\n{lines}\n}}"
    )
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    return model
