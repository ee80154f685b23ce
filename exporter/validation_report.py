"""The outcome of a validation: figures, verdicts, and how a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


SCHEMA_VERSION = 1
"""Of the JSON; raised when a field changes its meaning or goes."""

QUICK, FULL = "quick", "full"
SUITES = (FULL, QUICK)
"""The suites of checks; the first one is the default."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was held against the reference.

    passed: None when the check could not be run on this model; `detail` then says why. It counts for nothing.
    error: absolute difference of a logit from the float64 truth, where that is what was measured: the one that takes
        most of its budget. budget: what was allowed there, the report's where nothing else is said. seconds: how long
        it took.
    """

    name: str
    passed: bool | None
    detail: str
    error: float | None = None
    budget: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of this run, on whatever else the machine was doing: medians over the checks' own steps.

    prefill: of whole chunks; decode: of single tokens with a logit row each. None where none was timed.
    """

    prefill: float | None
    decode: float | None


@dataclass(frozen=True, slots=True)
class Distributions:
    """How the engine's next-token distributions compare with the truth's, by position of the longest row.

    kl: Kullback–Leibler divergence of the engine's from the truth's, in nats; same_best: whether both have the same
    best token; margin: by how much the truth's best logit leads, so that a near-tie is seen as one.
    """

    kl: tuple[float, ...]
    same_best: tuple[bool, ...]
    margin: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Quality:
    """What quantising the weights cost, on a text of `tokens` tokens.

    source: where the text is from. kl: mean Kullback–Leibler divergence of the engine's next-token distribution from
    the original's, in nats. agreement: share of positions where both have the same best token. perplexity_ratio: the
    engine's over the original's on that text, None where the engine has written it.
    """

    source: str
    tokens: int
    kl: float
    agreement: float
    perplexity_ratio: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain data; figures that are not finite become null."""
        figures = asdict(self)
        return {name: _finite(value) if isinstance(value, float) else value for name, value in figures.items()}


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """All checks of one run.

    budget: largest absolute error that was allowed; reference_error: what the reference itself does in that dtype;
    largest_logit: the scale of both. position_errors: largest |error| by position of the longest row; positions: which
    these are, all where it is empty; position_budgets: what was allowed at each, the budget where it is empty.
    quality: how far quantised weights are from the original ones, None where none are quantised.
    unverified: files whose hashes were asked for and that have none in the manifest.
    suite: which checks were asked for. engine: name of the built engine that ran, None where the bundle's graph did.
    device: what it ran on, for a person. windows, chunk: of the model, to mark them in plots. seconds: of the whole
    run. peak_bytes: most memory that the process held. distributions: None where no logits were compared.
    """

    bundle: str
    checkpoint: str
    backend: str
    dtype: str
    seed: int
    budget: float
    reference_error: float
    largest_logit: float
    reason: str
    checks: tuple[Check, ...]
    position_errors: tuple[float, ...]
    versions: Mapping[str, str]
    quality: Quality | None = None
    unverified: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    position_budgets: tuple[float, ...] = ()
    suite: str = "full"
    engine: str | None = None
    device: str = "cpu"
    windows: tuple[int | None, ...] = ()
    chunk: int = 1
    seconds: float = 0.0
    peak_bytes: int = 0
    speed: Speed = Speed(None, None)
    distributions: Distributions | None = None

    @property
    def passed(self) -> bool:
        """Every check that ran holds, and at least one compared logits."""
        compared = any(check.error is not None for check in self.checks)
        return compared and all(check.passed is not False for check in self.checks)

    @property
    def largest_error(self) -> float:
        """Largest absolute error of a logit over all checks."""
        return max((check.error for check in self.checks if check.error is not None), default=float("inf"))

    def budget_of(self, check: Check) -> float | None:
        """What a check's error was held against; None where it measured none."""
        return None if check.error is None else self.budget if check.budget is None else check.budget

    def to_json(self) -> dict[str, Any]:
        """Plain data, as docs/validation.schema.json has it; figures that are not finite become null."""
        return {
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            "suite": self.suite,
            "bundle": self.bundle,
            "checkpoint": self.checkpoint,
            "backend": self.backend,
            "engine": self.engine,
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "budget": self.budget,
            "reference_error": self.reference_error,
            "largest_error": _finite(self.largest_error),
            "largest_logit": self.largest_logit,
            "reason": self.reason,
            "checks": [
                {
                    "name": check.name,
                    "status": status_of(check),
                    "detail": check.detail,
                    "error": None if check.error is None else _finite(check.error),
                    "budget": self.budget_of(check),
                    "seconds": round(check.seconds, 3),
                }
                for check in self.checks
            ],
            "positions": list(self.positions),
            "position_errors": [_finite(error) for error in self.position_errors],
            "position_budgets": list(self.position_budgets),
            "quality": None if self.quality is None else self.quality.to_json(),
            "unverified": list(self.unverified),
            "versions": dict(self.versions),
            "windows": list(self.windows),
            "chunk": self.chunk,
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak_bytes,
            "speed": asdict(self.speed),
            "distributions": None
            if self.distributions is None
            else {
                "kl": [_finite(value) for value in self.distributions.kl],
                "same_best": list(self.distributions.same_best),
                "margin": [_finite(value) for value in self.distributions.margin],
            },
        }


