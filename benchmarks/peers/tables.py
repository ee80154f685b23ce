"""The rows and the sentences of the report, made from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peers.contestants import OURS, Contestant
from benchmarks.peers.conversion import Conversion
from benchmarks.peers.figures import Samples, best_of, decode_figure, extent, prefill_figure, ratio
from benchmarks.peers.models import Model
from benchmarks.peers.window import Verdict
from benchmarks.report import Cell, Row

_NOTHING = "–"


def speed(model: Model, contestants: Sequence[Contestant], samples: Mapping[str, Samples]) -> list[Row]:
    """Medians in tokens a second, one row per contestant."""
    figures = _figures(model, samples)
    rows: list[Row] = []
    for contestant in contestants:
        medians = samples[contestant.name].medians()
        rows.append({"engine": contestant.name, **{name: _cell(medians.get(name)) for name in figures}})
    return rows


def ratios(model: Model, contestants: Sequence[Contestant], samples: Mapping[str, Samples]) -> list[Row]:
    """Cierzo's int4 block 32 over everybody."""
    ours = samples[OURS].medians()
    rows: list[Row] = []
    for contestant in contestants:
        theirs = samples[contestant.name].medians()
        cells = {
            name: _cell(ratio(ours[name], theirs[name]) if name in ours and name in theirs else None)
            for name in _figures(model, samples)
        }
        rows.append({"engine": contestant.name, **cells})
    return rows


def samples_of(model: Model, contestants: Sequence[Contestant], samples: Mapping[str, Samples]) -> list[Row]:
    """Slowest and fastest sample of every figure, and how many there are."""
    rows: list[Row] = []
    for contestant in contestants:
        rates = samples[contestant.name].rates
        cells = {name: extent(rates[name]) if name in rates else _NOTHING for name in _figures(model, samples)}
        rows.append({"engine": contestant.name, **cells})
    return rows


def memory(
    model: Model, contestants: Sequence[Contestant], samples: Mapping[str, Samples], made: Mapping[str, Conversion]
) -> list[Row]:
    """Conversion, load, memory and KV."""
    rows: list[Row] = []
    for contestant in contestants:
        found, conversion = samples[contestant.name], made[contestant.name]
        loads = sorted(found.load_seconds)
        converts = conversion.error is None and conversion.seconds > 0
        rows.append(
            {
                "engine": contestant.name,
                "convert s": _cell(conversion.seconds if converts else None),
                "convert peak MB": _cell(conversion.peak_rss / 1e6 if converts else None),
                "file MB": _cell(conversion.nbytes / 1e6 if conversion.nbytes else None),
                "load s": _cell(loads[len(loads) // 2] if loads else None),
                "RSS loaded MB": _megabytes(found.loaded),
                f"RSS after {model.long} MB": _megabytes(found.after_long),
                **{f"KV at {tokens} MB": _megabytes(found.kv_bytes.get(tokens)) for tokens in (model.long, model.far)},
            }
        )
    return rows


def failures(
    contestants: Sequence[Contestant], samples: Mapping[str, Samples], made: Mapping[str, Conversion], workdir: Path
) -> list[Row]:
    """What an engine or its converter said instead of an answer."""
    rows: list[Row] = []
    for contestant in contestants:
        error = made[contestant.name].error
        if error is not None:
            rows.append({"engine": contestant.name, "asked for": "conversion", "answer": _one_line(error, workdir)})
        for what, said in samples[contestant.name].errors.items():
            rows.append({"engine": contestant.name, "asked for": what, "answer": _one_line(said, workdir)})
    return rows


def windows(
    contestants: Sequence[Contestant], verdicts: Mapping[str, Verdict], made: Mapping[str, Conversion], workdir: Path
) -> list[Row]:
    """The window check."""
    rows: list[Row] = []
    for contestant in contestants:
        verdict = verdicts.get(contestant.name, Verdict(error=made[contestant.name].error))
        rows.append(
            {
                "engine": contestant.name,
                "window": verdict.words,
                "difference within": _small(verdict.within),
                "difference past": _small(verdict.past),
                "change by unreachable tokens": _small(verdict.seen),
                "what it said": _one_line(verdict.error or "", workdir),
            }
        )
    return rows


def sentences(model: Model, contestants: Sequence[Contestant], samples: Mapping[str, Samples]) -> list[str]:
    """Each figure of Cierzo's int4 block 32 against the best peer in 4 bits, and decode far from the start."""
    peers = {one.name: samples[one.name].medians() for one in contestants if not one.ours and one.bits == 4}
    ours = samples[OURS].medians()
    said = []
    for figure in _figures(model, samples):
        best = best_of(peers, figure)
        if figure in ours and best is not None:
            name, rate = best
            said.append(
                f"{model.title}, {figure}: {OURS} {ours[figure]:.1f} tokens/s, {ratio(ours[figure], rate):.2f} × the "
                f"best peer in 4 bits ({name}, {rate:.1f})"
            )
    for contestant in contestants:
        pairs = sorted(samples[contestant.name].pairs)
        if pairs:
            said.append(
                f"{model.title}: {contestant.name}: a step at {model.far} tokens takes {pairs[len(pairs) // 2]:.3f} × "
                f"a step at {model.near}"
            )
    return said


def bandwidth_shares(
    model: Model, contestants: Sequence[Contestant], samples: Mapping[str, Samples], bandwidth: float
) -> str:
    """What part of the read bandwidth Cierzo's decode takes: of the one that was measured right before each sample.

    Counted are the linear weights and their scales; no KV, no embedding. bandwidth: bytes/s, median over the rounds.
    """
    figure, parts = decode_figure(model.short), []
    for contestant in contestants:
        found = samples[contestant.name]
        if contestant.ours and found.rates.get(figure):
            nbytes = model.shape.linear_parameters * (contestant.bits + contestant.scale_bits) / 8
            pairs = zip(found.rates[figure], found.bandwidths, strict=True)
            share = statistics.median(ratio(rate * nbytes, limit) for rate, limit in pairs)
            parts.append(f"{contestant.name} {100 * share:.0f} %")
    return (
        f"{model.title}: read bandwidth {bandwidth / 1e9:.1f} GB/s; part of the one measured right before that the "
        f"linear weights and their scales take at {figure}, medians: {', '.join(parts) or 'not measured'}"
    )


def _figures(model: Model, samples: Mapping[str, Samples]) -> list[str]:
    """The figures that anybody has, in the order of the table."""
    order = [
        *(decode_figure(context) for context in (model.short, model.near, model.long, model.far)),
        *(prefill_figure(tokens) for tokens in model.prefills),
    ]
    return [name for name in order if any(name in found.rates for found in samples.values())]


def _cell(value: float | None) -> Cell:
    return _NOTHING if value is None else value


def _megabytes(nbytes: int | None) -> Cell:
    return _NOTHING if nbytes is None else nbytes / 1e6


def _small(value: float | None) -> Cell:
    return _NOTHING if value is None else f"{value:.1e}"


def _one_line(text: str, workdir: Path) -> str:
    """As a cell of a Markdown table, without the names of this machine's folders."""
    return " ".join(text.replace(f"{workdir}/", "").split()).replace("|", "/")[:300]
