"""What the command shows: progress bars and errors on stderr, results and their tables on stdout.

rich is imported when something is drawn, so that `cierzo --help` answers at once.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from exporter.defaults import BYTE_STAGES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

ProgressCallback = Callable[[str, int, int], None]

# Missing in an install that was made for running bundles only.
EXPORT_PACKAGES = frozenset({"torch", "onnx", "onnx_ir", "onnxscript", "safetensors"})
COULD_NOT_RUN = 2  # never 1, which says that parity failed
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
READER_GONE = 141  # 128 + SIGPIPE


def output() -> Console:
    """The console for results, on stdout; piped, it writes plain text no narrower than a page."""
    from rich.console import Console

    class Output(Console):
        """Leaves a reader that has gone to the command; rich itself would exit with 1, which says parity failed."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Output(width=None if sys.stdout.isatty() else 120, highlight=False)


def new_table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns hold words and the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table


def facts_table(title: str, rows: Mapping[str, object]) -> Table:
    """A table of names and values, without those that are None."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False, show_header=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, escape(f"{value:,}" if type(value) is int else str(value)))
    return table


def prepare_streams() -> None:
    """Makes stdout and stderr safe to write to: closed ones lead nowhere, other encodings get a `?` for a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the shell's `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the life of the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def discard_stdout() -> None:
    """Sends what stdout still holds nowhere; Python would complain once more when it flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: Mapping[str, Any]) -> None:
    """Writes one JSON object to stdout. Raises ValueError for NaN and infinity, which JSON does not have."""
    readable = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"  # other encodings get \u escapes
    print(json.dumps(value, indent=2, ensure_ascii=not readable, allow_nan=False), flush=True)


class ProgressBars:
    """Draws one bar at a time: that of the stage that was reported last, until it is complete.

    Stages that count bytes (BYTE_STAGES) show amount, rate and time left, the others steps and the time that is gone.

    Between stages nothing is live, so whoever reports may print in between without tearing the bar.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: str | None = None
        self._bar: Progress | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of `stage` are behind us; a total of 0 means that nobody knows how many."""
        if stage != self._stage:
            self.close()
        complete = total > 0 and done >= total
        if self._bar is None and not complete:
            self._open(stage)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total or None)
        if complete:
            self.close()

    def _open(self, stage: str) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        counts = (
            (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            if stage in BYTE_STAGES
            else (MofNCompleteColumn(), TimeElapsedColumn())
        )
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), *counts, console=self._console, transient=True
        )
        self._bar.add_task(stage, total=None)
        self._bar.start()
        self._stage = stage

    def close(self) -> None:
        """Takes the bar away; the next report opens a new one."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None
        self._stage = None


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[ProgressCallback | None]:
    """The callback `progress(stage, done, total)` that draws on stderr, or None when nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    bars = ProgressBars(Console(stderr=True))
    try:
        yield bars
    finally:
        bars.close()


def name_unverified(names: Sequence[str]) -> None:
    """Say on stderr which files could not be verified, since the manifest has no hash of them."""
    if names:
        text = f"cierzo: the manifest has no hash of {', '.join(names)}, so only the size was compared."
        print(_paragraph(text, sys.stderr), file=sys.stderr)


def show_notes(notes: Sequence[str]) -> None:
    """Say on stderr what makes a session slower than it could be."""
    for note in notes:
        print(_paragraph(f"cierzo: {note}", sys.stderr), file=sys.stderr)


def explain(error: BaseException) -> tuple[str, int]:
    """One paragraph for a person, and the exit code, for whatever ended a command."""
    from runtime.errors import CierzoError  # brings numpy along, which --help can do without

    if isinstance(error, CierzoError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted.", INTERRUPTED
    if isinstance(error, OSError) and error.strerror:
        where = f": '{error.filename}'" if error.filename is not None else ""
        return f"the operating system refused: {error.strerror}{where}.", COULD_NOT_RUN
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXPORT_PACKAGES:
        text = (
            f"this command needs the Python package {error.name}, which is not installed here. An install made for "
            "running bundles leaves the packages for exporting out; `pip install cierzo` brings them all."
        )
        return text, COULD_NOT_RUN
    text = (
        f"something happened that Cierzo did not expect: {type(error).__name__}: {error}. "
        "Run the same command as `cierzo --debug ...` to see where, and please report what it prints."
    )
    return text, COULD_NOT_RUN


def report_error(error: BaseException, *, debug: bool, as_json: bool) -> int:
    """Prints the paragraph on stderr, with `debug` after the traceback, and with `as_json` an object on stdout too.

    Returns the exit code.
    """
    text, exit_code = explain(error)
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    try:
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": text}})
        sys.stdout.flush()
    except OSError:  # a full disk, which is then most likely the error as well
        discard_stdout()
    print(_paragraph(f"cierzo: {text}", sys.stderr), file=sys.stderr)
    return exit_code


def _paragraph(text: str, stream: TextIO) -> str:
    """One paragraph: folded to the terminal, one long line elsewhere, so that it can be searched for."""
    text = " ".join(text.split())
    if not stream.isatty():
        return text
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
