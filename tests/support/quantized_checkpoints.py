"""Tiny quantised checkpoints in the published layouts, each with the plain checkpoint of the same function beside it.

The packing is written from the descriptions of the formats, number by number on unsigned 32-bit words, and shares
nothing with the code under test. The twin holds scale * (q - zero), computed in float64 and stored in float32, which is
exact for scales of 16 bits: its logits by transformers are the truth for the quantised one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import make_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a checkpoint is quantised. group: columns, -1 for whole rows. scales: torch's name of their type.

    index: "stored" (in the order of the columns), "unset" (all -1), "scattered", or None for what files of the layout
        usually have: GPTQ's the first, the others no such tensor.
    early: zero points as int8, as compressed-tensors wrote them at first.
    """

    layout: str
    bits: int = 4
    group: int = 32
    symmetric: bool = False
    scales: str = "float16"
    index: str | None = None
    early: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """A quantised checkpoint, and the plain one that computes the same. q: what each layer's weight was made of."""

    packed: Path
    plain: Path
    q: Mapping[str, tuple[Numbers, NDArray[np.float64], Numbers]]


def is_linear(name: str) -> bool:
    """The layers that quantisers usually take: all projections, but neither the head nor a router."""
    return "_proj.weight" in name or ".experts." in name


def make_quantized(
    folder: Path, kind: Kind, *, takes: Callable[[str], bool] = is_linear, seed: int = 0, **options: Any
) -> Made:
    """Write `folder`/packed and `folder`/plain. options: of `make_checkpoint`. takes: which 2-D weights, by name."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2}
    return quantize_folder(make_checkpoint(folder / "plain", **(sizes | options), seed=seed), kind, takes, seed)


def quantize_folder(plain: Path, kind: Kind, takes: Callable[[str], bool] = is_linear, seed: int = 0) -> Made:
    """As `make_quantized`, of a checkpoint that is there: `plain` gets the rounded values, its neighbour is packed."""
    packed = plain.with_name("packed")
    shutil.copytree(plain, packed)
    tensors = load_file(plain / "model.safetensors")
    made, stored, dense = {}, {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not takes(name):
            stored[name] = dense[name] = tensor
            continue
        module = name.removesuffix(".weight")
        q, scale, zero = quantize(tensor.double().numpy(), kind)
        index = column_groups(kind, q.shape[1], seed)
        wide = np.take(scale, index, axis=1) * (q - np.take(zero, index, axis=1))
        made[module] = (q, scale, zero)
        dense[name] = torch.from_numpy(wide).float()
        stored |= {f"{module}.{part}": value for part, value in pack(kind, q, scale, zero, index).items()}
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file({name: tensor.clone() for name, tensor in dense.items()}, plain / "model.safetensors", {"format": "pt"})
    edit_config(packed, quantization_config=quantization_config(kind))
    return Made(packed, plain, made)


def quantize(weight_NK: NDArray[np.float64], kind: Kind) -> tuple[Numbers, NDArray[np.float64], Numbers]:
    """Round to nearest: q [N, K] and zero [N, G] unsigned, scale [N, G] in values that the type of `kind` holds."""
    rows, columns = weight_NK.shape
    group = columns if kind.group == -1 else kind.group
    groups = -(-columns // group)
    padded = np.zeros((rows, groups * group))
    padded[:, :columns] = weight_NK
    blocks = padded.reshape(rows, groups, group)
    top = (1 << kind.bits) - 1
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    span = 2 * np.maximum(-low, high) if kind.symmetric else high - low
    scale = torch.from_numpy(span / top + 1e-4).to(getattr(torch, kind.scales)).double().numpy()
    # From 1 on, since GPTQ's first format cannot store a zero point of 0.
    zero = np.full(scale.shape, (top + 1) // 2) if kind.symmetric else np.clip(np.rint(-low / scale), 1, top)
    q = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, top)
    return q.reshape(rows, -1)[:, :columns].astype(np.int64), scale, zero.astype(np.int64)


def column_groups(kind: Kind, columns: int, seed: int) -> Numbers:
    """The group of each column."""
    group = columns if kind.group == -1 else kind.group
    index = np.arange(columns) // group
    return np.random.default_rng(seed).permutation(index) if kind.index == "scattered" else index


def pack(kind: Kind, q: Numbers, scale: NDArray[np.float64], zero: Numbers, index: Numbers) -> dict[str, torch.Tensor]:
    """The tensors of one layer, by the last part of their names."""
    bits, half = kind.bits, 1 << (kind.bits - 1)
    scales = torch.from_numpy(scale).to(getattr(torch, kind.scales))
    order = torch.from_numpy(np.full_like(index, -1) if kind.index == "unset" else index).to(torch.int32)
    if kind.layout in ("gptq", "gptq_v2"):
        stored_zero = zero - 1 if kind.layout == "gptq" else zero
        made = {
            "qweight": words(q.T, bits, axis=0),
            "qzeros": words(stored_zero.T, bits, axis=1),
            "scales": scales.T.contiguous(),
        }
        return made | {"g_idx": order}
    if kind.layout == "awq":
        return {
            "qweight": words(q.T, bits, axis=1, order=AWQ_ORDER),
            "qzeros": words(zero.T, bits, axis=1, order=AWQ_ORDER),
            "scales": scales.T.contiguous(),
        }
    made = {"weight_scale": scales}
    signed_zero = torch.from_numpy(zero - half).to(torch.int8)
    if kind.layout == "pack-quantized":
        made["weight_packed"] = words(q, bits, axis=1)
        made["weight_shape"] = torch.tensor(q.shape)
        if not kind.symmetric:
            made["weight_zero_point"] = signed_zero if kind.early else words(zero, bits, axis=0)
    else:
        made["weight"] = torch.from_numpy(q - half).to(torch.int8)
        if not kind.symmetric:
            made["weight_zero_point"] = signed_zero
    return made | ({"weight_g_idx": order} if kind.index is not None else {})


def words(numbers: Numbers, bits: int, *, axis: int, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> torch.Tensor:
    """Numbers packed along `axis` into words of 32 bits; slot i of a word holds its number order[i]."""
    lines = np.moveaxis(numbers, axis, 1)
    each = 32 // bits
    count = -(-lines.shape[1] // each)
    slots = np.zeros((lines.shape[0], count * each), np.uint32)
    slots[:, : lines.shape[1]] = lines
    packed = np.zeros((lines.shape[0], count), np.uint32)
    for slot in range(each):
        number = order[slot] if bits == 4 else slot
        packed |= slots[:, number::each] << np.uint32(bits * slot)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, 1, axis)).view(np.int32))


def quantization_config(kind: Kind) -> dict[str, Any]:
    """The entry of config.json, as the tools write it."""
    if kind.layout in ("gptq", "gptq_v2"):
        return {
            "bits": kind.bits,
            "checkpoint_format": kind.layout,
            "damp_percent": 0.01,
            "desc_act": kind.index == "scattered",
            "group_size": kind.group,
            "lm_head": False,
            "meta": {"quantizer": ["gptqmodel:2.0.0"]},
            "pack_dtype": "int32",
            "quant_method": "gptq",
            "sym": kind.symmetric,
            "true_sequential": True,
        }
    if kind.layout == "awq":
        return {
            "bits": kind.bits,
            "group_size": kind.group,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        }
    weights: dict[str, Any] = {
        "actorder": {"scattered": "group", "stored": "group", "unset": None}.get(kind.index or "", "weight"),
        "block_structure": None,
        "dynamic": False,
        "group_size": None if kind.group == -1 else kind.group,
        "num_bits": kind.bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "channel" if kind.group == -1 else "group",
        "symmetric": kind.symmetric,
        "type": "int",
    }
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": kind.layout,
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head", "re:.*block_sparse_moe.gate$"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def edit_config(folder: Path, **changes: Any) -> None:
    """Change top-level keys of a folder's config.json; None takes one out."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")


def edit_quantization(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of its quantization_config; "config_groups.group_0.weights.num_bits" is a path."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for path, value in changes.items():
        *outer, last = path.split(".")
        place = config["quantization_config"]
        for part in outer:
            place = place[part]
        place[last] = value
    file.write_text(json.dumps(config), encoding="utf-8")


def edit_tensors(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Replace, add and (with None) delete tensors of its one file."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, file, metadata={"format": "pt"})
