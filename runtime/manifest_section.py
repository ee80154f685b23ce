"""Typed access to the JSON objects of a bundle: whatever is missing or mistyped is a BundleError that names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from runtime.errors import BundleError
from runtime.json_files import brief

_T = TypeVar("_T")
_MOST = 1 << 53
"""Integers up to here are the same number to every reader of JSON; no size of anything comes near."""

_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Document:
    """A file that objects are read from: what messages call it, and what makes a sound one."""

    name: str
    remedy: str


MANIFEST = Document("The manifest", "Export the checkpoint again")


class Section:
    """A JSON object with typed access: a wrong or missing value raises a BundleError naming the path to it."""

    def __init__(self, data: Mapping[str, Any], path: str, document: Document = MANIFEST) -> None:
        self.data = data
        self.path = path
        self.document = document

    def _damaged(self, key: str, fault: str) -> BundleError:
        return BundleError(f"{self._called(key)} {fault}. {self.document.remedy}.")

    def _called(self, key: str) -> str:
        return f"{self.document.name}'s `{self.path}{key}`"

    def _typed(self, key: str, kind: type[_T], words: str) -> _T:
        value = self.data.get(key)
        # bool is an int to Python; a manifest that says `true` for a size is damaged all the same.
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "missing" if key not in self.data else f"{brief(value)}"
            raise self._damaged(key, f"must be {words}, but it is {found}")
        return value

    def integer(self, key: str, *, minimum: int) -> int:
        value = self._typed(key, int, "an integer")
        if not minimum <= value <= _MOST:
            border = f"below {minimum}" if value < minimum else f"above {_MOST}"
            raise self._damaged(key, f"is {value}, but it cannot be {border}")
        return value

    def boolean(self, key: str) -> bool:
        value = self.data.get(key)
        if not isinstance(value, bool):
            found = "missing" if key not in self.data else f"{brief(value)}"
            raise self._damaged(key, f"must be true or false, but it is {found}")
        return value

    def optional_integer(self, key: str, *, minimum: int) -> int | None:
        if key in self.data and self.data[key] is None:
            return None
        return self.integer(key, minimum=minimum)

    def string(self, key: str) -> str:
        return self._typed(key, str, "a string")

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        value = self.string(key)
        if value not in known:
            remedy = self.document.remedy[0].lower() + self.document.remedy[1:]
            raise BundleError(
                f"{self._called(key)} is {brief(value)}, but this Cierzo knows only {', '.join(known)}. "
                f"Upgrade Cierzo, or {remedy} with one of these."
            )
        return value

    def optional_string(self, key: str) -> str | None:
        if key in self.data and self.data[key] is None:
            return None
        return self.string(key)

    def hash(self, key: str) -> str:
        value = self.string(key)
        if not _HASH.fullmatch(value):
            raise self._damaged(key, f"must be 64 hexadecimal digits in lower case, but it is {brief(value)}")
        return value

    def optional_hash(self, key: str) -> str | None:
        if key in self.data and self.data[key] is None:
            return None
        return self.hash(key)

    def items(self, key: str) -> list[Any]:
        return self._typed(key, list, "a list")

    def strings(self, key: str) -> list[str]:
        values = self.items(key)
        if not all(isinstance(value, str) for value in values):
            raise self._damaged(key, "must hold strings only")
        return values

    def section(self, key: str) -> Section:
        return Section(self._typed(key, dict, "an object"), f"{self.path}{key}.", self.document)

    def sections(self, key: str) -> list[Section]:
        """The objects of a list."""
        found = []
        for index, item in enumerate(self.items(key)):
            if not isinstance(item, dict):
                raise self._damaged(f"{key}[{index}]", "must be an object")
            found.append(Section(item, f"{self.path}{key}[{index}].", self.document))
        return found
