"""Engines of native checkpoints against transformers on the Hugging Face twin, and the bundles of both byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter import export
from tests.support.bundles import Exported, checkpoint, shared_traces
from tests.support.native import as_native
from tests.support.parity import Judge, boundary_lengths, random_rows

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0}
AS_PUBLISHED = {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}

# The fusions are proved where the Hugging Face twins are exported; they know nothing of layouts.
OPTIONS: dict[str, Any] = {"weights": "fp32", "copy": True, "context": 40, "prove": False}
TWINS: dict[str, tuple[int | None, tuple[int, ...], dict[str, Any]]] = {
    # name: window of the layers that slide, chunks, checkpoint
    "dense, odd window, gqa": (5, (3, 5), {}),
    "mixtral, bfloat16": (4, (4,), {"architecture": "mixtral", "window": 4, "dtype": "bfloat16"}),
    "ministral, windows by layer": (
        4,
        (3,),
        {"architecture": "ministral", "num_layers": 4, "layer_windows": [None, 4, 4, 4], "head_dim": 12},
    ),
    "ministral 3, yarn, scaled queries, tied": (
        None,
        (4,),
        {"architecture": "ministral3", "window": None, "rope": YARN | AS_PUBLISHED, "tie": True},
    ),
    "mixtral, yarn, tied": (6, (7,), {"architecture": "mixtral", "window": 6, "rope": YARN, "tie": True}),
}


@pytest.mark.parametrize("weights", ["stored", "fp32"])
@pytest.mark.parametrize("name", TWINS)
def test_a_native_checkpoint_against_transformers_on_its_twin(tmp_path: Path, name: str, weights: str) -> None:
    window, chunks, settings = TWINS[name]
    twin = checkpoint(**settings)
    native = as_native(twin, tmp_path / "native", shards=2)
    for chunk in chunks:
        with shared_traces():
            context = 40 if window is None or settings.get("layer_windows") else None
            bundle = export(
                native, tmp_path / f"bundle {chunk}", weights=weights, chunk=chunk, context=context, prove=False
            )
        case = Exported(twin, bundle)
        judge, session = Judge(case), case.session()
        lengths = boundary_lengths(window or 4, chunk)
        for length in lengths:
            judge.hold(session, random_rows([length], judge.vocab_size, seed=length), seed=chunk)
        session = case.session()
        judge.hold(session, random_rows(lengths[-3:], judge.vocab_size, seed=chunk), seed=1)


@pytest.mark.parametrize("name", TWINS)
def test_both_layouts_give_one_bundle(tmp_path: Path, name: str) -> None:
    """With converted weights every byte is the same, but for where they came from."""
    _, chunks, settings = TWINS[name]
    twin = checkpoint(**settings)
    sources = {"hf": twin, "native": as_native(twin, tmp_path / "native"), "both": as_native(twin, tmp_path / "both")}
    for file in twin.iterdir():
        (sources["both"] / file.name).symlink_to(file)
    bundles = {}
    with shared_traces():
        for key, source in sources.items():
            layout = "native" if key == "both" else None
            out = tmp_path / f"bundle of {key}"
            bundles[key] = export(source, out, layout=layout, chunk=chunks[0], **OPTIONS)
    ours, *others = bundles.values()
    names = sorted(file.name for file in ours.iterdir())
    assert {"manifest.json", "model.onnx", "weights.safetensors"} <= set(names)
    for other in others:
        assert sorted(file.name for file in other.iterdir()) == names
        for file_name in set(names) - {"manifest.json"}:
            assert (ours / file_name).read_bytes() == (other / file_name).read_bytes(), file_name
        manifests = [json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in (ours, other)]
        layouts = [manifest.pop("provenance")["layout"] for manifest in manifests]
        assert layouts == ["huggingface", "native"]
        assert manifests[0] == manifests[1]
