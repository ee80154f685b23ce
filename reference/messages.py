"""Words that messages about checkpoints share."""

from __future__ import annotations

from collections.abc import Collection


def some(names: Collection[str], most: int = 5) -> str:
    """The first few names of a long list, with the number of those left out."""
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
