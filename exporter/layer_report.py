"""The outcome of a comparison by module: figures, verdicts, and how a person reads them in a terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class ModuleParity:
    """One module's output held against the reference in float64.

    depth: 0 for the embedding, i + 1 for layer i, −1 for what is behind the layers.
    error: largest absolute difference; infinite when a value is not finite or the shapes differ.
    budget: what was allowed; reference_error: what the reference itself errs in the engine's dtype; largest: the
        largest magnitude of the module's output, to which floor and ceiling of the budget refer.
    """

    module: str
    depth: int
    error: float
    budget: float
    reference_error: float
    largest: float
    passed: bool

    @property
    def share(self) -> float:
        """Error as a share of the budget."""
        return self.error / self.budget if self.budget > 0 else (0.0 if self.error == 0 else float("inf"))


@dataclass(frozen=True, slots=True)
class LayerReport:
    """All modules of one run, in the order of computation.

    missing: modules of the reference that the graph does not name. tokens: length of the row that both sides read;
    compared_positions: how many of its positions were compared, fewer than `tokens` where memory said so.
    decided: how many of its tokens come before the first one of which a router is undecided. From there on an engine
        may have taken another expert and be no worse, so what is behind that router is not compared; None for all.
    """

    modules: tuple[ModuleParity, ...]
    missing: tuple[str, ...]
    tokens: int
    compared_positions: int
    groups: int
    chunk: int
    windows: tuple[int | None, ...]
    dtype: str
    decided: int | None = None

    @property
    def passed(self) -> bool:
        """Every module within its budget, and at least one compared."""
        return bool(self.modules) and all(module.passed for module in self.modules)

    @property
    def first_failure(self) -> ModuleParity | None:
        """The first module, in the order of computation, that leaves its budget."""
        return next((module for module in self.modules if not module.passed), None)

    @property
    def capped(self) -> bool:
        """Whether some positions were computed and not compared."""
        return self.compared_positions < self.tokens

    @property
    def what_was_done(self) -> str:
        """Row, chunk, wraps and what was left out, in one sentence or two."""
        widest = max((window for window in self.windows if window is not None), default=None)
        windows = "full attention" if widest is None else f"{self.tokens / widest:.1f} windows of {widest}"
        text = f"One row of {self.tokens:,} tokens ({windows}) in steps of at most {self.chunk}."
        if self.decided is not None and self.decided < self.tokens:
            text += (
                f" At token {self.decided:,} a router is undecided: from there on an engine may take another expert, "
                "and what is behind that router is not compared."
            )
        if self.capped:
            text += (
                f" Outputs were compared at {self.compared_positions:,} positions spread evenly over the row, since "
                f"all of them would not fit into the memory set aside; all {self.tokens:,} were computed."
            )
        if self.missing:
            text += f" The graph does not name {len(self.missing)} modules: {', '.join(self.missing[:4])}."
        return text

    def to_json(self) -> dict[str, Any]:
        """Plain data; errors that are not finite become null."""
        first = self.first_failure
        return {
            "passed": self.passed,
            "first_failure": None if first is None else first.module,
            "tokens": self.tokens,
            "compared_positions": self.compared_positions,
            "groups": self.groups,
            "chunk": self.chunk,
            "dtype": self.dtype,
            "missing": list(self.missing),
            "modules": [
                {key: None if value == float("inf") else value for key, value in asdict(module).items()}
                for module in self.modules
            ],
        }


def render_layers(report: LayerReport, console: Console) -> None:
    """A table of the modules and the verdict in the last line."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Module outputs against the reference", title_justify="left", expand=False)
    table.add_column("module", overflow="fold")
    table.add_column("max error", justify="right", no_wrap=True)
    table.add_column("of budget", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for module in report.modules:
        verdict = Text("within", style="green") if module.passed else Text("off", style="bold red")
        table.add_row(Text(module.module), f"{module.error:.1e}", percent(module.share), verdict)
    console.print(table)
    console.print(report.what_was_done, highlight=False)
    off = sum(not module.passed for module in report.modules)
    first = report.first_failure
    if report.passed:
        console.print(f"[bold green]Every module agrees[/]: {len(report.modules)} compared.", highlight=False)
    elif first is None:
        console.print("[bold red]No module was compared[/].", highlight=False)
    else:
        console.print(
            f"[bold red]{off} of {len(report.modules)} modules are off[/], the first is {first.module}. "
            "`cierzo bisect` names the node.",
            highlight=False,
        )


def percent(share: float) -> str:
    """A share of a budget for a table; very large ones as a power of ten."""
    return f"{100 * share:.0f} %" if share < 100 else "not finite" if share == float("inf") else f"{share:.0e} ×"
