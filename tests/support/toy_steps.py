"""The toy bundle's engine of step graphs, hand-made: the interface of runtime/step_engine_info.py with its rings and
scratch memory, in plain ONNX that ONNX Runtime's CPU provider runs.

A windowed layer attends over its ring of W slots as it was before the step and over the step's own tokens, in steps of
any width; so the graph for one token and the one for many are alike here but for their inputs.

Letters: B batch, T tokens, R of them whose logits are asked for, S slots, H heads, G KV heads, Q = H / G, D head dim,
M hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from exporter.build.top_logits import top_logits_model
from runtime import Session
from runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaEngine
from runtime.bundle import Progress, read_bundle
from runtime.engine_info import DECODE, INPUT, PREFILL, EngineWeight
from runtime.step_engine_info import (
    BOUNDS,
    CONSTANT,
    PAGE,
    TOP,
    GraphFile,
    Scratch,
    StepEngineInfo,
    StepRing,
    step_engine_to_json,
)
from runtime.weight_expression import Stored
from tests.support.host_place import HostMemory, host_place
from tests.support.toy_bundle import SLOPE, GraphBuilder, ToyModel, write_manifest

BACKEND = "onnxruntime-cuda"


@dataclass(frozen=True, slots=True)
class Opened:
    """A session, and what it runs on."""

    session: Session
    engine: OnnxRuntimeCudaEngine
    memory: HostMemory


def step_engine(folder: Path, model: ToyModel, constants: Collection[str] = ()) -> StepEngineInfo:
    """What a build would say of the engine of the toy bundle in `folder`. constants: weights that are CONSTANT."""
    bundle = read_bundle(folder)
    windowed = [layer for layer, window in enumerate(model.windows) if window is not None]
    scratch = [(f"scratch.{layer}.key", f"scratch.{layer}.value") for layer in windowed]
    nothing = GraphFile("none.onnx", 1, "0" * 64, {})
    return StepEngineInfo(
        name="toy",
        backend=BACKEND,
        version=ort.__version__,
        arithmetic="float32",
        kv="float32",
        max_batch=model.max_batch,
        chunk=model.chunk,
        graph_sha256=bundle.manifest.files["model.onnx"].sha256 or "",
        graphs={kind: replace(nothing, file=f"{kind}.onnx") for kind in (PREFILL, DECODE, TOP)},
        rings=tuple(
            StepRing(
                f"past.{layer}.key", f"past.{layer}.value", f"present.{layer}.key", f"present.{layer}.value",
                _slots(model, layer), window,
            )
            for layer, window in enumerate(model.windows)
        ),
        scratch=Scratch(PAGE, tuple(key for key, _ in scratch), tuple(value for _, value in scratch))
        if windowed
        else None,
        tensors=_weights(folder, constants),
        orders={},
    )  # fmt: skip


def write_step_engine(
    folder: Path, model: ToyModel, name: str = "toy", constants: Collection[str] = (), **changes: Any
) -> StepEngineInfo:
    """Write the engine into the toy bundle in `folder`, as a build does. changes: fields of its engine.json."""
    info = step_engine(folder, model, constants)
    place = folder / "engines" / name
    place.mkdir(parents=True)
    graphs = {}
    for kind in (PREFILL, DECODE, TOP):
        made = top_logits_model(model.vocab_size) if kind == TOP else step_graph(model, info, kind)
        content = made.SerializeToString()
        (place / f"{kind}.onnx").write_bytes(content)
        graphs[kind] = GraphFile(f"{kind}.onnx", len(content), hashlib.sha256(content).hexdigest(), {})
    info = replace(info, **{"name": name, "graphs": graphs, **changes})
    content = json.dumps(step_engine_to_json(info)).encode()
    (place / "engine.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.setdefault("engines", {})[name] = entry
    write_manifest(folder, manifest)
    return info


def step_files(folder: Path, info: StepEngineInfo) -> dict[str, Path]:
    """Where the engine's graphs lie."""
    return {kind: folder / "engines" / info.name / graph.file for kind, graph in info.graphs.items()}


