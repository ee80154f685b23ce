"""Options and arguments that several subcommands share, so that they read and behave alike."""

from __future__ import annotations

from pathlib import Path

import click

EXISTING = click.Path(exists=True, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, errors included.")
backend_option = click.option("--backend", help="Engine that runs the bundle.  [default: the first that Cierzo has]")
ignore_option = click.option(
    "--ignore-config-key",
    "ignored",
    multiple=True,
    metavar="KEY",
    help="Accept this unknown key of config.json, of which you know that it changes nothing. Repeatable.",
)
