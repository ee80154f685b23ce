"""At which context lengths an engine is measured: asked for, or chosen from the windows; and what does not fit.

Letters: W window.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from exporter.bench.report import LeftOut
from runtime.errors import InputError
from runtime.manifest import KVInfo
from runtime.position_limits import MAX_POSITION

SHORT = 128
_WINDOWS = (1, 4, 32)
READ_AGAIN = 8192
"""Texts up to so many tokens are read in every round. Longer ones are read once, and decode there is measured in as
many groups as there are rounds, one after the other."""

_LENGTH = re.compile(r"([0-9]{1,9})(w?)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Plan:
    """again: contexts of every round. once: contexts of the last round only. Both ascend, `once` goes on from `again`.

    chosen: nobody asked for these lengths.
    """

    again: tuple[int, ...]
    once: tuple[int, ...]
    left_out: tuple[LeftOut, ...]
    chosen: bool


def plan_contexts(asked: str | None, kv: KVInfo, *, decode_tokens: int, rounds: int) -> Plan:
    """Contexts for a bundle with these buffers. asked: lengths separated by commas, each in tokens or as `4w` for 4 W.

    W is the widest window. By default 128, W, 4 W and 32 W, or in a model that has layers without a window 128, a
    quarter of its context, and all of it but the tokens to decode.
    Raises InputError for a length that is none, and when nothing that was asked for fits.
    """
    windows = [layer.window for layer in kv.layers if layer.window is not None]
    window = max(windows, default=None)
    limit = position_limit(kv)
    if asked is not None:
        lengths = [_parsed(word.strip(), window) for word in asked.split(",")]
    elif kv.context is None and window is not None:
        lengths = [SHORT, *(times * window for times in _WINDOWS)]
    else:
        longest = limit - decode_tokens
        longest = longest if longest <= READ_AGAIN else limit - rounds * decode_tokens
        lengths = [length for length in (SHORT, limit // 4, longest) if 0 < length <= longest] or [1]
    again: list[int] = []
    once: list[int] = []
    left_out: list[LeftOut] = []
    for length in sorted(set(lengths)):
        needed = length + decode_tokens * (1 if length <= READ_AGAIN else rounds)
        if needed > limit:
            left_out.append(LeftOut(f"context {length:,}", _too_long(length, needed - length, limit)))
        else:
            (again if length <= READ_AGAIN else once).append(length)
    if not again and not once:
        raise InputError(f"There is no context to measure at: {left_out[0].reason}")
    return Plan(tuple(again), tuple(once), tuple(left_out), asked is None)


def position_limit(kv: KVInfo) -> int:
    """The first position that must not be fed."""
    return min(limit for limit in (kv.context, kv.position_limit, MAX_POSITION) if limit is not None)


def _parsed(word: str, window: int | None) -> int:
    match = _LENGTH.fullmatch(word)
    if match is None or int(match.group(1)) == 0:
        raise InputError(
            f"{word!r} is no context length. Give whole numbers of tokens separated by commas, such as 128,4096; 4w "
            "stands for four windows."
        )
    if not match.group(2):
        return int(match.group(1))
    if window is None:
        raise InputError(f"{word!r} is a number of windows, but no layer of this model has one. Give tokens instead.")
    return int(match.group(1)) * window


def _too_long(length: int, decoded: int, limit: int) -> str:
    return (
        f"{length:,} tokens and {decoded:,} to decode are more than the {limit:,} positions that this bundle has. "
        "Choose a shorter context or decode fewer tokens; with full attention, export again with a larger --context."
    )