def step_graph(model: ToyModel, info: StepEngineInfo, kind: str) -> onnx.ModelProto:
    """The graph for steps of many tokens or of one. Where it is told wrong bounds, its logits are NaN."""
    b = GraphBuilder()
    H, G, D, Q = model.num_heads, model.num_kv_heads, model.head_dim, model.num_heads // model.num_kv_heads
    is_decode = kind == DECODE
    inputs = [_value("input_ids", TensorProto.INT64, ["B", 1 if is_decode else "T"])]
    inputs.append(_value("start_positions", TensorProto.INT64, ["B"]))
    outputs = [_value("logits", TensorProto.FLOAT, ["B", 1 if is_decode else "R", model.vocab_size])]
    one, zero = b.constant(1), b.constant(0)
    # No shape is computed with: the CUDA provider would do so on the host, and engines' graphs must not.
    ones_BT = b.node("Add", b.node("Sub", "input_ids", "input_ids"), one)
    offset_BT = b.node("CumSum", ones_BT, one, exclusive=1)
    start_B1 = b.node("Unsqueeze", "start_positions", b.constant([1]))
    if is_decode:
        end_B1 = b.node("Add", start_B1, one)
    else:
        inputs.append(_value("token_counts", TensorProto.INT64, ["B"]))
        inputs.append(_value("logit_positions", TensorProto.INT64, ["B", "R"]))
        end_B1 = b.node("Add", start_B1, b.node("Unsqueeze", "token_counts", b.constant([1])))
    position_BT = b.node("Add", start_B1, offset_BT)
    is_new_BT = b.node("Less", position_BT, end_B1)
    hidden_BTM = b.node("Gather", "embed", "input_ids")
    for layer, window in enumerate(model.windows):
        ring, S = info.rings[layer], _slots(model, layer)
        slot_1S = b.constant(np.arange(S)[None])
        # Slot j held the last position before the step that is j modulo S, if that is not below 0.
        held_BS = _last_in_slot(b, start_B1, slot_1S, S)
        after_BS = _last_in_slot(b, end_B1, slot_1S, S)
        key_position = b.node("Concat", held_BS, position_BT, axis=1)
        exists = b.node("Concat", b.node("GreaterOrEqual", held_BS, zero), is_new_BT, axis=1)
        distance = b.node("Sub", b.node("Unsqueeze", position_BT, b.constant([2])), _unsqueezed(b, key_position))
        visible = b.node("And", _unsqueezed(b, exists), b.node("GreaterOrEqual", distance, zero))
        if window is not None:
            visible = b.node("And", visible, b.node("Less", distance, b.constant(window)))
        kept = {}
        for name, past, present in (
            ("k", ring.past_key, ring.present_key),
            ("v", ring.past_value, ring.present_value),
        ):
            new_BTN = b.node("MatMul", hidden_BTM, f"{layer}.{name}")
            both = b.node("Concat", past, new_BTN, axis=1)
            kept[name] = b.node("Reshape", both, b.constant([0, 0, G, D]))
            # What the slot holds after the step: of the step's own tokens if the position is one, else what it held.
            from_step_BS = b.node("GreaterOrEqual", after_BS, start_B1)
            index_BS = b.node("Add", b.node("Sub", after_BS, start_B1), b.constant(S))
            index_BS = b.node("Where", from_step_BS, index_BS, slot_1S)
            b.node("GatherND", both, b.node("Unsqueeze", index_BS, b.constant([2])), batch_dims=1, output=present)
            shape = ["B", S, G * D]
            inputs.append(_value(past, TensorProto.FLOAT, shape))
            outputs.append(_value(present, TensorProto.FLOAT, shape))
        query = b.node("MatMul", hidden_BTM, f"{layer}.q")
        query = b.node("Reshape", query, b.constant([0, 0, G, Q, D]))
        query = b.node("Transpose", query, perm=[0, 2, 3, 1, 4])  # [B, G, Q, T, D]
        key = b.node("Unsqueeze", b.node("Transpose", kept["k"], perm=[0, 2, 3, 1]), b.constant([2]))
        value = b.node("Unsqueeze", b.node("Transpose", kept["v"], perm=[0, 2, 1, 3]), b.constant([2]))
        scores = b.node("Mul", b.node("MatMul", query, key), b.constant(1 / np.sqrt(D), np.float32))
        bias = b.node("Mul", b.node("Cast", distance, to=TensorProto.FLOAT), b.constant(SLOPE, np.float32))
        scores = b.node("Sub", scores, b.node("Unsqueeze", bias, b.constant([1, 2])))
        hidden = b.constant(-1e9, np.float32)
        scores = b.node("Where", b.node("Unsqueeze", visible, b.constant([1, 2])), scores, hidden)
        attended = b.node("MatMul", b.node("Softmax", scores, axis=-1), value)
        attended = b.node("Transpose", attended, perm=[0, 3, 1, 2, 4])
        flat = b.node("Reshape", attended, b.constant([0, 0, H * D]))
        hidden_BTM = b.node("Add", hidden_BTM, b.node("MatMul", flat, f"{layer}.o"))
    if not is_decode:
        position_BR1 = b.node("Unsqueeze", "logit_positions", b.constant([2]))
        hidden_BTM = b.node("GatherND", hidden_BTM, position_BR1, batch_dims=1)
    logits = b.node("MatMul", hidden_BTM, "lm_head")
    if info.scratch is not None and not is_decode:
        inputs.append(_value(BOUNDS, TensorProto.INT32, [2]))
        logits = b.node("Add", logits, _fault(b, model, offset_BT, start_B1))
        mark_B111 = b.node("Unsqueeze", b.node("Cast", start_B1, to=TensorProto.FLOAT), b.constant([2, 3]))
        for name in (*info.scratch.keys, *info.scratch.values):
            b.node("Expand", mark_B111, b.constant([1, PAGE, G, D]), output=name)
            outputs.append(_value(name, TensorProto.FLOAT, ["P", PAGE, G, D]))
    b.node("Identity", logits, output="logits")
    constants = []
    for weight in info.tensors:
        if weight.role == INPUT:
            inputs.append(_value(weight.name, TensorProto.FLOAT, list(weight.shape)))
        else:
            constants.append(_absent(weight))
    graph = helper.make_graph(b.nodes, kind, inputs, outputs, [*b.constants, *constants])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def _slots(model: ToyModel, layer: int) -> int:
    window = model.windows[layer]
    return model.capacity(layer) + model.chunk if window is None else window


