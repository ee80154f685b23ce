"""`cierzo bench`: how fast a bundle runs on this machine, what it takes, and how much of the machine that is."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli_options import (
    EXISTING,
    backend_option,
    engine_option,
    json_option,
    verify_option,
    weights_folder_option,
)
from exporter.cli_receipt import ProofOptions, proof_options
from exporter.console import output, print_json, progress_bars, show_notes


@click.command()
@click.argument("bundle", type=EXISTING)
@click.option(
    "--contexts",
    metavar="LIST",
    help="Context lengths separated by commas, in tokens or windows: 128,1w,32w.  [default: 128,1w,4w,32w]",
)
@click.option(
    "--prompt", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens before the first new one."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="How often to measure.")
@click.option(
    "--decode-tokens", type=click.IntRange(min=1), default=48, show_default=True, help="Tokens decoded in a group."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Rows that run at once.")
@click.option("--profile", is_flag=True, help="Also show where the time goes, by plugin op.")
@backend_option
@engine_option
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.  [default: one per physical core]")
@weights_folder_option
@verify_option
@proof_options
@json_option
def bench(
    bundle: Path,
    contexts: str | None,
    prompt: int,
    rounds: int,
    decode_tokens: int,
    batch: int,
    profile: bool,
    backend: str | None,
    engine: str | None,
    threads: int | None,
    weights_folder: Path | None,
    verify: bool,
    proof: ProofOptions,
    as_json: bool,
) -> None:
    """Measure BUNDLE: prefill and decode at several context lengths, first token, loading, memory.

    The machine's own limits are measured in turn with it, on as many threads: memory bandwidth, which bounds decode,
    and the rate of matrix products, which bounds prefill. Texts of more than 8,192 tokens are read once and not in
    every round; those that take longer than ten minutes are left out unless --contexts asks for them.
    """
    from exporter.bench.run import BenchOptions
    from exporter.bench.run import bench as run
    from exporter.bench.tables import draw

    options = BenchOptions(
        contexts=contexts,
        prompt=prompt,
        rounds=rounds,
        decode_tokens=decode_tokens,
        batch=batch,
        profile=profile,
        threads=threads,
        backend=backend,
        engine=engine,
        weights_folder=weights_folder,
        verify=verify,
        require_parity=proof.require_parity,
        trust=proof.trust,
    )
    with progress_bars(quiet=as_json) as progress:
        report = run(bundle, options, progress)
    show_notes(report.notes)
    if as_json:
        print_json(report.to_json())
    else:
        draw(report, output())
