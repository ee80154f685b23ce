"""Opens the checkpoint that a bundle was made from again, the way in which the export opened it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reference.checkpoint import Checkpoint, open_checkpoint
from runtime.manifest import Manifest


def recorded_options(manifest: Manifest) -> Mapping[str, Any]:
    """The options of the export, as far as the manifest has them."""
    options = manifest.provenance.get("options")
    return options if isinstance(options, Mapping) else {}


def reopen(manifest: Manifest, path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, with the layout, the ignored keys and the part of the model that were exported.

    Another checkpoint than the recorded one may have another layout: a folder that holds both is read as recorded.
    Raises what `open_checkpoint` raises.
    """
    options = recorded_options(manifest)
    ignored = options.get("ignore_config_keys")
    same = os.path.abspath(os.path.expanduser(path)) == manifest.provenance.get("checkpoint")
    layout = manifest.provenance.get("layout") if same else options.get("layout")
    return open_checkpoint(
        path,
        ignore_config_keys=[str(key) for key in ignored] if isinstance(ignored, list) else (),
        layout=str(layout) if layout is not None else None,
        text_only=options.get("text_only") is True,
    )
