"""How much memory is left, and what the ONNX Runtime backend decides from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime import load
from runtime.backends import onnxruntime as backend
from runtime.backends.memory import available_memory, fits, return_freed_memory
from runtime.manifest import WeightsInfo
from tests.support.toy_bundle import write_toy_bundle

GB = 1 << 30


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  33554432 kB\nMemFree:  1024 kB\nMemAvailable:   20971520 kB\n"}
GROUP_2 = {
    "sys/fs/cgroup/memory.max": f"{8 * GB}\n",
    "sys/fs/cgroup/memory.current": f"{5 * GB}\n",
    "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {2 * GB}\nactive_file 7\n",
}
CASES: dict[str, tuple[dict[str, str], int | None]] = {
    "nothing is known": ({}, None),
    "the system alone": (MEMINFO, 20 * GB),
    "no limit": (MEMINFO | {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}, 20 * GB),
    "a limit, and pages that can be taken back": (MEMINFO | GROUP_2, 5 * GB),
    "more used than allowed": (GROUP_2 | {"sys/fs/cgroup/memory.current": f"{99 * GB}\n"}, 0),
    "a group around this one": (
        MEMINFO
        | {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": f"{4 * GB}\n",
            "sys/fs/cgroup/a/memory.current": f"{1 * GB}\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": f"{1 * GB}\n",
        },
        3 * GB,
    ),
    "version 1": (
        MEMINFO
        | {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/job\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{GB}\n",
            "sys/fs/cgroup/memory/job/memory.stat": f"total_inactive_file {GB // 2}\n",
        },
        GB + GB // 2,
    ),
    "a group outside of what is mounted": (MEMINFO | GROUP_2 | {"proc/self/cgroup": "0::/../../x\n"}, 5 * GB),
    "no numbers": (MEMINFO | {"sys/fs/cgroup/memory.max": "what\n", "sys/fs/cgroup/memory.current": "\n"}, 20 * GB),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_is_the_least_that_anybody_grants(tmp_path: Path, name: str) -> None:
    files, expected = CASES[name]
    assert available_memory(system(tmp_path, files)) == expected


def test_a_tenth_and_at_least_half_a_gigabyte_stay_free() -> None:
    assert fits(100 * GB, None)
    assert fits(90 * GB, 100 * GB)
    assert not fits(91 * GB, 100 * GB)
    assert fits(GB // 2, GB)
    assert not fits(GB // 2 + 1, GB)
    return_freed_memory()  # does what the C library can, and nothing elsewhere


def weights(folding_bytes: int) -> WeightsInfo:
    return WeightsInfo("stored", "float32", "linked", None, {"BF16": 1}, folding_bytes, folding_bytes, 0, 0, {})


def test_weights_are_made_at_loading_where_that_fits() -> None:
    assert backend.folds_weights(weights(10 * GB), None)
    assert backend.folds_weights(weights(10 * GB), 14 * GB)
    assert not backend.folds_weights(weights(10 * GB), 13 * GB)
    assert backend.folds_weights(weights(0), 0), "there is nothing to be made"


def test_the_engine_asks_for_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    asked: list[tuple[int, int | None]] = []

    def decide(info: WeightsInfo, available: int | None, *, native: bool) -> bool:
        asked.append((info.folding_bytes, available))
        return False

    expected = load(bundle, threads=1).forward([1, 2, 3, 4, 5])
    monkeypatch.setattr(backend, "available_memory", lambda: 12345)
    monkeypatch.setattr(backend, "folds_weights", decide)
    session = load(bundle, threads=1)
    assert asked == [(0, 12345)]
    assert (session.forward([1, 2, 3, 4, 5]) == expected).all()
