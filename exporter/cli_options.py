"""Options and arguments that several subcommands share, so that they read and behave alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from exporter.defaults import DEFAULT_BLOCK_SIZE, GROUPS, LAYOUTS, QUANTIZERS, RUN_BACKENDS, SCALES

_Command = TypeVar("_Command", bound=Callable[..., object])

EXISTING = click.Path(exists=True, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


class FiniteRange(click.FloatRange):
    """A range that holds numbers only: click lets "nan" pass every bound, and no comparison with it is ever true."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Fails for infinity as well."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number that anything can be held against.", param, ctx)
        return number


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, errors included.")
backend_option = click.option(
    "--backend", metavar="NAME", help=f"What runs the bundle: {', '.join(RUN_BACKENDS)}.  [default: {RUN_BACKENDS[0]}]"
)
engine_option = click.option(
    "--engine",
    metavar="NAME",
    help="Which engine that `cierzo build` made to run, for a backend that runs those.  [default: the one that fits]",
)
ignore_option = click.option(
    "--ignore-config-key",
    "ignored",
    multiple=True,
    metavar="KEY",
    help="Accept this unknown key of the checkpoint's config, of which you know that it changes nothing. Repeatable.",
)
layout_option = click.option(
    "--layout", type=click.Choice(LAYOUTS), help="Which layout to read.  [default: the one that the folder has]"
)
text_only_option = click.option(
    "--text-only", is_flag=True, help="Take the language model out of a checkpoint that reads images as well."
)
weights_folder_option = click.option(
    "--weights-folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the checkpoint's files are, if they were moved after the export.",
)
verify_option = click.option("--verify", is_flag=True, help="Compare the hash of every file first.")

_QUANTIZE = (
    click.option(
        "--block-size",
        type=click.Choice(["16", "32", "64", "128", "256"]),
        help=f"int8, int4: weights that share a scale.  [default: {DEFAULT_BLOCK_SIZE}]",
    ),
    click.option(
        "--zero-points/--no-zero-points",
        default=None,
        help="int8, int4: whether each block has a zero point.  [default: no]",
    ),
    click.option("--scales", type=click.Choice(SCALES), help=f"int8, int4: their type.  [default: {SCALES[0]}]"),
    click.option(
        "--quantizer",
        type=click.Choice(QUANTIZERS),
        help=f"int8, int4: search for the best scales, or round to nearest.  [default: {QUANTIZERS[0]}]",
    ),
    click.option(
        "--keep",
        multiple=True,
        metavar="NAME[=int8]",
        help=f"int8, int4: leave this as it is stored, or in int8: {', '.join(GROUPS[:6])}, or a pattern over "
        "parameters. Repeatable.",
    ),
)


def quantize_options(command: _Command) -> _Command:
    """The options of quantised weights; what was not given is None, so that a quantised checkpoint's own may stand."""
    for option in reversed(_QUANTIZE):
        command = option(command)
    return command
