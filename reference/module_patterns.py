"""Names of modules in a quantization_config: exact ones, classes, and regular expressions marked by "re:".

As in compressed-tensors (https://github.com/vllm-project/compressed-tensors, utils/match.py): an expression must match
from the beginning of the name and may end anywhere; anything else is the whole name of a module, or that of a class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from reference.config_reader import ConfigReader

_CLASSES = ("Linear", "LinearBase", "Module")
"""Names of the classes that every linear layer is of."""

_MARK = "re:"
_LONGEST = 500
_MOST_REPEATS = 4
_ESCAPED = re.compile(r"\\.|\[[^\]]*\]")


@dataclass(frozen=True, slots=True)
class Pattern:
    """One entry of such a list, as it is written."""

    text: str

    def matches(self, module: str) -> bool:
        """Whether the linear layer `module` is meant."""
        if self.text.startswith(_MARK):
            return _compiled(self.text.removeprefix(_MARK)).match(module) is not None
        return self.text == module or self.text in _CLASSES


def read_patterns(reader: ConfigReader, key: str, names: Sequence[str]) -> tuple[Pattern, ...]:
    """The patterns `names`, which `key` lists.

    Raises ConfigError for an expression that is none, or that could take forever: repeats of a group that repeats
    itself make the time of a match grow exponentially, and a file from elsewhere must not do that.
    """
    for name in names:
        if not name.startswith(_MARK):
            continue
        expression = name.removeprefix(_MARK)
        plain = _ESCAPED.sub("x", expression)
        repeats = len(re.findall(r"[*+{]", plain))
        if len(expression) > _LONGEST or repeats > _MOST_REPEATS or re.search(r"\)[*+{]", plain):
            reader.refuse(
                key,
                f"an expression in it repeats a group, or more than {_MOST_REPEATS} times something, which may take "
                "forever to match",
                "List the modules by their names, or by simpler expressions.",
            )
        try:
            _compiled(expression)
        except (re.error, OverflowError, RecursionError):
            reader.refuse(key, "an expression in it is not valid", "Check the file against the published one.")
    return tuple(Pattern(name) for name in names)


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)
