"""The decode loop, for ids, batches and text.

One loop (`decode`) serves all three: feed, choose a token per unfinished row, feed these, and so on. Finished rows
idle with an empty feed. The last token chosen is not fed, because nobody asks what follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from runtime.chunking import Int64Array
from runtime.errors import InputError, SessionError
from runtime.sampling import Candidates, Sampler, SamplingOptions
from runtime.streaming import TextStreamer
from runtime.token_rows import TokenIds

if TYPE_CHECKING:
    from runtime.session import Session

FinishReason: TypeAlias = Literal["stop_id", "stop_string", "length"]


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What a text generation came to: the whole text, its ids (the stop id included), and why it ended."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason


class Row:
    """The progress of one row: what it chose, and whether it has finished."""

    def __init__(
        self, options: SamplingOptions, stop_ids: frozenset[int], index: int, text: TextStreamer | None
    ) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.sampler = Sampler(options, row=index)
        self._limit = options.max_new_tokens
        self._stop_ids = stop_ids
        self._text = text

    def take(self, token_id: int) -> str:
        """Record a token; returns the text that may be shown ("" when no text was asked for)."""
        self.token_ids.append(token_id)
        shown = ""
        if token_id in self._stop_ids:
            self.finish_reason = "stop_id"
        elif self._text is not None:
            shown = self._text.push(token_id)
            if self._text.stopped:
                self.finish_reason = "stop_string"
        if self.finish_reason is None and len(self.token_ids) == self._limit:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._text is not None:
            shown += self._text.flush()
            # The rest may complete a stop string only now, when a held character turns out to be broken.
            if self._text.stopped:
                self.finish_reason = "stop_string"
        return shown


def generate(session: Session, prompt_ids: TokenIds, options: SamplingOptions) -> Iterator[int]:
    """See Session.generate."""
    prompts = checked_prompts(session, prompt_ids, options)
    if len(prompts) != 1:
        raise InputError(f"generate takes one prompt, not {len(prompts)}. Use generate_batch for several.")
    rows = make_rows(session, prompts, options)

    def token_ids() -> Iterator[int]:
        for _ in decode(session, prompts, rows):
            yield rows[0].token_ids[-1]

    return token_ids()


def generate_batch(session: Session, prompts: TokenIds, options: SamplingOptions) -> list[list[int]]:
    """See Session.generate_batch."""
    checked = checked_prompts(session, prompts, options)
    if any(prompt.size == 0 for prompt in checked):
        raise InputError("Every prompt of a batch needs at least one token id.")
    rows = make_rows(session, checked, options)
    for _ in decode(session, checked, rows):
        pass
    return [row.token_ids for row in rows]


class TextStream(Iterator[str]):
    """The text of a running generation, in pieces that are never empty; `result` is there when it has ended."""

    def __init__(
        self, session: Session, prompt: Int64Array, context_ids: Sequence[int], options: SamplingOptions
    ) -> None:
        self._row = Row(
            options, _stop_ids(session, options), 0, TextStreamer(session.tokenizer, context_ids, options.stop_strings)
        )
        self._prompt_tokens = int(prompt.size)
        self._steps = decode(session, [prompt], [self._row])
        self._text = ""

    def __next__(self) -> str:
        for pieces in self._steps:
            if pieces[0]:
                self._text += pieces[0]
                return pieces[0]
        raise StopIteration

    @property
    def result(self) -> GenerationResult:
        """The outcome. Raises SessionError while the generation still runs."""
        if self._row.finish_reason is None:
            raise SessionError("The generation has not ended yet: read the stream to its end before its result.")
        return GenerationResult(self._text, tuple(self._row.token_ids), self._prompt_tokens, self._row.finish_reason)


def generate_text(
    session: Session,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    add_special_tokens: bool | None = None,
    **options: Any,
) -> TextStream:
    """Generate text after a text or a chat.

    prompt: plain text, which the result continues with its first space; or the messages of a whole chat, rendered with
    the checkpoint's template, to which the result is the reply. add_special_tokens: whether the tokenizer adds BOS to
    plain text; None means only at the beginning, when the session is at position 0.
    options: the fields of SamplingOptions. The session's state rolls on as in Session.generate.

    Raises InputError (also for a chat in mid-text), ContextError and TokenizerError at the call, before any feed.
    """
    checked = SamplingOptions(**options)
    at_start = not session.position.any()
    if isinstance(prompt, str):
        add_bos = at_start if add_special_tokens is None else add_special_tokens
        context_ids = token_ids = session.tokenizer.encode(prompt, add_special_tokens=add_bos)
    elif at_start:
        context_ids, token_ids = [], session.tokenizer.encode_chat(prompt)
    else:
        raise InputError(
            "A chat is rendered from its beginning, but this session is in the middle of a text. Call reset() first "
            "and pass all messages of the chat."
        )
    return TextStream(session, checked_prompts(session, token_ids, checked)[0], context_ids, checked)


def checked_prompts(session: Session, prompts: TokenIds, options: SamplingOptions) -> list[Int64Array]:
    """The prompts as rows, after checking that all `max_new_tokens` have room; the last one is never fed."""
    return session.checked_rows(prompts, new_tokens=options.max_new_tokens - 1)


def make_rows(session: Session, prompts: list[Int64Array], options: SamplingOptions) -> list[Row]:
    """The progress objects of all rows. Stop strings need text, and so need the bundle's tokenizer."""

    def text(prompt: Int64Array) -> TextStreamer | None:
        if not options.stop_strings:
            return None
        return TextStreamer(session.tokenizer, prompt.tolist(), options.stop_strings)

    stop_ids = _stop_ids(session, options)
    return [Row(options, stop_ids, index, text(prompt)) for index, prompt in enumerate(prompts)]


def _stop_ids(session: Session, options: SamplingOptions) -> frozenset[int]:
    return frozenset(session.manifest.model.eos_token_ids if options.stop_ids is None else options.stop_ids)


def decode(session: Session, prompts: list[Int64Array], rows: list[Row]) -> Iterator[list[str]]:
    """Run the loop; after each step yields the text that each row may show ("" for rows that have finished)."""
    feed: list[list[int]] = [prompt.tolist() for prompt in prompts]
    while True:
        found = _candidates(session, feed, rows)
        reached = session.revision
        seen_BV = session.seen
        shown = [""] * len(rows)
        feed = [[] for _ in rows]
        for index, (row, candidates) in enumerate(zip(rows, found, strict=True)):
            if row.finish_reason is None:
                assert candidates is not None, "an unfinished row has been fed"
                token_id = row.sampler.choose(candidates.logits_N, seen_BV[index], candidates.ids_N)
                shown[index] = row.take(token_id)
                if row.finish_reason is None:
                    feed[index] = [token_id]
        yield shown
        if not any(feed):
            return
        if session.revision != reached:
            raise SessionError(
                "The session was fed or reset while a generation was running on it, so the generation cannot go on. "
                "Let one end before the next begins, or load a second session."
            )


def _candidates(session: Session, feed: list[list[int]], rows: list[Row]) -> Sequence[Candidates | None]:
    """Feed the rows, and give what each may go on with: all logits, or the highest where the engine can tell those."""
    sampler = rows[0].sampler  # all rows have the same options
    count = sampler.highest_wanted(session.most_top)
    if count == 0:
        return [Candidates(logits_V) for logits_V in session.forward_last(feed)]
    return session.forward_candidates(feed, count, sampler.suffice)
