"""Options and arguments that several subcommands share, so that they read and behave alike."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.defaults import LAYOUTS

EXISTING = click.Path(exists=True, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, errors included.")
backend_option = click.option("--backend", help="Engine that runs the bundle.  [default: the first that Cierzo has]")
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
