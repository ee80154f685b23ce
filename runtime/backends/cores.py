"""How many cores this process may really use."""

from __future__ import annotations

import os
from pathlib import Path

_SYSTEM = Path("/sys")


def physical_cores(system: Path = _SYSTEM) -> int:
    """Physical cores that this process may run on, at least 1.

    Two hyper-threads of a core share its arithmetic units, so a thread for each only adds contention in matrix
    products. Counts the distinct sibling sets of the allowed logical cores (Linux, /sys/devices/system/cpu) and obeys
    the control group's quota (cpu.max: microseconds allowed per period), because a container sees all cores of its
    host. Elsewhere: the logical cores.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for core in allowed:
        topology = system / "devices/system/cpu" / f"cpu{core}" / "topology/thread_siblings_list"
        try:
            siblings.add(topology.read_text().strip())
        except OSError:
            siblings.add(str(core))
    try:
        quota, period = (system / "fs/cgroup/cpu.max").read_text().split()[:2]
        limit = len(siblings) if quota == "max" else int(quota) // int(period)
    except (OSError, ValueError, ZeroDivisionError):
        limit = len(siblings)
    return max(1, min(len(siblings), limit))
