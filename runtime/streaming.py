"""Text out, piece by piece: whole characters only, and an end at stop strings.

Decoding tokens one by one fails in two ways: a character may be spread over several tokens (each alone decodes to
U+FFFD), and sentencepiece-like decoders drop the space in front of the first token. So new tokens are decoded together
with the tokens just before them, and only what the longer text adds is emitted. Example, with the emoji 😀 in two
tokens:

    context  new tokens   text of both   emitted
    ▁so      ▁good        "so good"      " good"
    ▁good    😀₁          "good�"        nothing yet: it ends in U+FFFD
    ▁good    😀₁ 😀₂      "good😀"       "😀"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
_UTF8_LENGTH = 4
_CONTEXT_TOKENS = 8


class Decoder(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`."""
        ...


class IncrementalDetokenizer:
    """Turns ids into text as they come.

    context_ids: the end of the prompt that the text continues (empty: the text begins here, and a sentencepiece-like
    decoder then drops its first space).
    """

    def __init__(self, decoder: Decoder, context_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._context = list(context_ids)[-_CONTEXT_TOKENS:]
        self._held: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, possibly empty."""
        self._held.append(token_id)
        pieces = []
        while self._held:
            text = self._text_of_held()
            if not text.endswith(REPLACEMENT):
                pieces.append(self._commit(len(self._held), text))
                break
            whole = text.rstrip(REPLACEMENT)
            pieces.append(whole[self._emitted :])
            self._emitted = max(self._emitted, len(whole))
            if whole:
                self._let_go(text)
                break
            if len(self._held) < _UTF8_LENGTH:
                break
            # No character has more than four bytes: the first token held can never become one. Let go of it.
            pieces.append(self._commit(1, REPLACEMENT))
        return "".join(pieces)

    def flush(self) -> str:
        """The rest at the end of the text; a character that was never completed appears as U+FFFD."""
        rest = ""
        while self._held:
            text = self._text_of_held()
            ends = (self._decoder.decode(self._held[first:]) for first in range(1, len(self._held)))
            if text.strip(REPLACEMENT) or not any(end.strip(REPLACEMENT) for end in ends):
                return rest + self._commit(len(self._held), text)
            # A broken byte hides what follows it (see _text_of_held): let go of it first.
            rest += self._commit(1, REPLACEMENT)
        return rest

    def _let_go(self, text: str) -> None:
        """Commit the older of many tokens that all end amid a character, as a model may repeat " \\xd0" for ever: else
        each push would decode them all. Only such whose text the newer ones no longer change."""
        older = self._held[:-_UTF8_LENGTH]
        if len(older) > _CONTEXT_TOKENS:
            done = self._text_of(older)
            if text.startswith(done) and len(done) <= self._emitted:
                emitted = self._emitted - len(done)
                self._commit(len(older), done)
                self._emitted = emitted

    def _text_of_held(self) -> str:
        return self._text_of(self._held)

    def _text_of(self, ids: list[int]) -> str:
        context = self._decoder.decode(self._context)
        both = self._decoder.decode(self._context + ids)
        text = both[len(context) :] if both.startswith(context) else self._decoder.decode(ids)
        if text.endswith(REPLACEMENT):
            # A byte-fallback decoder turns a whole run of byte tokens into U+FFFD when any of it is invalid, so an
            # invalid context would hide a character that is whole by itself.
            alone = self._decoder.decode(ids)
            if not alone.endswith(REPLACEMENT):
                return alone
        return text

    def _commit(self, count: int, text: str) -> str:
        done, self._held = self._held[:count], self._held[count:]
        # Tokens without text (special ones) say nothing about a following space, so older context stays.
        self._context = done[-_CONTEXT_TOKENS:] if text else (self._context + done)[:_CONTEXT_TOKENS]
        piece, self._emitted = text[self._emitted :], 0
        return piece


class StopStringFilter:
    """Passes text on until a stop string is complete; what follows its beginning is dropped.

    Only the longest end of the text that may still become a stop string is held back. When several stop strings are
    there, the one that is complete first counts (of equal ends, the longest), so that the borders between the pieces
    make no difference.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, text: str) -> str:
        """The text that may be shown now; nothing after a stop string."""
        if self.stopped_by is not None:
            return ""
        self._held += text
        starts = [(self._held.find(stop), stop) for stop in self._stop_strings]
        found = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if found:
            _, start, self.stopped_by = min(found)
            shown, self._held = self._held[:start], ""
            return shown
        size = max((_overlap(self._held, stop) for stop in self._stop_strings), default=0)
        border = len(self._held) - size
        shown, self._held = self._held[:border], self._held[border:]
        return shown

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


class TextStreamer:
    """Detokenizer and stop-string filter in a row."""

    def __init__(self, decoder: Decoder, context_ids: Sequence[int], stop_strings: Sequence[str]) -> None:
        self._detokenizer = IncrementalDetokenizer(decoder, context_ids)
        self._filter = StopStringFilter(stop_strings)

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._filter.stopped_by is not None

    def push(self, token_id: int) -> str:
        """The text that may be shown after `token_id`."""
        return self._filter.push(self._detokenizer.push(token_id))

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        return self._filter.push(self._detokenizer.flush()) + self._filter.flush()
