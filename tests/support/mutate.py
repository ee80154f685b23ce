"""Seeded damage to bytes and to the structure of JSON.

Every mutator takes a `random.Random` and old content and returns new content, so a seed replays a case exactly. JSON
is held as `Object` (a list of pairs) with `Raw` leaves, since the most interesting texts cannot be held in a dict: a
key that is there twice, NaN, 1e999, a hundred thousand brackets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any

Mutator = Callable[[Random, bytes], bytes]
"""Damages the content of a file."""


class Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, in order."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A piece of text that goes into the file as it is."""

    text: str


NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 1.5, -0.0, 1e-320, 1e308, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**9,
    10**18, 10**30, "", " ", "null", "1", "x" * 100_000, "a\nb\x1b[31m", "nul\x00", "\u202e", "é", "\U0001f600",
    "../x", "/etc/passwd", ".", "..", "C:\\x", "a/b", "~", "~nobody-here/x", "x" * 300, "config.json", "params.json",
    "model.safetensors.index.json", "consolidated.safetensors", "float32",
    [], [[]], [None], [0], [-1], [2**63], ["x"], [True], [1.0], list(range(3000)), Object(), Object([("a", 1)]),
    Object([("", Object())]), Raw("-0"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-1E400"),
    Raw("9" * 41), Raw("9" * 4301), Raw("-" + "9" * 100_000), Raw("0." + "1" * 5000), Raw('"\\ud800"'),
    Raw('"\\udc00\\ud800"'), Raw('"\\ud83d\\ude00"'), Raw('"\\u0000"'), Raw("[" * 100_000 + "]" * 100_000),
    Raw("[" * 100_000), Raw('{"a":' * 50_000 + "1" + "}" * 50_000), Raw("[" * 900 + "]" * 900), Raw("01"), Raw("+1"),
    Raw("1."), Raw(".5"), Raw("0x10"), Raw("'x'"), Raw("undefined"), Raw("True"), Raw("// no comment\n1"), Raw(""),
    Raw('{"a":1,"a":2}'), Raw('"\t"'),
)  # fmt: skip
"""Values that have broken a reader somewhere: of another type, at the ends of a type, or no JSON at all."""


def parse(text: str | bytes) -> Any:
    """The JSON `text` with its objects as `Object`."""
    return json.loads(text, object_pairs_hook=Object)


def write(node: Any) -> str:
    """The text of a tree of `Object`, list, `Raw` and plain values."""
    if isinstance(node, Raw):
        return node.text
    if isinstance(node, Object):
        return "{" + ", ".join(f"{json.dumps(key)}: {write(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(write, node)) + "]"
    return json.dumps(node)


# ---------------------------------------------------------------------------------------------- JSON trees


@dataclass(frozen=True, slots=True)
class Place:
    """One value of a tree: entry `index` of `parent`."""

    parent: list[Any]
    index: int

    @property
    def value(self) -> Any:
        entry = self.parent[self.index]
        return entry[1] if isinstance(self.parent, Object) else entry

    def put(self, value: Any) -> None:
        in_object = isinstance(self.parent, Object)
        self.parent[self.index] = (self.parent[self.index][0], value) if in_object else value


def places(tree: Any) -> list[Place]:
    """Every value below `tree`, parents first."""
    found: list[Place] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            found += [Place(node, index) for index in range(len(node))]
            pending += [place.value for place in found[len(found) - len(node) :]]
    return found


def _nasty(random: Random) -> Any:
    return deepcopy(random.choice(NASTY))  # a copy, since a later step may damage it further


def _replace(random: Random, tree: Any, place: Place) -> None:
    place.put(_nasty(random))


def _nudge(random: Random, tree: Any, place: Place) -> None:
    """A number becomes another one of its neighbourhood; anything else its text, or a list of it."""
    value = place.value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = value if abs(value) < 1e200 else 1  # an earlier step may have left infinity
        factor = random.choice((0, -1, 2, 3, 1000, 0.5, 1e9))
        place.put(random.choice((value + 1, value - 1, value * factor, int(value * factor), float(value), str(value))))
    else:
        place.put(random.choice((str(value)[:50], [value], Object([("value", value)]), None)))


def _delete(random: Random, tree: Any, place: Place) -> None:
    del place.parent[place.index]


def _duplicate(random: Random, tree: Any, place: Place) -> None:
    entry = place.parent[place.index]
    if isinstance(place.parent, Object) and random.random() < 0.5:
        entry = (entry[0], _nasty(random))
    place.parent.insert(random.randrange(len(place.parent) + 1), entry)


