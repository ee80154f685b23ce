"""Seeded damage to safetensors files, and to the file system: what may lie where a file belongs."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.support.mutate import Object, mutate_bytes, mutate_tree, parse, places, write


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header text and tensor bytes of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    """The safetensors file of both."""
    return struct.pack("<Q", len(header)) + header + data


def _many(random: Random, tree: Object) -> None:
    entry = Object([("dtype", "F32"), ("shape", [0]), ("data_offsets", [0, 0])])
    tree += [(f"extra.{number}", entry) for number in range(random.choice((1, 100, 5000)))]


def _entry_of_shape(random: Random, tree: Object) -> None:
    shape = random.choice(
        (
            [2**32, 2**32],
            [2**63, 2],
            [0, 2**62, 2**62],
            [10**30],
            [1] * 65,
            [1] * 4000,
            [2] * 4000,
            [3**20] * 3,
            [0] * 9,
        )
    )
    offsets = random.choice(([0, 0], [0, 4], [0, 2**63], [2**64, 2**64], [4, 0], [-4, 0], [0, 10**30], [0, 1, 2], []))
    name = random.choice(("", "a/b", "../x", "x" * 100_000, "nul\x00", "a\nb", "\u202e", "extra"))
    tree.append((name, Object([("dtype", "F32"), ("shape", shape), ("data_offsets", offsets)])))


def _dtype(random: Random, tree: Object) -> None:
    names = ("F4", "f32", "", "F32 ", "I64", "F64", "BF16", "BOOL", "F8_E4M3", "U8", None, 4, ["F32"], "x" * 100_000)
    description = random.choice(tree)[1]
    if isinstance(description, Object):
        description[:] = [(key, random.choice(names) if key == "dtype" else value) for key, value in description]


def _shift(random: Random, tree: Object) -> None:
    by = random.choice((1, -1, 4, -4, 2**40, -(2**63)))
    for _, description in random.sample(tree, min(len(tree), random.choice((1, 2, len(tree))))):
        for place in places(description):
            if isinstance(place.parent, list) and isinstance(place.value, int) and random.random() < 0.5:
                place.put(place.value + by)


def mutate_safetensors(random: Random, content: bytes) -> bytes:
    """Damage the length field, the header's bytes or structure (with a fitting length), or the whole file's bytes."""
    header, data = split(content)
    kind = random.randrange(10)
    if kind == 0:
        return mutate_bytes(random, content)
    if kind == 1:
        old = len(header)
        lengths = (0, 1, old - 1, old + 1, old * 2, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1, len(content), 1 << 24)
        return struct.pack("<Q", random.choice(lengths)) + header + data
    if kind == 2:
        return join(mutate_bytes(random, header), data)
    tree = parse(header)
    if kind <= 5:
        random.choice((_many, _entry_of_shape, _dtype, _shift))(random, tree)
    else:
        tree = mutate_tree(random, tree)
    return join(write(tree).encode("utf-8"), data)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _link(file: Path, target: str) -> None:
    file.unlink()
    file.symlink_to(target)


def _sparse(file: Path) -> None:
    os.truncate(file, 1 << 36)


def _locked(file: Path) -> None:
    file.chmod(0)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "a folder": _folder,
    "a pipe": _pipe,
    "a sparse giant": _sparse,
    "without rights": _locked,
    "a link to itself": lambda file: _link(file, file.name),
    "a link to nothing": lambda file: _link(file, "nowhere"),
    "a link to its folder": lambda file: _link(file, "."),
    "a link to a device": lambda file: _link(file, "/dev/zero"),
}
"""What may lie where a file belongs; each puts itself in the place of the file that is given."""