def _weights(folder: Path, constants: Collection[str]) -> tuple[EngineWeight, ...]:
    found = []
    for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer:
        if tensor.external_data:
            place = {entry.key: entry.value for entry in tensor.external_data}
            stored = Stored(place["location"], int(place.get("offset", 0)), "F32", tuple(tensor.dims))
            role = CONSTANT if tensor.name in constants else INPUT
            found.append(EngineWeight(tensor.name, "F32", tuple(tensor.dims), role, stored))
    return tuple(found)


def _absent(weight: EngineWeight) -> onnx.TensorProto:
    """An initializer whose content is in no file."""
    tensor = TensorProto(name=weight.name, data_type=TensorProto.FLOAT, dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "none"), ("offset", 0), ("length", int(np.prod(weight.shape)) * 4)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _value(name: str, dtype: int, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _unsqueezed(b: GraphBuilder, value_BK: str) -> str:
    return b.node("Unsqueeze", value_BK, b.constant([1]))


def _last_in_slot(b: GraphBuilder, end_B1: str, slot_1S: str, slots: int) -> str:
    """[B, S]: the last position below `end` that lies in each slot, below 0 if there is none."""
    last_B1 = b.node("Sub", end_B1, b.constant(1))
    return b.node("Sub", last_B1, b.node("Mod", b.node("Sub", last_B1, slot_1S), b.constant(slots)))


def _fault(b: GraphBuilder, model: ToyModel, offset_BT: str, start_B1: str) -> str:
    """[B, 1, 1]: 0, or NaN where the bounds are not those of the step."""
    bounds = b.node("Cast", BOUNDS, to=TensorProto.INT64)
    most_new, most_keys = (b.node("Gather", bounds, b.constant([index])) for index in (0, 1))
    tokens_B1 = b.node("Add", b.node("Gather", offset_BT, b.constant([-1]), axis=1), b.constant(1))
    widest = max(window for window in model.windows if window is not None)
    keys_B1 = b.node("Add", b.node("Min", start_B1, b.constant(widest - 1)), tokens_B1)
    right_B1 = b.node("And", b.node("Equal", most_new, tokens_B1), b.node("GreaterOrEqual", most_keys, keys_B1))
    most_B1 = b.node("Add", b.constant(widest - 1), tokens_B1)
    right_B1 = b.node("And", right_B1, b.node("LessOrEqual", most_keys, most_B1))
    fault_B1 = b.node("Where", right_B1, b.constant(0.0, np.float32), b.constant(np.nan, np.float32))
    return b.node("Unsqueeze", fault_B1, b.constant([2]))


def open_steps(
    folder: Path, info: StepEngineInfo, memory: HostMemory | None = None, progress: Progress | None = None
) -> Opened:
    """A session of the engine on the CPU provider."""
    bundle = read_bundle(folder)
    memory = HostMemory() if memory is None else memory
    engine = OnnxRuntimeCudaEngine(bundle, info, step_files(folder, info), host_place(memory), progress=progress)
    return Opened(Session(bundle, engine), engine, memory)
