"""Makes the bundles that the engine checks need, on a machine without a GPU: `python -m tests.gpu.prepare FOLDER`.

For TensorRT each model is a tiny twin of a family: FOLDER/NAME is its bundle, with engines for the compute capabilities
asked for where a library builds those here, and FOLDER/NAME.npz holds token ids and their logits by the reference in
float64. All together are some 40 megabytes, most of them engines', to be carried to a machine with a GPU. What is made
for onnxruntime-cuda lies in FOLDER/onnxruntime (ort_models.py), in some 16 megabytes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.build.build import build
from runtime.errors import BackendError
from tests.gpu.engine_checks import BACKEND as TENSORRT
from tests.gpu.engine_checks import REFERENCE, Reference, write_reference
from tests.gpu.ort_models import BACKEND as ONNXRUNTIME
from tests.gpu.ort_prepare import prepare_onnxruntime
from tests.support.bundles import Exported, exported
from tests.support.parity import Judge, random_rows, uneven_feeds

BACKENDS = (TENSORRT, ONNXRUNTIME)
CHUNK, CONTEXT, SINGLE_TOKENS = 16, 256, 14
LENGTHS, _TEXTS = (40, 25), 6
"""Tokens of the two rows before their last ones come one by one; windows are shorter."""
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"window": 20, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96},
    "nemo": {"window": None, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
    "mixtral": {"architecture": "mixtral", "window": 20, "hidden_size": 64, "num_experts": 4, "top_k": 2},
}
"""By name: Mistral with a window, Nemo's heads that together are wider than the hidden states, and experts."""


def prepare(folder: Path, capabilities: Sequence[str], models: Sequence[str] = tuple(MODELS)) -> None:
    """Make the bundles of `models` in `folder`, whose like are replaced, with engines with and without plugins."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in models:
        settings = {"vocab_size": 512, "dtype": "bfloat16", **MODELS[name]}
        case = exported(chunk=CHUNK, context=CONTEXT, max_batch=2, options={"copy": True}, **settings)
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(case.bundle, folder / name)
        # Of some texts those on which rounding decides least: a router's near-tie would widen the budget by far.
        reference = min((reference_of(case, seed=seed) for seed in range(_TEXTS)), key=lambda made: made.allowed)
        write_reference(folder / f"{name}{REFERENCE}", reference)
        for capability in capabilities:
            for plugins in ("all", "none"):
                print(f"{name}: {_engine(folder / name, capability, plugins)}", flush=True)


def reference_of(case: Exported, arithmetic: str = "bfloat16", seed: int = 0) -> Reference:
    """Two rows, fed in uneven pieces and then token by token, and their logits in float64."""
    judge = Judge(case, arithmetic=arithmetic)
    begun = random_rows(LENGTHS, judge.vocab_size, seed)
    ends = random_rows((SINGLE_TOKENS,) * len(begun), judge.vocab_size, seed + 1)
    feeds = [*uneven_feeds(begun, seed), *([[row[t]] for row in ends] for t in range(SINGLE_TOKENS))]
    truth, budget = judge.truth_and_budget([row + end for row, end in zip(begun, ends, strict=True)])
    return Reference(arithmetic, feeds, budget.allowed, list(truth))


def _engine(bundle: Path, capability: str, plugins: str) -> str:
    try:
        return build(bundle, compute_capability=capability, plugins=plugins).folder.name
    except BackendError as error:
        return f"no engine for {capability}, plugins {plugins}: {error}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.prepare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    help_text = "of GPUs to build engines for; several may be given"
    parser.add_argument("--compute-capability", action="append", default=None, metavar="8.9", help=help_text)
    help_text = "to make; several may be given, and all are by default"
    parser.add_argument("--model", action="append", default=None, choices=tuple(MODELS), help=help_text)
    help_text = "whose engines are made; several may be given, and all are by default"
    parser.add_argument("--backend", action="append", default=None, choices=BACKENDS, help=help_text)
    given = parser.parse_args(arguments)
    backends = given.backend or BACKENDS
    if TENSORRT in backends:
        prepare(given.folder, given.compute_capability or ["8.9"], given.model or tuple(MODELS))
    if ONNXRUNTIME in backends:
        prepare_onnxruntime(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
