"""Engines of tiny models on the GPU at hand, against logits that a CPU computed in float64 when they were made.

What a machine lacks is said: the bundles, a library, or a GPU that the library supports. Where a library does not
support the GPU it is tried once all the same, and what it answers is kept word by word.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle import Bundle, read_bundle
from runtime.engine_info import ENGINES_FOLDER
from runtime.errors import BackendError
from runtime.loading import load
from runtime.session import Session
from runtime.tensorrt.flavor import Flavor
from tests.gpu.findings import Notebook, told
from tests.gpu.plugin_checks import installed_flavors

ROOT = Path(__file__).resolve().parents[2]
BACKEND = "tensorrt"
REFERENCE = ".npz"
_NEW_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Reference:
    """What a model's logits are. feeds: rows of token ids of each feed. truth: float64 [T, V] of each row.

    allowed: how far an engine may be away from it that computes in `arithmetic`.
    """

    arithmetic: str
    feeds: list[list[list[int]]]
    allowed: float
    truth: list[np.ndarray[Any, Any]]


def write_reference(path: Path, reference: Reference) -> None:
    """As an .npz file."""
    told = {"arithmetic": reference.arithmetic, "feeds": reference.feeds, "allowed": reference.allowed}
    rows = {f"row{index}": row for index, row in enumerate(reference.truth)}
    np.savez_compressed(path, told=np.array(json.dumps(told)), **rows)  # type: ignore[arg-type]


def read_reference(path: Path) -> Reference:
    """What `write_reference` wrote."""
    with np.load(path, allow_pickle=False) as file:
        told = json.loads(str(file["told"]))
        rows = [file[f"row{index}"] for index in range(len(file.files) - 1)]
    return Reference(told["arithmetic"], told["feeds"], told["allowed"], rows)


def check_engines(book: Notebook, folder: Path | None, compute_capability: tuple[int, int]) -> None:
    """Every bundle in the folder, with every library that is installed."""
    flavors = installed_flavors(book)
    if not flavors:
        return
    if folder is None:
        book.skip("all of it", "no bundles were given (--bundle); `python -m tests.gpu.prepare FOLDER` makes them")
        return
    capability = ".".join(map(str, compute_capability))
    bundles = sorted(path.with_suffix("") for path in folder.glob(f"*{REFERENCE}"))
    if not bundles:
        book.skip("all of it", f"{folder} holds no bundle with an {REFERENCE} file beside it")
    for flavor in flavors:
        if not flavor.runs_on(capability):
            _try_all_the_same(book, flavor, capability, bundles)
            continue
        for path in bundles:
            book.attempt(
                f"{flavor.name}: {path.name}",
                partial(_check_bundle, book, flavor, path, capability),
            )


def _check_bundle(book: Notebook, flavor: Flavor, path: Path, capability: str) -> None:
    reference = read_reference(path.with_suffix(REFERENCE))
    fitting = _engines(read_bundle(path), flavor, capability)
    if not fitting:
        built = _built(book, flavor, path)
        fitting = [] if built is None else [built]
    for name in fitting:
        book.check(f"{path.name}: {name}", partial(check_engine, path, name, reference))


def _engines(bundle: Bundle, flavor: Flavor, capability: str) -> list[str]:
    """Names of the bundle's engines for this library and GPU."""
    from runtime.tensorrt.engine_choice import read_engine

    found = [read_engine(bundle, name) for name in bundle.manifest.engines]
    wanted = (flavor.name, flavor.version, capability)
    return [info.name for info in found if (info.flavor, info.version, info.compute_capability) == wanted]


def _built(book: Notebook, flavor: Flavor, path: Path) -> str | None:
    """The name of an engine that was built here, if one can be."""
    try:
        from exporter.build.build import build
    except Exception as error:  # whatever it needs may be there in another version
        book.skip(f"{flavor.name}: building {path.name}", f"the exporter does not load here: {told(error)}")
        return None
    try:
        return build(path, flavor=flavor.name).folder.name
    except BackendError as error:
        book.skip(f"{flavor.name}: building {path.name}", str(error))
        return None


def check_engine(path: Path, name: str, reference: Reference) -> float:
    """Prefill, chunks and single tokens within the budget, then a generation; returns the share of the budget."""
    session = load(path, backend=BACKEND, engine=name)
    worst = check_logits(session, reference)
    check_generation(session, reference)
    return worst


def check_logits(session: Session, reference: Reference) -> float:
    """All of the reference's feeds. Returns the largest error as a share of what is allowed."""
    session.reset()
    pieces: list[list[np.ndarray[Any, Any]]] = [[] for _ in reference.truth]
    for rows in reference.feeds:
        logits_BTV = session.forward(rows)
        for index, row in enumerate(rows):
            pieces[index].append(logits_BTV[index, : len(row)].copy())
    worst = 0.0
    for truth, own in zip(reference.truth, pieces, strict=True):
        logits = np.concatenate(own)
        assert logits.shape == truth.shape
        assert np.isfinite(logits).all(), "a logit is not finite"
        worst = max(worst, float(np.abs(logits - truth).max()) / reference.allowed)
    return worst


def check_generation(session: Session, reference: Reference) -> None:
    """Greedy tokens, chosen on the device, are the session's own highest logits, up to what rounding decides."""
    prompt = [token for feed in reference.feeds for token in feed[0]]
    session.reset()
    chosen = list(session.generate(prompt, max_new_tokens=_NEW_TOKENS, temperature=0.0, stop_ids=()))
    session.reset()
    logits_TV = session.forward([[*prompt, *chosen]])[0].copy()
    for offset, token in enumerate(chosen):
        row = logits_TV[len(prompt) - 1 + offset]
        short = float(row.max() - row[token])
        assert short <= 2 * reference.allowed, f"token {offset} is {token}, {short} below the highest logit"


# -- a library on a GPU that it does not support --


def _try_all_the_same(book: Notebook, flavor: Flavor, capability: str, bundles: Sequence[Path]) -> None:
    """Whether it loads a plan that it built for another GPU: it is not expected to, and what it says is the finding."""
    reason = f"{flavor.name} {flavor.version} supports compute capability {', '.join(flavor.runs_on_all)}"
    book.skip(f"{flavor.name}: engines", f"{reason}, and this GPU has {capability}")
    plans = sorted(plan for path in bundles for plan in (path / ENGINES_FOLDER).glob(f"{flavor.name}-*/decode.plan"))
    if not plans:
        book.skip(f"{flavor.name}: loading one all the same", "the bundles hold no plan of it")
    for plan in plans[:2]:  # one with plugins and one without
        name = f"{flavor.name} on {capability}, given {plan.parent.parent.parent.name}'s {plan.parent.name}"
        book.fact(name, try_plan(flavor.name, plan))


def try_plan(flavor: str, plan: Path) -> str:
    """What becomes of loading a plan, in a process of its own, since the library may end it."""
    command = [sys.executable, "-m", "tests.gpu.try_plan", flavor, str(plan)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return "it did not come to an end in 60 s"
    said = " ".join(f"{done.stdout} {done.stderr}".split())[-3000:]
    return said if done.returncode == 0 else f"its process ended with {done.returncode}: {said}"
