"""The `cierzo` command. Each subcommand imports its work when it runs, so that --help and a bundle need no torch.

Exit codes: 0 done, 1 the engine does not compute the reference's function, 2 it could not be done, 130 interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from exporter.cli_bench import bench
from exporter.cli_build import build
from exporter.cli_generate import generate
from exporter.cli_options import (
    EXISTING,
    FOLDER,
    ignore_option,
    json_option,
    layout_option,
    quantize_options,
    text_only_option,
)
from exporter.cli_parity import bisect, validate
from exporter.console import (
    READER_GONE,
    discard_stdout,
    output,
    prepare_streams,
    print_json,
    progress_bars,
    report_error,
)
from exporter.defaults import (
    ARITHMETIC_KINDS,
    ATTENTIONS,
    DEFAULT_MAX_BATCH,
    ENGINE_BACKENDS,
    FRONTENDS,
    KV_KINDS,
    WEIGHT_KINDS,
)

MODELS = ("mistral", "mixtral")


@dataclass(slots=True)
class Settings:
    """What the group learns before a subcommand runs."""

    debug: bool = False
    json_errors: bool = False


class CierzoGroup(click.Group):
    """Turns whatever ends a subcommand into one paragraph and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Notes whether a JSON object is expected, before an argument can turn out to be wrong."""
        prepare_streams()
        options = args[: args.index("--")] if "--" in args else args
        ctx.obj = Settings(json_errors="--json" in options)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the subcommand."""
        settings: Settings = ctx.obj
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            discard_stdout()  # whoever read our output has left, as `head` does
            ctx.exit(READER_GONE)
        except click.ClickException as error:
            if settings.json_errors:
                print_json({"error": {"type": type(error).__name__, "message": error.format_message()}})
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            ctx.exit(report_error(error, debug=settings.debug, as_json=settings.json_errors))


def distribution_version() -> str:
    """The version of the installed distribution, or the word that a source tree without one gets."""
    try:
        return version("cierzo")
    except PackageNotFoundError:
        return "unknown (not installed)"


def print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """Prints the version and ends."""
    if wanted:
        click.echo(f"cierzo {distribution_version()}")
        ctx.exit()


@click.group(cls=CierzoGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version, help="Print it.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error as well.")
@click.pass_obj
def cli(settings: Settings, debug: bool) -> None:
    """Compile Mistral-family checkpoints into inference engines, and prove that each computes the same function."""
    settings.debug = debug


@cli.command()
@click.argument("path", type=EXISTING)
@layout_option
@text_only_option
@ignore_option
@click.option(
    "--backend",
    type=click.Choice(ENGINE_BACKENDS),
    help="Of a bundle: show where the nodes of an engine for it would run, as if it were built.",
)
@click.option(
    "--arithmetic",
    type=click.Choice(ARITHMETIC_KINDS),
    help="What that engine computes in.  [default: by the weights]",
)
@json_option
def inspect(
    path: Path,
    layout: str | None,
    text_only: bool,
    ignored: tuple[str, ...],
    backend: str | None,
    arithmetic: str | None,
    as_json: bool,
) -> None:
    """Parameters, KV memory and receptive field of a checkpoint, its config or a bundle at PATH.

    Of a bundle also which nodes run where: on this machine's CPU, and on a GPU those of the engines that were built.
    """
    from exporter.inspect import inspect_path, render

    report = inspect_path(
        path,
        ignore_config_keys=ignored,
        layout=layout,
        text_only=text_only,
        backend=backend,
        arithmetic=arithmetic,
    )
    if as_json:
        print_json(report.to_json())
    else:
        render(report, output())