def _finite(number: float) -> float | None:
    return number if abs(number) < float("inf") else None


def status_of(check: Check) -> str:
    """The verdict of a check in one word or two."""
    return "not run" if check.passed is None else "passed" if check.passed else "failed"


def _share(error: float, budget: float | None) -> str:
    if not budget or not math.isfinite(error):
        return "not finite" if budget else ""
    return f"{100 * error / budget:.0f} %" if error <= budget else f"{math.ceil(100 * error / budget)} %"


_SPANS = 5
"""Into how many stretches of positions the longest row is divided when it is shown."""


def _by_position(errors: Sequence[float], positions: Sequence[int]) -> str:
    """The largest error of each stretch of positions, so that one sees whether it grows along the row."""
    width = -(-len(errors) // _SPANS)
    spans = [(start, min(start + width, len(errors))) for start in range(0, len(errors), width)]
    places = positions or range(len(errors))
    return ", ".join(f"{places[start]}–{places[end - 1]}: {max(errors[start:end]):.1e}" for start, end in spans)


_MORE = " Behind a token of which a router is undecided up to {:.2e} are allowed: what taking the other expert costs."


def _uneven(report: ValidationReport) -> bool:
    return any(budget > report.budget for budget in report.position_budgets)


_COLOURS = {"passed": "green", "failed": "bold red", "not run": "yellow"}


def render(report: ValidationReport, console: Console) -> None:
    """A table of the checks, the budget in words, and the verdict in the last line."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Engine against reference", title_justify="left", expand=False)
    table.add_column("check", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("max error", justify="right", no_wrap=True)
    table.add_column("of budget", justify="right", no_wrap=True)
    table.add_column("what was done", overflow="fold")
    for check in report.checks:
        error = "" if check.error is None else f"{check.error:.1e}"
        share = "" if check.error is None else _share(check.error, report.budget_of(check))
        status = status_of(check)
        table.add_row(Text(check.name), Text(status, style=_COLOURS[status]), error, share, Text(check.detail))
    console.print(table)
    if report.position_errors:
        console.print(
            f"Largest error by position: {_by_position(report.position_errors, report.positions)}.", highlight=False
        )
    console.print(
        f"Budget {report.budget:.2e}: the reference itself is off by {report.reference_error:.2e} in {report.dtype} "
        f"against float64, on logits up to {report.largest_logit:.3g}."
        + (_MORE.format(max(report.position_budgets)) if _uneven(report) else ""),
        highlight=False,
    )
    ran = sum(check.passed is not None for check in report.checks)
    failed = [check.name for check in report.checks if check.passed is False]
    if report.passed:
        console.print(f"[bold green]Parity holds[/]: {ran} checks on {report.backend}.", highlight=False)
    else:
        console.print(f"[bold red]Parity fails[/]: {', '.join(failed) or 'nothing was compared'}.", highlight=False)
