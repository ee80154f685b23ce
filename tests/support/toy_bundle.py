"""A tiny hand-made bundle with the graph contract of a real one, and a numpy oracle that knows nothing of rings.

The model: embedding, then layers of grouped-query attention with a residual, then the LM head. In place of RoPE each
score loses 0.05 for every position of distance (ALiBi), so that a wrong position of a slot shows in the logits.

Letters: B batch, T tokens, N of them whose logits are asked for, S slots, H heads, G KV heads, R = H / G, D head dim,
M hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

Float64Array = NDArray[np.float64]
SLOPE = 0.05
TOLERANCE = 2e-5
"""Between an engine's logits and the oracle's: of the order of 10, in float32."""


@dataclass(frozen=True, slots=True)
class ToyModel:
    """Sizes and seeded weights. windows: one entry per layer, None for full attention over `context` tokens."""

    windows: tuple[int | None, ...] = (4,)
    chunk: int = 3
    context: int | None = None
    max_batch: int = 4
    vocab_size: int = 37
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 3
    hidden_size: int = 10
    seed: int = 0
    eos_token_ids: tuple[int, ...] = (2,)
    position_limit: int | None = None
    weights: dict[str, NDArray[np.float32]] = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        shapes = {"embed": (self.vocab_size, self.hidden_size), "lm_head": (self.hidden_size, self.vocab_size)}
        for layer in range(len(self.windows)):
            shapes[f"{layer}.q"] = (self.hidden_size, self.num_heads * self.head_dim)
            shapes[f"{layer}.k"] = (self.hidden_size, self.num_kv_heads * self.head_dim)
            shapes[f"{layer}.v"] = (self.hidden_size, self.num_kv_heads * self.head_dim)
            shapes[f"{layer}.o"] = (self.num_heads * self.head_dim, self.hidden_size)
        weights = {
            name: (random.normal(0, 1, shape) / (1 if name == "embed" else np.sqrt(shape[0]))).astype(np.float32)
            for name, shape in shapes.items()
        }
        object.__setattr__(self, "weights", weights)

    def capacity(self, layer: int) -> int:
        """S of a layer: W + C - 1, or the context."""
        window = self.windows[layer]
        if window is None:
            assert self.context is not None
            return self.context
        return window + self.chunk - 1

    def oracle(self, token_ids: list[int]) -> Float64Array:
        """Logits [T, V] of one whole text in float64, full context, no cache."""
        weights = {name: array.astype(np.float64) for name, array in self.weights.items()}
        H, G, D, T = self.num_heads, self.num_kv_heads, self.head_dim, len(token_ids)
        hidden_TM = weights["embed"][token_ids]
        distance_TT = np.arange(T)[:, None] - np.arange(T)[None, :]
        for layer, window in enumerate(self.windows):
            query_HTD = (hidden_TM @ weights[f"{layer}.q"]).reshape(T, H, D).transpose(1, 0, 2)
            key_HTD, value_HTD = (
                (hidden_TM @ weights[f"{layer}.{name}"]).reshape(T, G, D).transpose(1, 0, 2).repeat(H // G, axis=0)
                for name in "kv"
            )
            scores_HTT = query_HTD @ key_HTD.transpose(0, 2, 1) / np.sqrt(D) - SLOPE * distance_TT
            visible_TT = (distance_TT >= 0) & (distance_TT < (T if window is None else window))
            scores_HTT = np.where(visible_TT, scores_HTT, -np.inf)
            probabilities_HTT = np.exp(scores_HTT - scores_HTT.max(-1, keepdims=True))
            probabilities_HTT /= probabilities_HTT.sum(-1, keepdims=True)
            attended_TM = (probabilities_HTT @ value_HTD).transpose(1, 0, 2).reshape(T, H * D)
            hidden_TM = hidden_TM + attended_TM @ weights[f"{layer}.o"]
        return np.asarray(hidden_TM @ weights["lm_head"], dtype=np.float64)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The oracle's greedy continuation, `count` tokens or up to the end of the text."""
        text = list(prompt)
        while len(text) < len(prompt) + count:
            text.append(int(self.oracle(text)[-1].argmax()))
            if text[-1] in self.eos_token_ids:
                break
        return text[len(prompt) :]


