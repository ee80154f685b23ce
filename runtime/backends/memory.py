"""How much memory this process may still take, and whether something of a known size fits into it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_ROOT = Path("/")
_LEAST_SPARE = 512 << 20
_SPARE_SHARE = 0.1
_UNLIMITED = 1 << 60
"""Version 1 of control groups writes a number near 2**63 for "no limit"."""


def available_memory(root: Path = _ROOT) -> int | None:
    """Bytes that the system and this process's control group would still give; None where neither says (not Linux).

    The system's figure is MemAvailable of /proc/meminfo. A control group's is its limit less its use, where pages of
    files that nobody touched lately do not count: the kernel takes those back first.
    """
    found = (_system(root), _group(root, 2), _group(root, 1))
    return min((amount for amount in found if amount is not None), default=None)


def fits(nbytes: int, available: int | None) -> bool:
    """Whether `nbytes` can be taken and a tenth of the available memory, at least 512 MB, is left for the rest."""
    if available is None:
        return True
    return nbytes <= available - max(_LEAST_SPARE, int(available * _SPARE_SHARE))


def return_freed_memory() -> None:
    """Give back to the system what the C library's heap holds of freed memory, where it is one that can (glibc).

    Loading a graph frees large tensors in another order than it made them: without this a mixture of experts of 111M
    parameters holds 912 MB after loading, and with it 450.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)


def _system(root: Path) -> int | None:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def _group(root: Path, version: int) -> int | None:
    """What this process's control group and those around it leave, each of which may have a limit.

    A container may see its own group at the top of the mounted tree, under a path that is not there.
    """
    if version == 2:
        top, line = root / "sys/fs/cgroup", r"^0::(/.*)$"
        limit_file, use_file, idle = "memory.max", "memory.current", "inactive_file"
    else:
        top, line = root / "sys/fs/cgroup/memory", r"^\d+:(?:[\w=]+,)*memory(?:,[\w=]+)*:(/.*)$"
        limit_file, use_file, idle = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    left = []
    for folder in _own_folders(top, re.search(line, _text(root / "proc/self/cgroup"), re.MULTILINE)):
        limit, use = _text(folder / limit_file).strip(), _text(folder / use_file).strip()
        if limit.isdigit() and use.isdigit() and int(limit) < _UNLIMITED:
            match = re.search(rf"^{idle} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            left.append(max(0, int(limit) - int(use) + (int(match.group(1)) if match else 0)))
    return min(left, default=None)


def _own_folders(top: Path, own: re.Match[str] | None) -> list[Path]:
    """`top`, and below it the folders on the way to this process's group."""
    parts = own.group(1).strip("/").split("/") if own is not None else []
    if ".." in parts:  # the group lies outside of what is mounted here
        parts = []
    return [top, *(top.joinpath(*parts[: depth + 1]) for depth in range(len(parts)) if parts[0])]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
