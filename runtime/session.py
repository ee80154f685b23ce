"""A loaded bundle: feed tokens, read logits, generate.

Letters: B batch rows, T tokens of a feed, R tokens of a step whose logits are asked for, V vocabulary, C chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime import generate as generation
from runtime.backends.base import Engine, Numerics
from runtime.bundle import Bundle
from runtime.chunking import Int64Array, Step, all_positions, last_positions, rows_that_end, split_into_steps
from runtime.errors import InputError, SessionError, TokenizerError
from runtime.manifest import Manifest
from runtime.position_limits import check_end
from runtime.profile import StepRun
from runtime.sampling import BoolArray, Candidates, SamplingOptions
from runtime.token_rows import TokenIds, as_rows
from runtime.tokenizer import Tokenizer, open_tokenizer

_Result = TypeVar("_Result")


class Session:
    """A model with its rolling KV state. Every row of the batch has its own position. Not safe across threads.

    The number of rows B is fixed by the first feed after a reset. Memory does not depend on the number of tokens.
    """

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self._bundle = bundle
        self._engine = engine
        self._tokenizer: Tokenizer | None = None
        self._failed = False
        self._revision = 0
        self._start_over(engine.batch)

    @property
    def bundle(self) -> Bundle:
        """The bundle that this session runs."""
        return self._bundle

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read at first use. Raises TokenizerError when the bundle has none."""
        if self._tokenizer is None:
            if not self.manifest.tokenizer:
                raise TokenizerError(
                    f"The bundle {self._bundle.path} has no tokenizer, because its checkpoint had no tokenizer file. "
                    "Feed token ids instead of text, or add the file to the checkpoint and export again."
                )
            self._tokenizer = open_tokenizer([self._bundle.file(name) for name in self.manifest.tokenizer])
        return self._tokenizer

    @property
    def unverified(self) -> tuple[str, ...]:
        """Files whose hashes were to be compared and that have none in the manifest."""
        return self._bundle.unverified

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes this session slower than it could be, each a sentence; mostly nothing."""
        return self._engine.notes

    def end_profile(self) -> tuple[StepRun, ...]:
        """The steps that ran since loading, each with its nodes' times; a profile ends only once.

        Raises SessionError when there is none: it was not asked for at `load`, or it has ended.
        """
        steps = self._engine.end_profile()
        if not steps:
            raise SessionError("This session has no profile to end. Give load(..., profile=folder), and feed tokens.")
        return steps

    @property
    def kernels(self) -> tuple[str, ...]:
        """The plugin ops of this bundle that native kernels run; the others run their portable bodies."""
        return self._engine.kernels

    @property
    def engine_name(self) -> str | None:
        """The engine of the bundle that runs, as `cierzo build` named it; None where the bundle's own graph does."""
        return self._engine.built

    @property
    def device(self) -> str:
        """What the engine runs on, for a person."""
        return self._engine.device

    @property
    def numerics(self) -> Numerics:
        """In which types the engine computes and keeps keys and values."""
        return self._engine.numerics

    @property
    def kv_bytes(self) -> int:
        """Bytes held for the KV buffers: constant in the number of tokens, proportional to the rows (1 at first)."""
        return self._engine.kv_bytes

    @property
    def batch(self) -> int:
        """Rows that the KV buffers hold."""
        return self._engine.batch

    @property
    def position(self) -> Int64Array:
        """int64 [B]: how many tokens each row has read since the last reset."""
        return self._position_B.copy()

    @property
    def seen(self) -> BoolArray:
        """bool [B, V]: the ids that each row has read since the last reset (what a repetition penalty applies to)."""
        return self._seen_BV.copy()

    @property
    def revision(self) -> int:
        """Rises with every feed and every reset, so that whoever relies on the state can see that it was changed."""
        return self._revision

    def reset(self) -> None:
        """Back to position 0 with zeroed buffers, also after a failure."""
        failed, self._failed = self._failed, True  # until the reset is complete: it may be interrupted as well
        self._revision += 1
        if failed:
            self._engine.allocate(self._engine.batch)  # anew, because the failure may have left them half bound
        else:
            self._engine.clear()
        self._start_over(self._engine.batch)
        self._failed = False

    def forward(self, token_ids: TokenIds, *, padding: Literal["right", "left"] = "right") -> NDArray[np.float32]:
        """Feed tokens and return the logits after each of them; the state rolls on.

        token_ids: int64 [B, T], [T] (one row) or a list of rows of different lengths, T >= 1. Any division of a text
        into feeds gives the same logits up to rounding. An empty row idles, except in the first feed after a reset.
        padding: on which side of the result shorter rows are padded.

        Returns float32 [B, T of the longest row, V]; logits of padding are NaN, so that nobody uses them by mistake.
        Raises InputError for what `as_rows` refuses, for a change of batch in mid-text and for more rows than the
        bundle was exported for, ContextError for feeds past a full-attention buffer, past the model's position limit
        or past position 2**24; in all these cases the state is as before. Raises SessionError after a failed feed,
        until `reset`.
        """
        if padding not in ("right", "left"):
            raise InputError(f"`padding` must be 'right' or 'left', not {padding!r}.")
        rows = self.checked_rows(token_ids)
        width = max(row.size for row in rows)
        logits_BTV = np.full((len(rows), width, self.manifest.model.vocab_size), np.nan, dtype=np.float32)
        for step, step_logits_BTV in self._feed(rows, all_positions, self._engine.step):
            for index, count in enumerate(step.token_counts_B):
                first = step.offset + (width - rows[index].size if padding == "left" else 0)
                logits_BTV[index, first : first + count] = step_logits_BTV[index, :count]
        return logits_BTV

    def forward_last(self, token_ids: TokenIds) -> NDArray[np.float32]:
        """As `forward`, but only the logits after the last token of each row are computed: float32 [B, V].

        A long prompt's logits would otherwise take T · V · 4 bytes, and 2 · T · C · V operations for hidden size C. The
        logits of a row that idles are NaN. The head multiplies fewer rows at once than in `forward`, so that logits may
        differ from it in the last bits.
        """
        rows = self.checked_rows(token_ids)
        lengths_B = np.array([row.size for row in rows], dtype=np.int64)
        logits_BV = np.full((len(rows), self.manifest.model.vocab_size), np.nan, dtype=np.float32)
        for step, step_logits_BRV in self._feed(rows, lambda step: last_positions(step, lengths_B), self._engine.step):
            for index in np.flatnonzero(rows_that_end(step, lengths_B)):
                logits_BV[index] = step_logits_BRV[index, 0]
        return logits_BV

    @property
    def most_top(self) -> int:
        """How many candidates `forward_candidates` can ask the engine for; 0 when it gives all logits only."""
        top = self._engine.top
        return 0 if top is None else min(top.most, self.manifest.model.vocab_size)

    def forward_candidates(
        self, token_ids: TokenIds, count: int, suffice: Callable[[NDArray[np.float32]], bool]
    ) -> list[Candidates | None]:
        """As `forward_last`, but only the `count` highest logits of each row leave the engine's device.

        count: 1 to `most_top`. suffice: called with a row's highest logits [count], best first; where it says no, all
        logits of the row are fetched. Returns a Candidates for each row, and None for one that idles. Where a row's
        logits hold NaN, so do its Candidates.
        """
        top = self._engine.top
        if top is None or not 1 <= count <= self.most_top:
            raise SessionError(f"This session's engine gives {self.most_top} highest logits at most, not {count}.")
        rows = self.checked_rows(token_ids)
        lengths_B = np.array([row.size for row in rows], dtype=np.int64)
        found: list[Candidates | None] = [None] * len(rows)
        for step, highest in self._feed(
            rows, lambda step: last_positions(step, lengths_B), partial(top.step, count=count)
        ):
            for index in np.flatnonzero(rows_that_end(step, lengths_B)):
                values_K, ids_K = highest.values_BRK[index, 0], highest.ids_BRK[index, 0]
                if suffice(values_K):
                    order = ids_K.argsort()
                    found[index] = Candidates(values_K[order], ids_K[order])
                else:
                    found[index] = Candidates(top.logits()[index, 0].copy())
        return found

    def generate(self, prompt_ids: TokenIds, **options: Any) -> Iterator[int]:
        """Feed one prompt and yield the ids that follow it, one by one.

        options: the fields of SamplingOptions. Generation continues from the current state: a fresh or reset session
        starts at position 0, otherwise the prompt continues what was fed before. A stop id is the last id yielded.
        The last id yielded has not been fed: to go on, begin the next prompt with it.

        Raises InputError and ContextError at the call, before anything is fed.
        """
        return generation.generate(self, prompt_ids, SamplingOptions(**options))

    def generate_batch(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """Generate after several prompts of any lengths at once; returns the new ids of each row.

        Each row gets the ids that `generate` would give it alone (with seed + r for row r), except where two tokens
        are so nearly tied that rounding decides. Finished rows idle. State, options and errors as in `generate`.
        """
        return generation.generate_batch(self, prompts, SamplingOptions(**options))

    def checked_rows(self, token_ids: TokenIds, *, new_tokens: int = 0) -> list[Int64Array]:
        """The rows of a feed that may run now and be followed by `new_tokens` more; raises as `forward` does."""
        if self._failed:
            raise SessionError("An earlier feed failed half-way, so the state is unknown. Call reset() to start again.")
        kv = self.manifest.kv
        rows = as_rows(token_ids, self.manifest.model.vocab_size)
        if len(rows) > kv.max_batch:
            raise InputError(
                f"The batch has {len(rows)} rows, but the bundle was exported for at most {kv.max_batch}. "
                f"Export the checkpoint again with max_batch={len(rows)}, or feed fewer rows."
            )
        begun = bool(self._position_B.any())
        if begun and len(rows) != self.batch:
            raise InputError(
                f"The batch has {len(rows)} rows, but this session is in the middle of {self.batch}. Feed "
                f"{self.batch} rows (an empty row idles), or call reset() first."
            )
        if not begun:
            for index, row in enumerate(rows):
                if row.size == 0:
                    raise InputError(f"Row {index} is an empty prompt: its first feed needs at least one token id.")
        # Checked for the whole feed before any step runs: a refusal leaves the state as it was.
        for index, row in enumerate(rows):
            position = int(self._position_B[index]) if begun else 0
            check_end(kv, index, position, row.size, new_tokens if row.size else 0)
        return rows

    def _feed(
        self,
        rows: list[Int64Array],
        asked_for: Callable[[Step], Int64Array],
        run: Callable[[Int64Array, Int64Array, Int64Array, Int64Array], _Result],
    ) -> Iterator[tuple[Step, _Result]]:
        """Run the steps of a checked feed; yields each with what `run` makes of it, which is valid until the next.

        asked_for: gives the tokens [B, R] of a step whose logits are computed. run: `Engine.step`, or one like it.
        """
        self._failed = True  # until the feed is complete, the ring holds part of it
        self._revision += 1
        if len(rows) != self.batch:
            self._engine.allocate(len(rows))
            self._start_over(len(rows))
        for step in split_into_steps(rows, self._position_B.copy(), self.manifest.kv.chunk):
            yield step, run(step.input_ids_BT, step.start_positions_B, step.token_counts_B, asked_for(step))
        for index, row in enumerate(rows):
            self._position_B[index] += row.size
            self._seen_BV[index, row] = True
        self._failed = False

    def _start_over(self, batch: int) -> None:
        self._position_B = np.zeros(batch, dtype=np.int64)
        self._seen_BV = np.zeros((batch, self.manifest.model.vocab_size), dtype=bool)
