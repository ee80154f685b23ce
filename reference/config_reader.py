"""Reading one value of a config.json with its type checked, and the one way in which a config is refused.

JSON knows booleans, numbers, strings, lists and objects; Python lets `True` pass for 1 and `4096.0` for 4096. A config
that says either where an integer belongs was written by mistake, and guessing what was meant would be one as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from runtime.errors import ConfigError


class Absent:
    """The type of `ABSENT`."""


ABSENT: Final = Absent()
"""Default of a key that has none: not being there is then refused."""

LARGEST_INTEGER: Final = 2**31 - 1
"""Sizes, counts and positions beyond this are damage: no tensor has such an extent, and no text such a length."""

LARGEST_NUMBER: Final = 3.0e38
"""Numbers are taken in float32, which ends a little above."""


def refuse(key: str, value: object, cause: str, way_out: str) -> NoReturn:
    """Raise ConfigError with one paragraph: the key, the value that was found, why it cannot be, and the way out."""
    raise ConfigError(f"config.json says {key} = {shown(value)}, but {cause}. {way_out}")


def shown(value: object) -> str:
    """`value` as JSON spells it, cut to one short line."""
    try:
        text = json.dumps(value, default=repr)  # escaped, since a character may turn the line round
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return f"({type(value).__name__})"
    return text if len(text) <= 80 else text[:77] + "..."


class ConfigReader:
    """Typed access to one JSON object; `prefix` names the object in messages ("rope_scaling." or "")."""

    def __init__(self, mapping: Mapping[str, Any], prefix: str = "") -> None:
        self.mapping = mapping
        self.prefix = prefix

    def refuse(self, key: str, cause: str, way_out: str) -> NoReturn:
        """Refuse the value of `key`; raises ConfigError."""
        refuse(self.prefix + key, self.mapping.get(key), cause, way_out)

    def _get(self, key: str, default: object) -> object:
        if key in self.mapping:
            return self.mapping[key]
        if isinstance(default, Absent):
            raise ConfigError(
                f"config.json has no {self.prefix}{key}, which this kind of model needs. "
                "Copy the config.json that was published with the weights."
            )
        return default

    def integer(self, key: str, default: int | Absent = ABSENT, *, least: int = 1, most: int = LARGEST_INTEGER) -> int:
        """The integer under `key`, `least` to `most`. Raises ConfigError for null, booleans, floats and strings."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(key, "an integer belongs there", "Write the number without quotes or a decimal point.")
        if value < least:
            self.refuse(key, f"it must be at least {least}", "Check the file against the published one.")
        if value > most:
            self.refuse(key, f"no model has more than {most:,}", "Check the file against the published one.")
        return value

    def optional_integer(self, key: str, default: int | None = None, *, least: int = 1) -> int | None:
        """As `integer`, with null (and by default absence) read as None."""
        return (
            None
            if self._get(key, default) is None
            else self.integer(key, ABSENT if default is None else default, least=least)
        )

    def number(self, key: str, default: float | Absent = ABSENT) -> float:
        """The finite number above zero under `key`. Raises ConfigError for anything else."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(key, "a number belongs there", "Write the number without quotes.")
        # Compared, not converted: an integer may be too large for a float. NaN is in no range.
        if not 0 < value <= LARGEST_NUMBER:
            self.refuse(key, "it must be finite and greater than zero", "Check the file against the published one.")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """As `number`, with null and absence read as None."""
        return None if self._get(key, None) is None else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        """The boolean under `key`. Raises ConfigError for anything else, 0 and 1 included."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false belongs there", "Write true or false.")
        return value

    def string(self, key: str, default: str | Absent = ABSENT) -> str:
        """The string under `key`. Raises ConfigError for anything else."""
        value = self._get(key, default)
        if not isinstance(value, str):
            self.refuse(key, "a string belongs there", "Check the file against the published one.")
        return value

    def optional_mapping(self, key: str) -> dict[str, Any]:
        """The object under `key`; null, absence and {} are all {}. Raises ConfigError for anything else."""
        value = self._get(key, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(key, "an object or null belongs there", "Check the file against the published one.")
        return value

    def optional_strings(self, key: str) -> tuple[str, ...] | None:
        """The list of strings under `key`, None for null and absence. Raises ConfigError for anything else."""
        value = self._get(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(key, "a list of strings or null belongs there", "Check the file against the published one.")
        return tuple(value)

    def token_ids(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """An id, a list of ids or null under `key`, as a tuple without repetitions. Raises ConfigError otherwise."""
        if key not in self.mapping:
            return default
        value = self.mapping[key]
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
            self.refuse(key, "a token id, a list of token ids or null belongs there", "Write ids of 0 or more.")
        return tuple(dict.fromkeys(ids))