@cli.command()
@click.argument("checkpoint", type=EXISTING)
@click.argument("out", type=FOLDER)
@click.option(
    "--weights",
    type=click.Choice(WEIGHT_KINDS),
    default=WEIGHT_KINDS[0],
    show_default=True,
    help="As the checkpoint stores them, converted, or quantised.",
)
@quantize_options
@click.option("--copy", is_flag=True, help="Copy the weights into OUT instead of linking the checkpoint's files.")
@click.option("--no-hash", is_flag=True, help="Do not read the checkpoint's files for the sake of their hashes.")
@click.option("--kv", type=click.Choice(KV_KINDS), help="Type of the KV buffers.  [default: by the weights]")
@click.option("--chunk", type=click.IntRange(min=1), help="Most tokens of a row in one step.  [default: chosen]")
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=DEFAULT_MAX_BATCH, show_default=True, help="Most rows."
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens that layers without a window can hold.  [default: the checkpoint's, at most 4096]",
)
@click.option(
    "--frontend", type=click.Choice(FRONTENDS), default=FRONTENDS[0], show_default=True, help="Whose model is traced."
)
@click.option(
    "--attention",
    type=click.Choice(ATTENTIONS),
    help=f"How the front end transformers spells attention.  [default: {ATTENTIONS[0]}]",
)
@click.option("--no-prove", is_flag=True, help="Do not run each rewritten region against the original.")
@click.option("--dump-passes", type=FOLDER, help="Write the graph after each pass into this folder.")
@layout_option
@text_only_option
@ignore_option
@json_option
def export(
    checkpoint: Path,
    out: Path,
    weights: str,
    block_size: str | None,
    zero_points: bool | None,
    scales: str | None,
    quantizer: str | None,
    keep: tuple[str, ...],
    copy: bool,
    no_hash: bool,
    kv: str | None,
    chunk: int | None,
    max_batch: int,
    context: int | None,
    frontend: str,
    attention: str | None,
    no_prove: bool,
    dump_passes: Path | None,
    layout: str | None,
    text_only: bool,
    ignored: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compile CHECKPOINT (a folder in Hugging Face's layout or Mistral's own) into the new folder OUT, the bundle.

    The weights stay in the checkpoint's files, which OUT gets hard links to: no weight is copied or converted, unless
    --weights or --copy ask for it.
    """
    from exporter import export as run
    from runtime.manifest import COPIED, FOLDER, LINKED

    with progress_bars(quiet=as_json) as progress:
        bundle = run(
            checkpoint,
            out,
            weights=weights,
            block_size=None if block_size is None else int(block_size),
            zero_points=zero_points,
            scales=scales,
            quantizer=quantizer,
            keep=keep,
            copy=copy,
            hashes=not no_hash,
            kv=kv,
            chunk=chunk,
            max_batch=max_batch,
            context=context,
            prove=not no_prove,
            dump_passes=dump_passes,
            progress=progress,
            ignore_config_keys=ignored,
            layout=layout,
            text_only=text_only,
            frontend=frontend,
            attention=attention,
        )
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    fusion, weights_at = manifest["fusion"], manifest["weights"]
    referenced = 0 if weights_at["placement"] == COPIED else sum(e["bytes"] for e in weights_at["files"].values())
    files = [path for path in bundle.iterdir() if referenced == 0 or path.name not in weights_at["files"]]
    size = sum(path.stat().st_size for path in files)
    if as_json:
        where = {key: weights_at[key] for key in ("kind", "placement", "folder")}
        print_json(
            {"bundle": str(bundle), "bytes": size, "referenced_bytes": referenced, "weights": where, "fusion": fusion}
        )
    else:
        from exporter.fusion_table import draw_fusion

        for table in draw_fusion(fusion):
            output().print(table)
        kept = {
            COPIED: "",
            LINKED: f"; {referenced / 1e6:,.1f} MB of weights are the checkpoint's files, linked",
            FOLDER: f"; {referenced / 1e6:,.1f} MB of weights stay in {weights_at['folder']}",
        }
        click.echo(f"wrote {bundle} ({size / 1e6:,.1f} MB{kept[weights_at['placement']]})")


@cli.command()
@click.option("--keep", type=FOLDER, help="Leave the bundles in this folder.  [default: a temporary one]")
@click.option("--model", type=click.Choice([*MODELS, "both"]), default="both", show_default=True, help="Which one.")
def demo(keep: Path | None, model: str) -> None:
    """Take the two small trained models that Cierzo ships through inspect, export, generate and validate."""
    from exporter.demo import run_demo

    with progress_bars(quiet=False) as progress:
        run_demo(output(), models=MODELS if model == "both" else (model,), keep=keep, progress=progress)


cli.add_command(generate)
cli.add_command(validate)
cli.add_command(bisect)
cli.add_command(bench)
cli.add_command(build)

main: Callable[[], None] = cli
