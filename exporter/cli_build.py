"""`cierzo build`: an engine of a bundle for GPUs, kept in the bundle."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli_options import EXISTING, json_option, weights_folder_option
from exporter.console import output, print_json, progress_bars
from exporter.defaults import ARITHMETIC_KINDS, ENGINE_BACKENDS, ENGINE_FLAVORS, ENGINE_WEIGHTS, RING_KINDS


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
    help="Filled from the bundle's files when the engine is loaded, or copied into it."
    f"  [default: {ENGINE_WEIGHTS[0]}]",
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
    weights: str | None,
    weights_folder: Path | None,
    as_json: bool,
) -> None:
    """Build an engine of BUNDLE for GPUs, into BUNDLE.

    An engine of tensorrt has two plans, one for chunks of tokens and one for single ones. It runs with the version of
    the library that built it, on GPUs of that compute capability; build one for each. The flavor tensorrt builds for
    the GPU at hand, tensorrt-rtx for any that it runs on, without one.

    An engine of onnxruntime-cuda has two graphs instead, of what ONNX Runtime has CUDA kernels for. It is built without
    a GPU, runs on all that ONNX Runtime does, and has no other option than --arithmetic, which is bfloat16 or float16.
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
        print_json(built.to_json())
    else:
        output().print(built.draw())
        click.echo(f"wrote {built.folder} ({built.written()})")