def _add(random: Random, tree: Any, place: Place) -> None:
    key = random.choice(("invented", "", "__metadata__", "x" * 100_000, "../x", "a\nb", "nul\x00", "rope_theta", "é"))
    entry = (key, _nasty(random)) if isinstance(place.parent, Object) else _nasty(random)
    place.parent.insert(random.randrange(len(place.parent) + 1), entry)


def _rename(random: Random, tree: Any, place: Place) -> None:
    if isinstance(place.parent, Object):
        key, value = place.parent[place.index]
        names = ("", " ", key.upper(), key + "_", key[:-1], "../" + key, "\x00", "\u202e", "__metadata__", "x" * 400)
        place.parent[place.index] = (random.choice(names), value)


def _swap(random: Random, tree: Any, place: Place) -> None:
    other = random.choice(places(tree))
    ours, theirs = place.value, other.value
    if not isinstance(ours, list) and not isinstance(theirs, list):  # a list put into itself has no text
        place.put(theirs)
        other.put(ours)


_TREE_MUTATORS: tuple[Callable[[Random, Any, Place], None], ...] = (
    _replace, _replace, _replace, _nudge, _nudge, _delete, _duplicate, _add, _rename, _swap,
)  # fmt: skip


def mutate_tree(random: Random, tree: Any) -> Any:
    """Damage `tree` in one to three places, or now and then replace all of it."""
    if random.random() < 0.02:
        return _nasty(random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        found = places(tree)
        if not found:
            break
        random.choice(_TREE_MUTATORS)(random, tree, random.choice(found))
    return tree


# ---------------------------------------------------------------------------------------------- bytes


def mutate_bytes(random: Random, content: bytes) -> bytes:
    """Flip, insert, delete, repeat or cut bytes, or spell the whole in another encoding."""
    kind = random.randrange(9)
    if kind == 7:
        return random.choice((b"\xef\xbb\xbf" + content, content.decode("latin-1").encode("utf-16"), b"", b"\x00" * 64))
    if kind == 8:
        return random.choice(
            (content + b"\x00", content + b"{}", content * 2, content + b"," + content, b" " + content)
        )
    damaged = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(damaged) + 1)
        size = random.choice((1, 1, 4, 40))
        if kind <= 1:
            damaged[at : at + 1] = bytes(byte ^ 1 << random.randrange(8) for byte in damaged[at : at + 1])
        elif kind == 2:
            damaged[at:at] = random.choice((random.randbytes(size), b'"', b"{", b"]", b"\\", b"\xff", b"9" * 5000))
        elif kind == 3:
            del damaged[at : at + size]
        elif kind == 4:
            del damaged[at:]
        elif kind == 5:
            damaged[at:at] = damaged[at : at + size]
        else:
            damaged[at : at + size] = random.choice((b"\xff", b"\x00", b"[")) * size
    return bytes(damaged)


def mutate_json(random: Random, content: bytes) -> bytes:
    """Damage the file of a JSON value: mostly its structure, else its bytes."""
    if random.random() < 0.25:
        return mutate_bytes(random, content)
    return write(mutate_tree(random, parse(content))).encode("utf-8")


def mutate_sizes(random: Random, content: bytes) -> bytes:
    """Make one of the integers far larger than anything that could be held in memory for it."""
    tree = parse(content)
    sizes = [place for place in places(tree) if type(place.value) is int]
    random.choice(sizes).put(random.choice((10**7, 2**31 - 1, 10**9, 10**12, 2**63 - 1, 10**18, 10**38)))
    return write(tree).encode("utf-8")


def grafting(donors: Sequence[bytes]) -> Mutator:
    """As `mutate_json`, often with entries of the JSON objects `donors` put in: known keys where they do not belong."""
    pool = sorted({(key, write(value)) for donor in donors for key, value in parse(donor)})

    def mutate_grafted(random: Random, content: bytes) -> bytes:
        if random.random() < 0.5:
            return mutate_json(random, content)
        tree = parse(content)
        objects = [tree, *(place.value for place in places(tree) if isinstance(place.value, Object))]
        for _ in range(random.choice((1, 1, 2))):
            key, text = random.choice(pool)
            into = random.choice((tree, random.choice(objects)))
            into[:] = [entry for entry in into if entry[0] != key] + [(key, parse(text))]
        if random.random() < 0.3:
            tree = mutate_tree(random, tree)
        return write(tree).encode("utf-8")

    return mutate_grafted
