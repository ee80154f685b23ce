"""From a checkpoint to a bundle: planning, tracing, stitching, saving, validating, and the `cierzo` command.

`export` is the one function for scripts. torch is imported when it is called and not before, so that the command can
run bundles on a machine without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from exporter.defaults import DEFAULT_MAX_BATCH, FRONTENDS, WEIGHT_KINDS

__all__ = ["export"]


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
