"""The models that the engines of ONNX graphs are checked with, and what `prepare` leaves of them in a folder.

FOLDER/onnxruntime/twins/NAME is the bundle of a tiny twin of a family, with an engine for each arithmetic, and
NAME-ARITHMETIC.npz beside it holds texts with their logits, computed on a CPU. FOLDER/onnxruntime/large/NAME is a
bundle of a published shape whose files of weights are their headers alone, and NAME.json says how long they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BACKEND = "onnxruntime-cuda"
FOLDER = "onnxruntime"
HEADER = ".header"
"""Behind the name of a file of weights whose content is made where it is needed."""
VOCABULARY, CONTEXT, ROWS = 128, 96, 3

_SIZES: dict[str, Any] = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 192}
_EXPERTS: dict[str, Any] = {**_SIZES, "architecture": "mixtral", "num_experts": 4, "top_k": 2}
_INT4: dict[str, Any] = {"options": {"copy": True, "weights": "int4"}}


@dataclass(frozen=True, slots=True)
class Twin:
    """settings: of `tests.support.bundles.exported`. window: of the layers that slide. chunk: of the export."""

    settings: Mapping[str, Any]
    window: int | None
    chunk: int
    arithmetic: tuple[str, ...] = ("bfloat16", "float16")


TWINS: dict[str, Twin] = {
    # The head dim of the published models, and a chunk that the window is no multiple of.
    "mistral": Twin({"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128}, window=20, chunk=8),
    "mistral-long-chunk": Twin(_SIZES, window=12, chunk=16),
    "nemo": Twin({**_SIZES, "hidden_size": 96, "head_dim": 32}, window=None, chunk=16),
    "no-window": Twin({**_SIZES, "num_kv_heads": 4, "tie": True}, window=None, chunk=8),
    "windows-by-layer": Twin(
        {**_SIZES, "architecture": "ministral", "num_layers": 3, "layer_windows": (12, None, 12)}, window=12, chunk=8
    ),
    # Short texts: routers of such small models are soon undecided.
    "mixtral": Twin(_EXPERTS, window=6, chunk=8),
    "mixtral-no-window": Twin(_EXPERTS, window=None, chunk=8),
    "mistral-int4": Twin({**_SIZES, **_INT4}, window=12, chunk=16, arithmetic=("float16",)),
    "mixtral-int4": Twin({**_EXPERTS, **_INT4}, window=6, chunk=8, arithmetic=("float16",)),
}
"""Nemo's heads together are wider than the hidden states. Scales of quantised weights are float16."""


@dataclass(frozen=True, slots=True)
class Large:
    """A published shape. config: a config.json. options: of `exporter.export`. target: share of the bandwidth."""

    config: Mapping[str, Any]
    options: Mapping[str, Any]
    arithmetic: str
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens and what their logits are. feeds: rows of token ids of each feed, with which the text begins anew.

    truth: float64 logits by the reference, [T, V] of each row, as far as a router is decided. transformers: those of
    transformers in float32. allowed: how far an engine of this arithmetic may be from either.
    """

    name: str
    feeds: list[list[list[int]]]
    truth: list[NDArray[np.floating]]
    transformers: list[NDArray[np.floating]]
    allowed: float


def text_file(folder: Path, name: str, arithmetic: str) -> Path:
    """Where `write_texts` puts those of a twin's engine."""
    return folder / f"{name}-{arithmetic}.npz"


def write_texts(path: Path, texts: Sequence[Text]) -> None:
    """As an .npz file. Truth is rounded to float32, by less than a thousandth of what half-width numbers may lose."""
    told = [{"name": t.name, "feeds": t.feeds, "allowed": t.allowed, "rows": len(t.truth)} for t in texts]
    arrays = {
        f"{kind}{index}.{row}": logits.astype(np.float32)
        for index, text in enumerate(texts)
        for kind, rows in (("truth", text.truth), ("other", text.transformers))
        for row, logits in enumerate(rows)
    }
    np.savez_compressed(path, told=np.array(json.dumps(told)), **arrays)  # type: ignore[arg-type]


def read_texts(path: Path) -> list[Text]:
    """What `write_texts` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return [
            Text(
                told["name"],
                told["feeds"],
                [file[f"truth{index}.{row}"] for row in range(told["rows"])],
                [file[f"other{index}.{row}"] for row in range(told["rows"])],
                told["allowed"],
            )
            for index, told in enumerate(json.loads(str(file["told"])))
        ]


def weight_bytes_of_a_token(config: Mapping[str, Any], bits: float) -> float:
    """Bytes of weights that a step of one token must read: not the embedding, and of the experts those chosen.

    bits: of a number in a large matrix, its share of the scale counted; routers have 16. Norms are left out.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = (config.get("head_dim") or hidden // heads) * (heads + config["num_key_value_heads"])
    chosen = config.get("num_experts_per_tok", 1)
    matrices = 2 * hidden * width + chosen * 3 * hidden * config["intermediate_size"]
    layers: int = config["num_hidden_layers"]
    routers: int = 2 * layers * hidden * config.get("num_local_experts", 0)
    return float(layers * matrices + hidden * config["vocab_size"]) * bits / 8 + routers


def kv_bytes_of_a_token(config: Mapping[str, Any], position: int) -> float:
    """Bytes of keys and values, 16 bits each, that the token at `position` sees in all layers."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    seen = min(position + 1, config["sliding_window"] or position + 1)
    return float(4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * seen)
