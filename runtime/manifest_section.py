"""Typed access to the JSON objects of a manifest: whatever is missing or mistyped is a BundleError that names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from runtime.errors import BundleError
from runtime.json_files import brief

_T = TypeVar("_T")
_MOST = 1 << 53
"""Integers up to here are the same number to every reader of JSON; no size of anything comes near."""

_HASH = re.compile(r"[0-9a-f]{64}")


class Section:
    """A JSON object with typed access: a wrong or missing value raises a BundleError naming the path to it."""

    def __init__(self, data: Mapping[str, Any], path: str) -> None:
        self.data = data
        self.path = path

    def _typed(self, key: str, kind: type[_T], words: str) -> _T:
        value = self.data.get(key)
        # bool is an int to Python; a manifest that says `true` for a size is damaged all the same.
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "missing" if key not in self.data else f"{brief(value)}"
            raise BundleError(
                f"The manifest's `{self.path}{key}` must be {words}, but it is {found}. Export the checkpoint again."
            )
        return value

    def integer(self, key: str, *, minimum: int) -> int:
        value = self._typed(key, int, "an integer")
        if not minimum <= value <= _MOST:
            border = f"below {minimum}" if value < minimum else f"above {_MOST}"
            raise BundleError(
                f"The manifest's `{self.path}{key}` is {value}, but it cannot be {border}. Export the checkpoint again."
            )
        return value

    def boolean(self, key: str) -> bool:
        value = self.data.get(key)
        if not isinstance(value, bool):
            found = "missing" if key not in self.data else f"{brief(value)}"
            raise BundleError(
                f"The manifest's `{self.path}{key}` must be true or false, but it is {found}. "
                "Export the checkpoint again."
            )
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
            raise BundleError(
                f"The manifest's `{self.path}{key}` is {brief(value)}, but this Cierzo knows only {', '.join(known)}. "
                "Upgrade Cierzo, or export the checkpoint again with one of these."
            )
        return value

    def optional_string(self, key: str) -> str | None:
        if key in self.data and self.data[key] is None:
            return None
        return self.string(key)

    def hash(self, key: str) -> str:
        value = self.string(key)
        if not _HASH.fullmatch(value):
            raise BundleError(
                f"The manifest's `{self.path}{key}` must be 64 hexadecimal digits in lower case, but it is "
                f"{brief(value)}. Export the checkpoint again."
            )
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
            raise BundleError(f"The manifest's `{self.path}{key}` must hold strings only. Export the checkpoint again.")
        return values

    def section(self, key: str) -> Section:
        return Section(self._typed(key, dict, "an object"), f"{self.path}{key}.")
