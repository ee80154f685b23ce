"""Engines of every published model's shrunken twin, and of what their architectures allow besides.

Each is held against the reference's truth and against transformers, at the borders of its windows and of the lengths
from which positions mean something else.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from exporter import export
from exporter.layer_parity import compare_layers
from runtime.errors import CierzoError
from tests.support.bundles import Exported, exported, shared_traces
from tests.support.parity import Judge, boundary_lengths, random_rows
from tests.support.twins import FIRST_LENGTH, PUBLISHED, make_twin, published, shrunk

CHUNK, CONTEXT = 5, 40
_ROOT = tempfile.TemporaryDirectory(prefix="cierzo-twins-")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False}

FEATURES: dict[str, dict[str, Any]] = {
    "llama, all biases, llama3 RoPE": {
        "architecture": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope": LLAMA3 | {"original_max_position_embeddings": 16},
    },
    "llama, dynamic RoPE": {
        "architecture": "llama",
        "rope": {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": CONTEXT,
    },
    "qwen3, biases, sliding and full layers": {
        "architecture": "qwen3",
        "attention_bias": True,
        "num_layers": 4,
        "layer_windows": [3, 3, None, 3],
    },
    "ministral3, window, yarn by mscale": {
        "architecture": "ministral3",
        "rope": YARN | {"original_max_position_embeddings": 7, "llama_4_scaling_beta": 0.3},
    },
    "phi3, gqa": {"architecture": "phi3", "rope_theta": 3e4},
}


def hold(case: Exported) -> None:
    """The engine at every border: of its windows, of what its positions mean, of its context; then ragged batches."""
    judge, session, config = Judge(case), case.session(), case.opened().config
    lengths = {1, CONTEXT, FIRST_LENGTH - 1, FIRST_LENGTH, FIRST_LENGTH + 1}
    for window in {window or 4 for window in config.layer_windows}:
        lengths.update(boundary_lengths(window, CHUNK))
    for length in sorted(lengths):
        judge.hold(session, random_rows([length], judge.vocab_size, seed=length), seed=length)
    for ragged in ([CONTEXT, 1, 2 * FIRST_LENGTH + 1], [3, 2 * FIRST_LENGTH, CHUNK]):
        judge.hold(session, random_rows(ragged, judge.vocab_size, seed=ragged[0]), seed=ragged[1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_twin_of_a_published_model(name: str) -> None:
    folder = Path(_ROOT.name) / name
    config = shrunk(published(name))
    old = config.get("transformers_version", "") < "5"
    twin = make_twin(folder / "checkpoint", config, old_names=old)
    with shared_traces():
        bundle = export(twin, folder / "bundle", chunk=CHUNK, context=_context(config), text_only=True)
    hold(Exported(twin, bundle))


def _context(config: dict[str, Any]) -> int | None:
    return None if config.get("sliding_window") is not None else CONTEXT


@pytest.mark.parametrize("name", FEATURES)
def test_what_an_architecture_allows_besides(name: str) -> None:
    hold(exported(chunk=CHUNK, context=CONTEXT, **FEATURES[name]))


@pytest.mark.parametrize("name", ["llama, all biases, llama3 RoPE", "qwen3, biases, sliding and full layers"])
def test_every_module_is_held_against_the_reference(name: str) -> None:
    """Biases and norms of heads are part of the modules that are compared."""
    case = exported(chunk=CHUNK, context=CONTEXT, **FEATURES[name])
    report = compare_layers(case.bundle, case.checkpoint)
    assert report.passed
    modules = {module.module for module in report.modules}
    assert ("layers.0.self_attn.q_norm" in modules) == name.startswith("qwen3")
    assert not report.missing


def test_dynamic_rope_ends_where_its_base_would_change() -> None:
    """Every layer slides, so that it is no buffer that ends there."""
    case = exported(chunk=4, rope={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=20)
    judge, session = Judge(case), case.session()
    assert case.opened().config.position_limit == 20
    rows = random_rows([20], judge.vocab_size, seed=1)
    judge.hold(session, rows, seed=2)
    with pytest.raises(CierzoError, match="20"):
        session.forward([[1]])
    with pytest.raises(CierzoError, match="up to position 20 only"):
        judge.truth_and_budget([[*rows[0], 1]])
