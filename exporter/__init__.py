"""From a checkpoint to a bundle: planning, tracing, stitching, saving, validating, and the `cierzo` command.

`export` and `build_engine` are the functions for scripts. torch is imported when `export` is called and not before, so
that the command can run bundles on a machine without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from exporter.defaults import DEFAULT_MAX_BATCH, ENGINE_BACKENDS, FRONTENDS, WEIGHT_KINDS

__all__ = ["build_engine", "export"]


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    weights: str = WEIGHT_KINDS[0],
    block_size: int | None = None,
    zero_points: bool | None = None,
    scales: str | None = None,
    quantizer: str | None = None,
    keep: Collection[str] = (),
    copy: bool = False,
    hashes: bool = True,
    chunk: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    context: int | None = None,
    kv: str | None = None,
    prove: bool = True,
    dump_passes: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    ignore_config_keys: Collection[str] = (),
    layout: str | None = None,
    text_only: bool = False,
    frontend: str = FRONTENDS[0],
    attention: str | None = None,
) -> Path:
    """Compile a checkpoint folder into a bundle folder; see `exporter.compile.export` for every argument."""
    from exporter import compile

    return compile.export(
        checkpoint,
        out,
        weights=weights,
        block_size=block_size,
        zero_points=zero_points,
        scales=scales,
        quantizer=quantizer,
        keep=keep,
        copy=copy,
        hashes=hashes,
        chunk=chunk,
        max_batch=max_batch,
        context=context,
        kv=kv,
        prove=prove,
        dump_passes=dump_passes,
        progress=progress,
        ignore_config_keys=ignore_config_keys,
        layout=layout,
        text_only=text_only,
        frontend=frontend,
        attention=attention,
    )


def build_engine(
    bundle: str | Path,
    *,
    backend: str = ENGINE_BACKENDS[0],
    flavor: str | None = None,
    compute_capability: str | None = None,
    arithmetic: str | None = None,
    kv: str | None = None,
    plugins: str | Collection[str] | None = None,
    weights: str | None = None,
    weights_folder: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Build an engine of a bundle, into the bundle; returns its folder. See `exporter.build.build.build`."""
    from exporter.build.build import build

    return build(
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
    ).folder
