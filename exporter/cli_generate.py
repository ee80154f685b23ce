"""`cierzo generate`: text or token ids in, text or token ids out as they come, the speed on stderr at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from exporter.cli_options import (
    EXISTING,
    backend_option,
    engine_option,
    json_option,
    verify_option,
    weights_folder_option,
)
from exporter.cli_receipt import ProofOptions, proof_options
from exporter.console import name_unverified, print_json, progress_bars, show_notes

if TYPE_CHECKING:
    from runtime import Session


@click.command()
@click.argument("bundle", type=EXISTING)
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=click.File(encoding="utf-8"), help="Read the prompt from this file, - for stdin.")
@click.option("--chat", is_flag=True, help="Put the prompt into the checkpoint's chat template, as the user's message.")
@click.option("--ids", "as_ids", is_flag=True, help="Token ids in and out, separated by spaces; needs no tokenizer.")
@click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Stop after so many tokens.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token always.")
@click.option("--top-k", type=int, help="Choose among the k likeliest tokens.")
@click.option("--top-p", type=float, help="Choose among the likeliest tokens that reach this probability together.")
@click.option("--min-p", type=float, help="Choose among tokens at least so likely, relative to the likeliest.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1 repeats less.")
@click.option("--seed", type=int, help="Makes sampling repeatable.  [default: another each time]")
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text. Repeatable.")
@backend_option
@engine_option
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.  [default: one per physical core]")
@weights_folder_option
@verify_option
@proof_options
@json_option
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_file: IO[str] | None,
    chat: bool,
    as_ids: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float,
    seed: int | None,
    stops: tuple[str, ...],
    backend: str | None,
    engine: str | None,
    threads: int | None,
    weights_folder: Path | None,
    verify: bool,
    proof: ProofOptions,
    as_json: bool,
) -> None:
    """Continue PROMPT with BUNDLE, as far past the window as you like.

    Without PROMPT and --prompt-file the prompt is read from stdin; one line end at its end is dropped. The text streams
    to stdout as it comes, and a line about the speed follows on stderr.
    """
    if chat and as_ids:
        raise click.UsageError("--chat and --ids exclude each other: a chat template needs text.")
    text = read_prompt(prompt, prompt_file)
    ids = parse_ids(text) if as_ids else None
    from runtime import generate_text, load

    with progress_bars(quiet=as_json) as progress:
        if progress is not None:
            progress("load", 0, 0)
        session = load(
            bundle,
            backend=backend,
            engine=engine,
            threads=threads,
            verify=verify,
            weights_folder=weights_folder,
            progress=progress,
            require_parity=proof.require_parity,
            trust=proof.trust,
        )
    name_unverified(session.unverified)
    show_notes(session.notes)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop_strings": stops,
    }
    clock = Clock(session)
    if ids is not None:
        token_ids: list[int] = []
        show(clock.watch(remember(session.generate(ids, **options), token_ids)), quiet=as_json)
        speed = clock.speed(len(ids), len(token_ids))
        result: dict[str, Any] = {"token_ids": token_ids}
    else:
        stream = generate_text(session, [{"role": "user", "content": text}] if chat else text, **options)
        show(clock.watch(stream), quiet=as_json)
        outcome = stream.result
        speed = clock.speed(outcome.prompt_tokens, len(outcome.token_ids))
        result = {"text": outcome.text, "token_ids": list(outcome.token_ids), "finish_reason": outcome.finish_reason}
    if as_json:
        print_json(result | speed.to_json())
    else:
        click.echo(str(speed), err=True)


def read_prompt(prompt: str | None, file: IO[str] | None) -> str:
    """The prompt from the one place that has it. Raises click.UsageError when there are two or none."""
    if prompt is not None and file is not None:
        raise click.UsageError("Give either PROMPT or --prompt-file, not both.")
    if prompt is not None:
        return prompt
    if file is None and sys.stdin.isatty():
        raise click.UsageError("There is no prompt: give PROMPT or --prompt-file, or pipe a text in.")
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if file is None else file.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"The prompt is not UTF-8 text ({error}).") from error
    return text.removesuffix("\n").removesuffix("\r")


def parse_ids(text: str) -> list[int]:
    """Token ids separated by white space. Raises click.UsageError for anything else."""
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise click.UsageError(f"With --ids the prompt must be whole numbers separated by spaces ({error}).") from error


def remember(token_ids: Iterator[int], into: list[int]) -> Iterator[str]:
    """The ids as text separated by spaces, each also appended to `into`."""
    for token_id in token_ids:
        yield f"{' ' if into else ''}{token_id}"
        into.append(token_id)


def show(pieces: Iterator[str], *, quiet: bool) -> None:
    """Writes the pieces to stdout as they come and ends the line, also when the generation breaks off."""
    if quiet:
        for _ in pieces:
            pass
        return
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
    finally:
        click.echo()


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens and seconds of a generation. Decoding is counted from the first piece that could be shown on."""

    prompt_tokens: int
    new_tokens: int
    first_seconds: float
    total_seconds: float
    tokens_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; tokens_per_second is null when there was nothing to time."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "first_seconds": self.first_seconds,
            "total_seconds": self.total_seconds,
            "tokens_per_second": self.tokens_per_second,
        }

    def __str__(self) -> str:
        rate = "" if self.tokens_per_second is None else f", then {self.tokens_per_second:,.1f} tokens/s"
        return (
            f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens in {self.total_seconds:.2f} s: "
            f"first after {self.first_seconds:.3f} s{rate}"
        )


class Clock:
    """Times a generation by looking at its session's position: a piece of text may stand for several tokens."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._first: float | None = None
        self._read_at_first = 0

    def watch(self, pieces: Iterator[str]) -> Iterator[str]:
        """Passes the pieces through."""
        self._start = time.perf_counter()
        for piece in pieces:
            if self._first is None:
                self._first = time.perf_counter()
                self._read_at_first = int(self._session.position[0])
            yield piece
        self._end = time.perf_counter()

    def speed(self, prompt_tokens: int, new_tokens: int) -> Speed:
        """The result, after the last piece. The position is that of a session that was fresh at the start."""
        first = self._end if self._first is None else self._first
        # What was read is the prompt and all new tokens but the one that has just been chosen.
        chosen_at_first = self._read_at_first - prompt_tokens + 1
        later = new_tokens - chosen_at_first if self._first is not None else 0
        rate = later / (self._end - first) if later > 0 and self._end > first else None
        return Speed(prompt_tokens, new_tokens, first - self._start, self._end - self._start, rate)
