"""What a build of plans shows: a table of kernels, and a JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporter.build.kernels import KINDS
from exporter.build.weights_as_inputs import filled_from
from exporter.console import new_table

if TYPE_CHECKING:
    from rich.table import Table

    from exporter.build.plan_engine import BuiltEngine


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


def written(built: BuiltEngine) -> str:
    """How large the plans are, and where their weights come from."""
    size = sum(plan.bytes for plan in built.info.plans.values())
    files = filled_from(built.info.tensors)
    return f"{size / 1e6:,.1f} MB" + (f"; {files}" if files else ", its weights included")


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