def write_toy_bundle(folder: Path, model: ToyModel | None = None, tokenizer: dict[str, str] | None = None) -> Path:
    """Write a bundle into `folder` and return it. tokenizer: file name -> text of the tokenizer files."""
    model = ToyModel() if model is None else model
    folder.mkdir(parents=True, exist_ok=True)
    proto = _graph(model)
    for tensor in proto.graph.initializer:
        if tensor.name in model.weights:  # shape inference needs the small constants in the file itself
            set_external_data(tensor, "weights.bin")
    onnx.save_model(proto, folder / "model.onnx")
    for name, text in (tokenizer or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    write_manifest(folder, toy_manifest(folder, model, list(tokenizer or {})))
    return folder


def toy_manifest(folder: Path, model: ToyModel, tokenizer: list[str]) -> dict[str, Any]:
    """The manifest of the files in `folder`, as a mapping that a test may damage."""
    return {
        "schema_version": 3,
        "cierzo_version": "0.1.0",
        "model": {
            "architecture": "mistral", "num_layers": len(model.windows), "hidden_size": model.hidden_size,
            "num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim,
            "vocab_size": model.vocab_size, "max_position_embeddings": 4096, "bos_token_id": 1,
            "eos_token_ids": list(model.eos_token_ids),
            "parameters": sum(array.size for array in model.weights.values()),
        },
        "graph": {
            "file": "model.onnx", "opset": 24, "input_ids": "input_ids", "start_positions": "start_positions",
            "token_counts": "token_counts", "logit_positions": "logit_positions", "logits": "logits",
        },
        "kv": {
            "dtype": "float32", "chunk": model.chunk, "max_batch": model.max_batch, "context": model.context,
            "position_limit": model.position_limit,
            "layers": [
                {
                    "window": window, "capacity": model.capacity(layer),
                    "past_key": f"past.{layer}.key", "past_value": f"past.{layer}.value",
                    "present_key": f"present.{layer}.key", "present_value": f"present.{layer}.value",
                }
                for layer, window in enumerate(model.windows)
            ],
        },
        "weights": {
            "kind": "fp32", "quantization": None, "arithmetic": "float32", "placement": "copied", "folder": None,
            "types": {"F32": len(model.weights)},
            "folded_bytes": 0, "folding_bytes": 0, "made_bytes": 0, "making_bytes": 0,
            "files": {"weights.bin": _entry(folder / "weights.bin")},
        },
        "tokenizer": tokenizer,
        "files": {name: _entry(folder / name) for name in ("model.onnx", *tokenizer)},
        "provenance": {"checkpoint": "toy", "versions": {}, "options": {}},
        "fusion": {},
    }  # fmt: skip


def _entry(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "blocks_sha256": None}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` into `folder`."""
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


class GraphBuilder:
    """Collects nodes and constants; every method returns the name of the value that it makes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def weight(self, name: str, array: NDArray[np.float32]) -> str:
        self.constants.append(numpy_helper.from_array(array, name))
        return name


def _graph(model: ToyModel) -> onnx.ModelProto:
    b = GraphBuilder()
    H, G, D = model.num_heads, model.num_kv_heads, model.head_dim
    R = H // G
    one, zero = b.constant(1), b.constant(0)
    tokens = b.node("Gather", b.node("Shape", "input_ids"), one)
    offsets_1T = b.node("Unsqueeze", b.node("Range", zero, tokens, one), b.constant([0]))
    start_B1 = b.node("Unsqueeze", "start_positions", b.constant([1]))
    count_B1 = b.node("Unsqueeze", "token_counts", b.constant([1]))
    position_BT = b.node("Add", start_B1, offsets_1T)
    valid_B1T1 = b.node("Unsqueeze", b.node("Less", offsets_1T, count_B1), b.constant([1, 3]))
    last_B1 = b.node("Sub", b.node("Add", start_B1, count_B1), one)
    hidden_BTM = b.node("Gather", b.weight("embed", model.weights["embed"]), "input_ids")
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"]),
        helper.make_tensor_value_info("start_positions", TensorProto.INT64, ["B"]),
        helper.make_tensor_value_info("token_counts", TensorProto.INT64, ["B"]),
        helper.make_tensor_value_info("logit_positions", TensorProto.INT64, ["B", "N"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "N", model.vocab_size])]

    def projected(name: str, groups: int) -> str:
        """[B, T, M] -> [B, groups, T, D]"""
        flat = b.node("MatMul", hidden_BTM, b.weight(name, model.weights[name]))
        return b.node("Transpose", b.node("Reshape", flat, b.constant([0, 0, groups, D])), perm=[0, 2, 1, 3])

    for layer, window in enumerate(model.windows):
        S = model.capacity(layer)
        slots = b.constant(S)
        slot_B1T1 = b.node("Unsqueeze", b.node("Mod", position_BT, slots), b.constant([1, 3]))
        # Slot j holds position last - ((last - j) mod S); Mod takes the sign of the divisor, as Python does.
        back_BS = b.node("Mod", b.node("Sub", last_B1, b.constant(np.arange(S)[None])), slots)
        held_B1S = b.node("Unsqueeze", b.node("Sub", last_B1, back_BS), b.constant([1]))
        distance_BTS = b.node("Sub", b.node("Unsqueeze", position_BT, b.constant([2])), held_B1S)
        visible = b.node("And", b.node("GreaterOrEqual", distance_BTS, zero), b.node("GreaterOrEqual", held_B1S, zero))
        if window is not None:
            visible = b.node("And", visible, b.node("Less", distance_BTS, b.constant(window)))
        rings = {}
        for kind, name in (("k", "key"), ("v", "value")):
            past, present = f"past.{layer}.{name}", f"present.{layer}.{name}"
            new_BGTD = projected(f"{layer}.{kind}", G)
            index_BGTD = b.node("Expand", slot_B1T1, b.node("Shape", new_BGTD))
            # Padding must not write, so it writes back what its slot holds.
            old_BGTD = b.node("GatherElements", past, index_BGTD, axis=2)
            update_BGTD = b.node("Where", valid_B1T1, new_BGTD, old_BGTD)
            b.node("ScatterElements", past, index_BGTD, update_BGTD, axis=2, output=present)
            rings[kind] = b.node("Unsqueeze", present, b.constant([2]))  # [B, G, 1, S, D]
            inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, ["B", G, S, D]))
            outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT, ["B", G, S, D]))
        query_BHTD = projected(f"{layer}.q", H)
        query_BGRTD = b.node("Reshape", query_BHTD, b.constant([0, G, R, -1, D]))
        scores = b.node("MatMul", query_BGRTD, b.node("Transpose", rings["k"], perm=[0, 1, 2, 4, 3]))
        scores = b.node("Mul", scores, b.constant(1 / np.sqrt(D), np.float32))
        bias_BTS = b.node("Mul", b.node("Cast", distance_BTS, to=TensorProto.FLOAT), b.constant(SLOPE, np.float32))
        scores = b.node("Sub", scores, b.node("Unsqueeze", bias_BTS, b.constant([1, 2])))
        # Finite, so that the query of a padding position, which sees nothing, does not divide zero by zero.
        hidden = b.constant(-1e9, np.float32)
        scores = b.node("Where", b.node("Unsqueeze", visible, b.constant([1, 2])), scores, hidden)
        attended_BGRTD = b.node("MatMul", b.node("Softmax", scores, axis=-1), rings["v"])
        attended_BHTD = b.node("Reshape", attended_BGRTD, b.constant([0, H, -1, D]))
        flat = b.node("Reshape", b.node("Transpose", attended_BHTD, perm=[0, 2, 1, 3]), b.constant([0, 0, H * D]))
        output_BTM = b.node("MatMul", flat, b.weight(f"{layer}.o", model.weights[f"{layer}.o"]))
        hidden_BTM = b.node("Add", hidden_BTM, output_BTM)
    position_BN1 = b.node("Unsqueeze", "logit_positions", b.constant([2]))
    asked_for_BNM = b.node("GatherND", hidden_BTM, position_BN1, batch_dims=1)
    b.node("MatMul", asked_for_BNM, b.weight("lm_head", model.weights["lm_head"]), output="logits")
    graph = helper.make_graph(b.nodes, "toy", inputs, outputs, b.constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(proto, full_check=True)
    return proto
