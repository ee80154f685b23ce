"""Parity on somebody's own prompts: the gate's budget on exactly these tokens, and golden continuations.

A prompt is text, token ids, or the messages of a chat. The engine continues it as it does for a user, greedily; the
reference then reads the same tokens. Golden files hold what an engine once wrote; a new one may write something else
only where the truth itself is nearly undecided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from exporter.golden_file import stored_golden, write_golden
from runtime import load
from runtime.errors import InputError, ParityError
from runtime.json_files import brief

if TYPE_CHECKING:
    from exporter.gate.truth import TruthRow

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]

NEAR_TIE = 2.0
"""Budgets: of two logits that are each off by one, the truth's lower one may come out on top."""

_SHOWN = 60


@dataclass(frozen=True, slots=True)
class HeldPrompt:
    """A prompt, what the engine wrote after it, and how far its logits were from the truth's.

    positions: of the compared tokens in prompt_ids + new_ids [R]. errors: largest |error| of a logit there; allowed:
    the budget there.
    """

    prompt_ids: tuple[int, ...]
    new_ids: tuple[int, ...]
    positions: tuple[int, ...]
    errors: tuple[float, ...]
    allowed: tuple[float, ...]

    @property
    def worst(self) -> int:
        """Index of the position that is nearest to its budget, or farthest beyond it."""
        return int(np.argmax(np.array(self.errors) / np.array(self.allowed)))

    @property
    def passed(self) -> bool:
        """Every compared position within its budget."""
        return self.errors[self.worst] <= self.allowed[self.worst]


