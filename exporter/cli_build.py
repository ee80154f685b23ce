"""`cierzo build`: an engine of a bundle for one kind of GPU, kept in the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli_options import EXISTING, json_option, weights_folder_option
from exporter.console import new_table, output, print_json, progress_bars
from exporter.defaults import ARITHMETIC_KINDS, ENGINE_BACKENDS, ENGINE_FLAVORS, ENGINE_WEIGHTS, RING_KINDS

if TYPE_CHECKING:
    from rich.table import Table

    from exporter.build.build import BuiltEngine


@click.command()
@click.argument("bundle", type=EXISTING)
@click.option(
    "--backend",
    type=click.Choice(ENGINE_BACKENDS),
    default=ENGINE_BACKENDS[0],
    show_default=True,
    help="What the engine is for.",
)
@click.option(
    "--flavor", type=click.Choice(ENGINE_FLAVORS), help="Which library builds.  [default: the one that is installed]"
)
@click.option(
    "--compute-capability", metavar="X.Y", help="Of the GPU that is to run it, as 8.9.  [default: of the GPU here]"
)
@click.option(
    "--arithmetic",
    type=click.Choice(ARITHMETIC_KINDS),
    help="What linear layers, attention and experts compute in.  [default: by the weights]",
)
@click.option("--kv", type=click.Choice(RING_KINDS), help="Type of the KV rings.  [default: as the arithmetic]")
@click.option(
    "--plugins",
    metavar="LIST",
    help="Nodes that Cierzo's own kernels run: all, none, or names separated by commas.  [default: by the arithmetic]",
)
@click.option(
    "--weights",
    type=click.Choice(ENGINE_WEIGHTS),
    default=ENGINE_WEIGHTS[0],
    show_default=True,
    help="Filled from the bundle's files when the engine is loaded, or copied into it.",
)
@weights_folder_option
@json_option
def build(
    bundle: Path,
    backend: str,
    flavor: str | None,
    compute_capability: str | None,
    arithmetic: str | None,
    kv: str | None,
    plugins: str | None,
    weights: str,
    weights_folder: Path | None,
    as_json: bool,
) -> None:
    """Build an engine of BUNDLE for one kind of GPU, into BUNDLE.

    An engine has two plans, one for chunks of tokens and one for single ones. It runs with the version of the library
    that built it, on GPUs of that compute capability; build one for each. tensorrt builds for the GPU at hand,
    tensorrt-rtx for any that it runs on, without one.
    """
    from exporter.build.build import build as run

    with progress_bars(quiet=as_json) as progress:
        built = run(
            bundle,
            backend=backend,
            flavor=flavor,
            compute_capability=compute_capability,
            arithmetic=arithmetic,
            kv=kv,
            plugins=plugins,
            weights=weights,
            weights_folder=weights_folder,
            progress=progress,
        )
    if as_json:
        print_json(to_json(built))
    else:
        output().print(draw(built))
        size = sum(plan.bytes for plan in built.info.plans.values())
        click.echo(f"wrote {built.folder} ({size / 1e6:,.1f} MB{_filled(built)})")


def to_json(built: BuiltEngine) -> dict[str, Any]:
    """What `--json` prints."""
    info = built.info
    return {
        "engine": info.name,
        "folder": str(built.folder),
        **{
            key: getattr(info, key)
            for key in ("backend", "flavor", "version", "compute_capability", "arithmetic", "kv", "weights")
        },
        "plugins": list(info.plugins),
        "compiled_kernels": built.compiled,
        "peak_bytes": built.peak_bytes,
        "plans": {
            name: {
                "bytes": plan.bytes,
                "seconds": round(built.seconds[name], 3),
                "kernels": [dict(counts) for counts in built.kernels[name]],
            }
            for name, plan in info.plans.items()
        },
    }


def draw(built: BuiltEngine) -> Table:
    """What a step runs: kernels by what they do, a row for each profile of each plan."""
    from exporter.build.kernels import KINDS

    info = built.info
    title = f"{info.flavor} {info.version}, compute capability {info.compute_capability}, {info.arithmetic}"
    table = new_table(title, "plan", "rows", "tokens", "MB", "seconds", *(_COLUMNS[kind] for kind in KINDS))
    table.padding = 0  # so that a terminal of 80 columns holds it
    table.columns[0].no_wrap = True
    for name, plan in info.plans.items():
        for index, (profile, counts) in enumerate(zip(plan.profiles, built.kernels[name], strict=True)):
            whole = (name, f"{plan.bytes / 1e6:,.1f}", f"{built.seconds[name]:.1f}") if index == 0 else ("", "", "")
            rows, tokens = _range(profile.min_batch, profile.max_batch), _range(profile.min_tokens, profile.max_tokens)
            table.add_row(whole[0], rows, tokens, *whole[1:], *_counts(counts, KINDS))
    return table


_COLUMNS: Mapping[str, str] = {
    "product": "products",
    "attention": "attention",
    "plugin": "plugins",
    "copy": "copies",
    "other": "others",
}


def _counts(counts: Mapping[str, int], kinds: tuple[str, ...]) -> list[str]:
    """Question marks where the library did not list its kernels."""
    return [str(counts[kind]) if any(counts.values()) else "?" for kind in kinds]


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _filled(built: BuiltEngine) -> str:
    filled = {file for tensor in built.info.tensors for file in _files(tensor)}
    return f"; filled from {', '.join(sorted(filled))} when it is loaded" if filled else ", its weights included"


def _files(tensor: Any) -> set[str]:
    from runtime.weight_expression import files_of

    return files_of(tensor.expression)
