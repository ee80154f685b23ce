"""Weights of published shapes, made on the machine that needs them: random numbers of a seed, drawn on its GPU.

They become the bundle's own files, so that an engine gets them as it gets any others. Fourteen gigabytes are drawn,
brought to the host and written to a file in memory in some seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.bench import Bench
from tests.gpu.ort_models import HEADER

_AT_ONCE = 1 << 26
_SPREAD = 0.02
"""Standard deviation of matrices, as checkpoints of the family are initialised."""
_INT4_SPREAD = 4.6
"""That of whole numbers from -8 to 7."""
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1}
_FREE = 6 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """What `prepare` noted. config: a config.json. bits: of a number in a large matrix. files: bytes by name."""

    name: str
    config: Mapping[str, Any]
    files: Mapping[str, int]
    arithmetic: str
    bits: float
    target: float | None

    @property
    def weight_bytes(self) -> int:
        return sum(self.files.values())


def read_shape(folder: Path, name: str) -> Shape:
    """NAME.json of the folder."""
    return Shape(name, **json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def work_folder() -> Path:
    """A new folder in memory where the system has such, else on the disk."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix="cierzo-weights-", dir=place))


def made(bench: Bench, folder: Path, shape: Shape, work: Path) -> Path:
    """The whole bundle in `work`, made unless it is there; others there go first.

    Raises OSError where neither `work` nor the disk has room.
    """
    target, done = work / shape.name, work / f"{shape.name}.done"
    if done.is_file():
        return Path(done.read_text(encoding="utf-8"))
    for other in work.glob("*.done"):
        shutil.rmtree(other.read_text(encoding="utf-8"), ignore_errors=True)
        other.unlink()
    if shutil.disk_usage(work).free < shape.weight_bytes + (0 if bench.small else _FREE):
        target = Path(tempfile.mkdtemp(prefix="cierzo-weights-")) / shape.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / shape.name, target)
    for file, nbytes in shape.files.items():
        header = target / f"{file}{HEADER}"
        _fill(bench, header.read_bytes(), target / file, nbytes)
        header.unlink()
    done.write_text(str(target), encoding="utf-8")
    return target


def _fill(bench: Bench, header: bytes, path: Path, nbytes: int) -> None:
    entries: dict[str, Any] = json.loads(header[8:])
    entries.pop("__metadata__", None)
    with path.open("wb") as file:
        file.write(header)
        for name, entry in sorted(entries.items(), key=lambda item: int(item[1]["data_offsets"][0])):
            begin, end = entry["data_offsets"]
            file.seek(len(header) + begin)
            _draw(bench, file, name, entry, (end - begin) // _BYTES[entry["dtype"]])
        file.truncate(nbytes)


def _draw(bench: Bench, file: Any, name: str, entry: Mapping[str, Any], count: int) -> None:
    torch, dtype = bench.torch, entry["dtype"]
    generator = torch.Generator(device=bench.where).manual_seed((bench.book.seed + zlib.crc32(name.encode())) % 2**31)
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}[dtype]
    for first in range(0, count, _AT_ONCE):
        drawn = torch.empty(min(_AT_ONCE, count - first), dtype=kind, device=bench.where)
        if dtype == "U8":
            drawn.random_(0, 256, generator=generator)
        elif name.endswith(".scale"):
            drawn.uniform_(0.5 * _SPREAD / _INT4_SPREAD, 1.5 * _SPREAD / _INT4_SPREAD, generator=generator)
        elif len(entry["shape"]) == 1:
            drawn.normal_(1, 0.1, generator=generator)
        else:
            drawn.normal_(0, _SPREAD, generator=generator)
        file.write(memoryview(drawn.view(torch.uint8).cpu().numpy()))