class PromptParity:
    """A loaded bundle and the reference model of its checkpoint, which is opened when it is first needed.

    What was computed for a prompt is kept for the life of this object, without the logits.
    """

    def __init__(
        self,
        bundle: str | Path,
        checkpoint: str | Path | None = None,
        *,
        backend: str | None = None,
        engine: str | None = None,
        weights_folder: Path | None = None,
    ) -> None:
        """Arguments as of `exporter.validate.validate`. Raises what `runtime.load` raises."""
        self._session = load(bundle, backend=backend, engine=engine, weights_folder=weights_folder)
        self._checkpoint = checkpoint
        self._held: dict[tuple[tuple[int, ...], int], HeldPrompt] = {}
        self._golden: dict[Path, tuple[tuple[int, ...], int]] = {}

    def check(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 32) -> tuple[HeldPrompt, ...]:
        """Hold the engine's logits on every prompt and on what it writes after it against the truth.

        max_new_tokens: 0 compares the prompts alone. The reference reads all prompts in one pass over its weights, so
        that a list costs hardly more than one. Raises ParityError that names every prompt beyond the budget, InputError
        for no prompts, and what `Session.forward` raises.
        """
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise InputError(f"cierzo_parity.check takes a list of prompts, and not {brief(prompts)}.")
        _require_count(max_new_tokens, 0)
        asked = [(self.ids(prompt), max_new_tokens) for prompt in prompts]
        if not asked:
            raise InputError("cierzo_parity.check takes a list of prompts, and at least one.")
        missing = [key for key in dict.fromkeys(asked) if key not in self._held]
        if missing:
            self._held |= zip(missing, self._hold(missing), strict=True)
        found = tuple(self._held[key] for key in asked)
        if failed := [held for held in found if not held.passed]:
            lines = "\n".join(f"  {self._failure(held)}" for held in failed)
            raise ParityError(f"{len(failed)} of {len(found)} prompts are beyond the error budget:\n{lines}")
        return found

    def golden(self, file: Path, prompt: Prompt, *, max_new_tokens: int = 32, update: bool = False) -> int | None:
        """Hold the engine's greedy continuation of the prompt against the one stored in `file`.

        update: store the continuation, once `check` has found it right. Returns None where the two are the same, else
        the index of the new token at which a near-tie fell to the other side; what follows it cannot be compared.
        Raises ParityError for any other difference; InputError where the file is missing, damaged, of other options or
        already that of another prompt; ExportError when it cannot be written.
        """
        _require_count(max_new_tokens, 1)
        ids = self.ids(prompt)
        if self._golden.get(file, (ids, max_new_tokens)) != (ids, max_new_tokens):
            raise InputError(
                f"{file.name} is the golden file of another prompt already, in another test or with another parameter. "
                "Give every prompt a name of its own."
            )
        if update:
            (held,) = self.check([ids], max_new_tokens=max_new_tokens)
            write_golden(file, prompt, ids, held.new_ids, self._text(held.new_ids), max_new_tokens)
            self._golden[file] = ids, max_new_tokens
            return None
        stored = stored_golden(file, ids, max_new_tokens)
        self._golden[file] = ids, max_new_tokens
        self._session.reset()
        ours = tuple(self._session.generate(ids, max_new_tokens=max_new_tokens))
        if ours == stored:
            return None
        both = zip(stored, ours, strict=False)
        at = next((index for index, (theirs, mine) in enumerate(both) if theirs != mine), None)
        if at is None:  # one is the beginning of the other
            short, name = min((len(stored), "golden file"), (len(ours), "engine"))
            raise ParityError(
                f"{file.name} and the engine agree, but the {name}'s text ends after {short} new tokens and the other "
                f"has {max(len(stored), len(ours))}: one of them knows another end of text. --cierzo-update-golden "
                "stores the engine's, if that is right."
            )
        row = (*ids, *stored[:at])
        truth = self._truth([row], [self._wanted(len(row))])[0]
        logits_V, allowed = truth.logits_RV[-1], float(truth.allowed_R[-1])
        behind = [float(logits_V.max() - logits_V[token]) for token in (stored[at], ours[at])]
        if max(behind) < NEAR_TIE * allowed:
            return at
        raise ParityError(self._difference(file, stored, ours, at, behind, allowed))

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids.

        Raises TokenizerError where the bundle has no tokenizer, or no chat format; InputError for what is no prompt.
        """
        if isinstance(prompt, str):
            return tuple(self._session.tokenizer.encode(prompt))
        if isinstance(prompt, Iterable) and not isinstance(prompt, bytes | bytearray | Mapping):
            parts: list[Any] = list(prompt)
            if parts and all(isinstance(part, Mapping) for part in parts):
                return tuple(self._session.tokenizer.encode_chat([dict(part) for part in parts]))
            if all(isinstance(part, Integral) and not isinstance(part, bool) for part in parts):
                return tuple(int(part) for part in parts)
        raise InputError(
            f"{brief(prompt)} is no prompt: that is a text, a list of token ids, or the list of a chat's messages. "
            "Where a list of prompts is asked for, a single one is put into a list as well."
        )

    def _hold(self, asked: Sequence[tuple[tuple[int, ...], int]]) -> list[HeldPrompt]:
        from reference.parity import position_errors

        written = [self._written(ids, count) for ids, count in asked]
        rows = [(*ids, *new) for (ids, _), new in zip(asked, written, strict=True)]
        wanted = [self._wanted(len(row), len(rows)) for row in rows]
        found = []
        for (ids, _), new, some, truth in zip(asked, written, wanted, self._truth(rows, wanted), strict=True):
            logits_RV = self._logits(ids, new, some)
            errors = position_errors(truth.logits_RV, logits_RV)
            places = tuple(int(place) for place in truth.positions)
            found.append(HeldPrompt(ids, new, places, tuple(errors.tolist()), tuple(truth.allowed_R.tolist())))
        return found

    def _written(self, ids: tuple[int, ...], count: int) -> tuple[int, ...]:
        self._session.reset()
        return tuple(self._session.generate(ids, max_new_tokens=count)) if count else ()

    def _logits(
        self, ids: tuple[int, ...], new: tuple[int, ...], wanted: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.floating]:
        """Logits of these positions, fed as they are when text is generated: the prompt at once, then one by one."""
        from exporter.gate.feeding import logits_at

        self._session.reset()
        row = np.array((*ids, *new), np.int64)
        return logits_at(self._session, row, wanted, [len(ids), *(1 for _ in new)])

    def _wanted(self, length: int, rows: int = 1) -> npt.NDArray[np.int64]:
        """All positions, or, where the truth's logits of all would be too many, some of them and the last ones."""
        from exporter.gate.plan import MOST_TRUTH_BYTES

        most = max(2, MOST_TRUTH_BYTES // (8 * self._session.manifest.model.vocab_size * rows))
        if length <= most:
            return np.arange(length)
        spread = np.linspace(0, length - 1, most // 2).astype(np.int64)
        return np.union1d(spread, np.arange(length - most // 2, length))

    def _truth(self, rows: Sequence[tuple[int, ...]], wanted: Sequence[npt.NDArray[np.int64]]) -> tuple[TruthRow, ...]:
        from exporter.gate.run import open_matching
        from exporter.gate.truth import make_truth
        from exporter.quantized_reference import of_engine, quantized_reference
        from reference.oracle import Oracle

        session = self._session
        opened, held = open_matching(session, self._checkpoint), quantized_reference(session.bundle)
        rounding, dtype = of_engine(session.numerics, held.rounding)
        return make_truth(
            Oracle(opened, held.weights),
            [np.array(row, np.int64) for row in rows],
            wanted,
            moe=opened.config.moe,
            arithmetic=session.numerics.arithmetic,
            rounding=rounding,
            dtype=dtype,
            progress=None,
        ).rows

    def _text(self, ids: Sequence[int]) -> str | None:
        return self._session.tokenizer.decode(ids) if self._session.manifest.tokenizer and ids else None

    def _spelled(self, ids: Sequence[int]) -> str:
        text = self._text(ids)
        return " ".join(map(str, ids)) if text is None else repr(text)

    def _failure(self, held: HeldPrompt) -> str:
        at = held.worst
        row, place = (*held.prompt_ids, *held.new_ids), held.positions[at]
        where = "in the prompt" if place < len(held.prompt_ids) else "in the continuation"
        return (
            f"{_cut(self._spelled(held.prompt_ids))}: an error of {held.errors[at]:.2e} at position {place} {where} "
            f"(token {self._spelled(row[place : place + 1])}), where {held.allowed[at]:.2e} is allowed"
        )

    def _difference(
        self, file: Path, stored: Sequence[int], ours: Sequence[int], at: int, behind: Sequence[float], allowed: float
    ) -> str:
        better = ["golden file", "engine"][int(np.argmin(behind))]
        out_of_date = better == "engine" and behind[1] < NEAR_TIE * allowed
        advice = (
            "The engine is right, and the golden file is of another model or out of date: --cierzo-update-golden."
            if out_of_date
            else "Run `cierzo validate` and `cierzo bisect`, which name the node."
        )
        return (
            f"{file.name} and the engine differ from new token {at} on:\n"
            f"  both:   {_tail(self._spelled(stored[:at]))}\n"
            f"  golden: {_cut(self._spelled(stored[at : at + 12]))}\n"
            f"  engine: {_cut(self._spelled(ours[at : at + 12]))}\n"
            f"In the truth the golden token is {behind[0]:.2e} behind the best and the engine's {behind[1]:.2e}; up to "
            f"{NEAR_TIE * allowed:.2e}, twice the budget, it would be a near-tie. {advice}"
        )


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _tail(text: str) -> str:
    return text if len(text) <= _SHOWN else f"…{text[-_SHOWN:]}"


def _require_count(max_new_tokens: object, least: int) -> None:
    if type(max_new_tokens) is not int or max_new_tokens < least:
        raise InputError(f"max_new_tokens must be an integer >= {least}, not {brief(max_new_tokens)}.")
