"""`cierzo validate` and `cierzo bisect`: does an engine compute the reference's function, and if not, where not?"""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli_baseline import BaselineOptions, baseline_options
from exporter.cli_options import (
    EXISTING,
    FOLDER,
    FiniteRange,
    backend_option,
    engine_option,
    json_option,
    verify_option,
    weights_folder_option,
)
from exporter.cli_receipt import ReceiptOptions, receipt_options
from exporter.console import name_unverified, output, print_json, progress_bars
from exporter.validation_report import SUITES

PARITY_FAILED = 1

seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the token sequences."
)


@click.command()
@click.argument("bundle", type=EXISTING)
@click.argument("checkpoint", type=EXISTING, required=False)
@backend_option
@engine_option
@click.option(
    "--suite",
    type=click.Choice(SUITES),
    default=SUITES[0],
    show_default=True,
    help="All borders of windows and context, or what takes under a minute on a model of a billion parameters.",
)
@seed_option
@click.option("--layers", is_flag=True, help="Also compare the output of every module.")
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write an HTML report there."
)
@click.option(
    "--junit", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write JUnit XML there, for CI."
)
@baseline_options
@receipt_options
@click.option(
    "--text",
    type=EXISTING,
    metavar="FILE",
    help="Text on which quantised weights are judged.  [default: the engine's own]",
)
@click.option(
    "--max-kl",
    type=FiniteRange(min=0),
    help="Largest mean KL divergence (nats) of quantised weights.  [default: by their kind]",
)
@weights_folder_option
@verify_option
@json_option
def validate(
    bundle: Path,
    checkpoint: Path | None,
    backend: str | None,
    engine: str | None,
    suite: str,
    seed: int,
    layers: bool,
    report: Path | None,
    junit: Path | None,
    baseline: BaselineOptions,
    receipt: ReceiptOptions,
    text: Path | None,
    max_kl: float | None,
    weights_folder: Path | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Hold BUNDLE against the reference model of CHECKPOINT, by default the one that it was made from.

    Exits 0 when every check holds, 1 when one fails, 2 when they could not be run.
    """
    from exporter.validate import render
    from exporter.validate import validate as run
    from exporter.whole_file import JUNIT, REPORT, refuse_unwritable

    by_module, written = None, None
    baseline.require(suite=suite, seed=seed, backend=backend)  # like all below, before the checks take their time
    for file, what in ((report, REPORT), (junit, JUNIT)):
        if file is not None:
            refuse_unwritable(file, what)
    with progress_bars(quiet=as_json) as progress:
        if layers:
            from exporter.layer_parity import compare_layers
            from exporter.parity_tools import require_polygraphy

            require_polygraphy()
        receipts = receipt.prepare(bundle, weights_folder)
        measured = run(
            bundle,
            checkpoint,
            suite=suite,
            backend=backend,
            engine=engine,
            seed=seed,
            verify=verify,
            weights_folder=weights_folder,
            text=text,
            max_kl=max_kl,
            progress=progress,
        )
        if layers:
            by_module = compare_layers(bundle, checkpoint, seed=seed, weights_folder=weights_folder, progress=progress)
    modules_hold = by_module is None or by_module.passed
    holds = measured.passed and modules_hold
    try:
        outcome = baseline.judged(measured, holds=holds)
        passed = outcome.passed and modules_hold
        name_unverified(outcome.unverified)
        if junit is not None:
            from exporter.junit_report import write_junit

            write_junit(junit, outcome, by_module)
        if report is not None:
            from exporter.html_report import write_html

            write_html(report, outcome, by_module)
        if not as_json:  # before the receipt, whose files may be refused
            render(outcome, output())
            if by_module is not None:
                from exporter.layer_report import render_layers

                render_layers(by_module, output())
            if report is not None:
                click.echo(f"wrote {report}")
    finally:
        if not holds:  # what the receipts say is no longer so, whatever else cannot be read or written
            written = receipts.conclude(measured, holds=False, passed=False)
    if holds:
        with progress_bars(quiet=as_json) as progress:
            written = receipts.conclude(measured, holds=True, passed=passed, progress=progress)
    if as_json:
        extra = {} if by_module is None else {"passed": passed, "layers": by_module.to_json()}
        print_json(outcome.to_json() | extra | {"receipt": None if written is None else written.to_json()})
    elif written is not None:
        click.echo(str(written))
    if not passed:
        click.get_current_context().exit(PARITY_FAILED)


@click.command()
@click.argument("bundle", type=EXISTING)
@click.argument("checkpoint", type=EXISTING, required=False)
@click.option("--out", type=FOLDER, required=True, help="Write the smallest failing model into this new folder.")
@seed_option
@weights_folder_option
@json_option
def bisect(
    bundle: Path, checkpoint: Path | None, out: Path, seed: int, weights_folder: Path | None, as_json: bool
) -> None:
    """Name the pass, the layer and the node of BUNDLE that compute something else than CHECKPOINT says.

    Exits 0 when no node does, 1 when one was found, 2 when it could not be run.
    """
    from exporter.bisect.report import render_bisect
    from exporter.bisect.search import bisect as run

    with progress_bars(quiet=as_json) as progress:
        outcome = run(bundle, checkpoint, out, seed=seed, weights_folder=weights_folder, progress=progress)
    if as_json:
        print_json(outcome.to_json())
    else:
        render_bisect(outcome, output())
    if not outcome.healthy:
        click.get_current_context().exit(PARITY_FAILED)
