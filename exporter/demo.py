"""The main job on real input: two small trained checkpoints, from their folders to text and a parity verdict.

Nothing is downloaded and nothing is trained; `exporter/demo_data/train.py` made the checkpoints.
"""

from __future__ import annotations

import contextlib
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter import export
from exporter.demo_data import HELDOUT_FILE, demo_checkpoint
from exporter.inspect import inspect_path
from exporter.inspect import render as render_inspection
from exporter.validate import ValidationReport, validate
from exporter.validate import render as render_validation
from reference.parity import perplexity
from runtime import load
from runtime.errors import ExportError, ParityError
from runtime.generate import generate_text
from runtime.session import Session

if TYPE_CHECKING:
    from rich.console import Console

PROMPT = "One windy morning,"
WINDOWS_AHEAD = 20
"""The generated text is this many windows long."""

SEED = 7

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the summary says of one model."""

    name: str
    window: int
    tokens: int
    tokens_per_second: float
    kv_bytes: int
    perplexity: float
    report: ValidationReport


def run_demo(
    console: Console, *, models: Sequence[str], keep: Path | None = None, progress: Progress | None = None
) -> None:
    """inspect → export → generate far past the window → validate for each of `models` ("mistral", "mixtral").

    keep: a folder that shall hold the bundles; None throws them away. Raises ParityError when a validation fails,
    and whatever the stages raise.
    """
    with _place(keep) as folder:
        outcomes = [_one(console, name, folder / name, progress) for name in models]
    _summary(console, outcomes)
    if keep is not None:
        console.print(f'The bundles are in {keep}. Try: cierzo generate {keep / models[0]} "{PROMPT}"')
    failed = [outcome.name for outcome in outcomes if not outcome.report.passed]
    if failed:
        raise ParityError(f"The engine of {', '.join(failed)} does not agree with the reference; see the table above.")


@contextlib.contextmanager
def _place(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="cierzo-demo-") as folder:
            yield Path(folder)
        return
    if keep.exists() and any(keep.iterdir()):
        raise ExportError(f"{keep} is not empty. Choose another folder for --keep, or remove it first.")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


def _one(console: Console, name: str, bundle: Path, progress: Progress | None) -> _Outcome:
    checkpoint = demo_checkpoint(name)
    console.rule(f"[bold]{name}", align="left")
    console.print(f"[bold]inspect[/] the checkpoint {name}")
    render_inspection(inspect_path(checkpoint), console)

    began = time.perf_counter()
    export(checkpoint, bundle, progress=progress)
    size = sum(file.stat().st_size for file in bundle.iterdir() if file.suffix != ".safetensors")
    seconds = time.perf_counter() - began
    console.print(
        f"\n[bold]export[/]: {size / 1e6:.1f} MB beside the weights in {seconds:.1f} s, every fusion proved\n"
    )

    session = load(bundle)
    window = min(layer.window for layer in session.manifest.kv.layers if layer.window is not None)
    tokens = WINDOWS_AHEAD * window
    text, rate = _generate(session, tokens)
    console.print(f"[bold]generate[/] {tokens} tokens over a window of {window}:\n")
    console.print(textwrap.indent(_both_ends(text), "    "), markup=False, highlight=False)
    measured = _heldout_perplexity(session)
    console.print(
        f"\n{rate:,.0f} tokens/s; {session.kv_bytes:,} bytes of KV throughout; perplexity {measured:.2f} on unseen "
        f"stories (a model that knows nothing: {session.manifest.model.vocab_size})\n"
    )

    console.print("[bold]validate[/] the engine against the reference in float64")
    report = validate(bundle, progress=progress)
    render_validation(report, console)
    console.print()
    return _Outcome(name, window, tokens, rate, session.kv_bytes, measured, report)


def _generate(session: Session, tokens: int) -> tuple[str, float]:
    """`tokens` new tokens after PROMPT, story after story, and the rate."""
    session.reset()
    began = time.perf_counter()
    stream = generate_text(session, PROMPT, max_new_tokens=tokens, temperature=0.7, top_p=0.95, seed=SEED, stop_ids=())
    text = PROMPT + "".join(stream)
    return text, tokens / (time.perf_counter() - began)


def _both_ends(text: str) -> str:
    """The first and the last sentences, wrapped; what lies between is counted."""
    words = text.split()
    ends = 60
    if len(words) <= 2 * ends:
        return textwrap.fill(" ".join(words), 92)
    head, tail = " ".join(words[:ends]), " ".join(words[-ends:])
    between = f"[… {len(words) - 2 * ends} more words …]"
    return "\n".join([textwrap.fill(head, 92), between, textwrap.fill(tail, 92)])


def _heldout_perplexity(session: Session) -> float:
    """Teacher-forced perplexity of the engine on stories that took no part in training."""
    ids = session.tokenizer.encode(HELDOUT_FILE.read_text(encoding="utf-8"))
    session.reset()
    logits = session.forward(np.asarray(ids[:-1], dtype=np.int64))[0]
    return perplexity(logits, np.asarray(ids[1:], dtype=np.int64))


def _summary(console: Console, outcomes: Sequence[_Outcome]) -> None:
    from rich.table import Table

    table = Table(title="Summary", title_justify="left")
    for column in ("model", "window", "generated", "tokens/s", "KV bytes", "perplexity", "max error", "parity"):
        table.add_column(column, justify="left" if column in ("model", "parity") else "right")
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            str(outcome.window),
            str(outcome.tokens),
            f"{outcome.tokens_per_second:,.0f}",
            f"{outcome.kv_bytes:,}",
            f"{outcome.perplexity:.2f}",
            f"{outcome.report.largest_error:.1e}",
            "[green]holds[/]" if outcome.report.passed else "[bold red]fails[/]",
        )
    console.print(table)
