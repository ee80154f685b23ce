"""Names of modules in a quantization_config: exact ones, classes, and regular expressions marked by "re:".

As in compressed-tensors (https://github.com/vllm-project/compressed-tensors, utils/match.py): an expression must match
from the beginning of the name and may end anywhere; anything else is the whole name of a module, or that of a class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from reference.config_reader import ConfigReader, shown

_CLASSES = ("Linear", "LinearBase", "Module")
"""Names of the classes that every linear layer is of."""

_MARK = "re:"
_MOST_WAYS = 10**8
_NAME_LENGTH = 64
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

    Raises ConfigError for an expression that is none, or that could be matched in so many ways that trying them all
    takes forever, which a file from elsewhere must not do.
    """
    for name in names:
        if not name.startswith(_MARK):
            continue
        expression = name.removeprefix(_MARK)
        if _ways(expression) > _MOST_WAYS:
            reader.refuse(
                key,
                f"the expression {shown(expression)} can match in too many ways to try them all",
                "List the modules by their names, or by simpler expressions.",
            )
        try:
            _compiled(expression)
        except (re.error, OverflowError, RecursionError):
            reader.refuse(
                key, f"{shown(expression)} is no regular expression", "Check the file against the published one."
            )
    return tuple(Pattern(name) for name in names)


def _ways(expression: str) -> int:
    """An upper estimate of the ways in which `expression` can match the beginning of a name."""
    plain = _ESCAPED.sub("x", expression)
    if re.search(r"\)[*+{]", plain):  # what repeats inside of what repeats multiplies at every letter
        return _MOST_WAYS + 1
    repeats, optional, groups = len(re.findall(r"[*+{]", plain)), plain.count("?"), plain.count("(")
    ways: int = _NAME_LENGTH ** min(repeats, 9) * 2 ** min(optional, 99) * (plain.count("|") + 1) ** min(groups, 99)
    return ways


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)
