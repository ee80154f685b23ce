"""The options of `cierzo validate` that hold a run against a stored one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from exporter.cli_options import FiniteRange

if TYPE_CHECKING:
    from exporter.baseline import Baseline
    from exporter.validation_report import ValidationReport

_Command = TypeVar("_Command", bound=Callable[..., Any])

WORSE, SLOWER = 1.5, 1.3
"""How many times the stored error a new one may be, and the stored speed over a new one."""


@dataclass(frozen=True, slots=True)
class BaselineOptions:
    """What was asked for: a run to compare with, or a file to store this one in."""

    stored: Baseline | None
    save: Path | None
    worse: float
    slower: float

    def require(self, *, suite: str, seed: int, backend: str | None) -> None:
        """Before the validation: raises InputError where the stored run cannot be compared with one of these options,
        and ExportError where this one could not be stored.
        """
        if self.stored is not None:
            from exporter.baseline import require_same
            from runtime.backends import DEFAULT_BACKEND

            require_same(self.stored, {"suite": suite, "seed": seed, "backend": backend or DEFAULT_BACKEND})
        if self.save is not None:
            from exporter.whole_file import BASELINE, refuse_unwritable

            refuse_unwritable(self.save, BASELINE)

    def judged(self, report: ValidationReport, *, holds: bool) -> ValidationReport:
        """The report with the comparison among its checks, or as it is; stores it where that was asked for.

        holds: whether parity does, the comparison by module included: what fails is not stored.

        Raises InputError where the stored run did something else, ExportError where this one cannot be stored.
        """
        from exporter.baseline import compare_baseline, save_baseline

        if self.stored is not None:
            rows = compare_baseline(self.stored, report, worse=self.worse, slower=self.slower)
            return replace(report, checks=(*report.checks, *rows))
        if self.save is not None:
            if holds and report.passed:
                save_baseline(self.save, report)
                click.echo(f"stored {self.save} as a baseline", err=True)
            else:
                kept = ", and the file keeps the run that it has" if self.save.exists() else ""
                click.echo(f"cierzo: a run that does not pass is not stored as a baseline{kept}.", err=True)
        return report


def baseline_options(command: _Command) -> _Command:
    """Adds the options; the command gets them as `baseline`, a BaselineOptions whose file is read by then."""

    @functools.wraps(command)
    def read(
        *arguments: Any,
        baseline: Path | None,
        save_baseline: Path | None,
        worse: float | None,
        slower: float | None,
        **others: Any,
    ) -> Any:
        if baseline is not None and save_baseline is not None:
            raise click.UsageError("--baseline and --save-baseline exclude each other: one reads, the other writes.")
        if baseline is None and (worse is not None or slower is not None):
            raise click.UsageError("--worse and --slower are for --baseline: they say how far a run may be from it.")
        from exporter.baseline import read_baseline

        stored = None if baseline is None else read_baseline(baseline)
        options = BaselineOptions(stored, save_baseline, worse or WORSE, slower or SLOWER)
        return command(*arguments, baseline=options, **others)

    for option in reversed(_OPTIONS):
        read = option(read)
    return read  # type: ignore[return-value]


_FILE = click.Path(dir_okay=False, path_type=Path)
_FACTOR = FiniteRange(min=1)
_OPTIONS = (
    click.option("--baseline", type=_FILE, metavar="FILE", help="Fail when worse than the run that is stored there."),
    click.option("--save-baseline", type=_FILE, metavar="FILE", help="Store this run there, if it passes."),
    click.option(
        "--worse", type=_FACTOR, help=f"--baseline: let errors be so many times as large.  [default: {WORSE}]"
    ),
    click.option(
        "--slower",
        type=_FACTOR,
        help=f"--baseline: let the same machine take so many times as long.  [default: {SLOWER}]",
    ),
)
