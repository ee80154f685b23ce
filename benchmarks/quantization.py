"""What quantised weights cost in quality: each method and format on the two trained checkpoints that Cierzo ships.

No engine runs here: the reference model computes in float32 with the values that the quantised weights stand for, so
that what is seen is the rounding of the weights and nothing else. `exporter.quantize` took its default from this table.

The variants of the search are written out below, as the product holds only the one that was chosen.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from benchmarks.report import Report, Row
from exporter.demo_data import DEMO_CHECKPOINTS, HELDOUT_FILE, demo_checkpoint
from exporter.quantize import blocks
from exporter.quantize.decide import may_be_quantized
from exporter.quantize.rows import quantize_rows
from reference.checkpoint import Checkpoint, open_checkpoint
from reference.model import Model
from reference.parameters import EMBEDDING, LM_HEAD
from reference.parity import perplexity
from reference.quantized_layout import QuantizedFormat, dequantize
from reference.weights import bind, load_parameter
from runtime.tokenizer import open_tokenizer

Values = dict[str, torch.Tensor]
Quantiser = Callable[[torch.Tensor, QuantizedFormat], torch.Tensor]
"""From rows [R, K] to what their quantised weights stand for."""

ROW = 512
"""Tokens that are read at once, each row from its own beginning."""

FORMATS = tuple(
    QuantizedFormat(bits, block_size, zero_points, "F16")
    for bits, block_size, zero_points in itertools.product((4, 8), (32, 128), (False, True))
)


def product(search: bool) -> Quantiser:
    """One of the product's two methods."""

    def run(rows_RK: torch.Tensor, quantized: QuantizedFormat) -> torch.Tensor:
        made = quantize_rows(rows_RK, quantized, search=search)
        assert made is not None
        return dequantize(made, quantized, rows_RK.shape[1], torch.float32)

    return run


def in_blocks(work: Callable[[torch.Tensor, QuantizedFormat], torch.Tensor]) -> Quantiser:
    """A method that is given whole blocks [n, S]."""

    def run(rows_RK: torch.Tensor, quantized: QuantizedFormat) -> torch.Tensor:
        rows, columns = rows_RK.shape
        padding = quantized.blocks(columns) * quantized.block_size - columns
        padded = torch.nn.functional.pad(rows_RK, (0, padding))
        return work(padded.view(-1, quantized.block_size), quantized).view(rows, -1)[:, :columns]

    return run


def _numbers(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """q - zero."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (x * inverse).round().maximum(-zero).minimum(top - zero)


def positive_rtn(x: torch.Tensor, quantized: QuantizedFormat) -> torch.Tensor:
    """The usual symmetric rounding: a positive scale that maps the largest magnitude to 7, and -8 is never used."""
    zero = torch.full((len(x), 1), float(quantized.middle))
    scale = (x.abs().amax(1, keepdim=True) / (quantized.middle - 1)).half().float()
    return scale * _numbers(x, scale, zero, quantized.largest)


def weighted_search(power: float) -> Callable[[torch.Tensor, QuantizedFormat], torch.Tensor]:
    """The product's search for least sum of (mean w² + w²)^power · error², which favours large weights."""

    def run(x: torch.Tensor, quantized: QuantizedFormat) -> torch.Tensor:
        top, points = quantized.largest, quantized.zero_points
        weight = (x.square().mean(1, keepdim=True) + x.square()) ** power
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
        steps, span = (top, high - low) if points else (quantized.middle, -extreme)
        first = blocks.FIRST_ASYMMETRIC if points else blocks.FIRST_SYMMETRIC
        best = [torch.zeros_like(low), torch.zeros_like(low), torch.full_like(low, float(quantized.middle))]

        def consider(scale: torch.Tensor, zero: torch.Tensor) -> None:
            q = _numbers(x, scale, zero, top)
            xq, qq = (weight * x * q).sum(1, keepdim=True), (weight * q * q).sum(1, keepdim=True)
            explained = torch.where(qq > 0, xq * xq / qq, 0.0)
            better = explained > best[0]
            for index, value in enumerate((explained, xq / qq, zero)):
                best[index] = torch.where(better, value, best[index])

        for candidate in range(blocks.CANDIDATES):
            more = first + blocks.APART * candidate
            zero = torch.full_like(low, float(quantized.middle))
            if points:
                zero = torch.where(span > 0, -low / span * (steps + more) - more / 2, 0.0).round().clamp(0, top)
            consider(span / (steps + more), zero)
        for _ in range(2):
            consider(best[1], best[2])
        scale = best[1].half().float()
        return scale * _numbers(x, scale, best[2], top)

    return run


def half_quadratic(x: torch.Tensor, quantized: QuantizedFormat) -> torch.Tensor:
    """HQQ (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/): the scale of the range, zero points refined.

    Minimises the p-norm of the error, p = 0.7, by half-quadratic splitting; our zero points are whole numbers.
    """
    top, beta = quantized.largest, 10.0
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-low / scale).round().clamp(0, top)
    best, least = zero, math.inf
    for _ in range(20):
        q = _numbers(x, scale, zero, top)
        missed = x - scale * q
        if (error := float(missed.abs().mean())) >= least:
            break
        best, least = zero, error
        shrunk = (missed.abs() - missed.abs().clamp(min=1e-8) ** -0.3 / beta).clamp(min=0) * missed.sign()
        zero = (q + zero - (x - shrunk) / scale).mean(1, keepdim=True).round().clamp(0, top)
        beta *= 1.01
    return scale * _numbers(x, scale, best, top)


METHODS: dict[str, tuple[Quantiser, bool | None]] = {
    "rtn": (product(False), None),
    "search": (product(True), None),
    "rtn, positive scales": (in_blocks(positive_rtn), False),
    "search, weight √(mean w² + w²)": (in_blocks(weighted_search(0.5)), None),
    "search, weight mean w² + w²": (in_blocks(weighted_search(1.0)), None),
    "hqq": (in_blocks(half_quadratic), True),
}
"""Each method, and the one kind of zero points that it is for, if it is not for both."""


class Measured:
    """One checkpoint with its truth: the logits of the weights as they are."""

    def __init__(self, name: str) -> None:
        self.name = name
        opened = open_checkpoint(demo_checkpoint(name))
        self._checkpoint: Checkpoint = opened
        self._values = {n: load_parameter(opened, source, torch.float32).clone() for n, source in bind(opened).items()}
        if opened.config.tie_word_embeddings:
            self._values[LM_HEAD] = self._values[EMBEDDING]
        tokenizer = open_tokenizer(opened.tokenizer_files)
        ids = np.asarray(tokenizer.encode(HELDOUT_FILE.read_text(encoding="utf-8")), dtype=np.int64)
        count = (len(ids) - 1) // ROW
        self._ids = torch.from_numpy(ids[: count * ROW]).view(count, ROW)
        self._next_ids = ids[1 : count * ROW + 1]
        self._truth = self._logits(self._values)
        self._perplexity = perplexity(self._truth.numpy(), self._next_ids)

    @torch.no_grad()
    def _logits(self, values: Values) -> torch.Tensor:
        model = Model(self._checkpoint.config, device="meta")
        model.lm_head.weight = torch.nn.Parameter(values[LM_HEAD])  # its own, where it is tied
        model.load_state_dict({name: value.float() for name, value in values.items()}, assign=True)
        logits: torch.Tensor = model(self._ids).flatten(0, 1)
        return logits.double()

    def row(self, method: str, quantiser: Quantiser, quantized: QuantizedFormat) -> Row:
        """One row of the table."""
        values, missed, all_of_it = {}, 0.0, 0.0
        for name, value in self._values.items():
            if not may_be_quantized(name, value.shape):
                values[name] = value
                continue
            rounded = quantiser(value.reshape(-1, value.shape[-1]), quantized).view(value.shape)
            missed += float((rounded - value).double().square().sum())
            all_of_it += float(value.double().square().sum())
            values[name] = rounded
        logits = self._logits(values)
        truth, found = self._truth.log_softmax(-1), logits.log_softmax(-1)
        return {
            "model": self.name,
            "bits": quantized.bits,
            "block": quantized.block_size,
            "zero points": "yes" if quantized.zero_points else "no",
            "method": method,
            "error of the weights (%)": 100 * math.sqrt(missed / all_of_it),
            "KL (mnat)": 1e3 * float((truth.exp() * (truth - found)).sum(-1).mean()),
            "same first token (%)": 100 * float((truth.argmax(-1) == found.argmax(-1)).double().mean()),
            "perplexity (ratio - 1, %)": 100 * (perplexity(logits.numpy(), self._next_ids) / self._perplexity - 1),
        }


def rows(models: Sequence[str]) -> Iterator[Row]:
    """All rows: every method that goes with a format, on every model; of 8 bits the product's methods only."""
    for name in models:
        measured = Measured(name)
        for quantized in FORMATS:
            for method, (quantiser, points) in METHODS.items():
                ours = method in ("rtn", "search")
                if (points is None or points == quantized.zero_points) and (ours or quantized.bits == 4):
                    yield measured.row(method, quantiser, quantized)


def _mean_kl(table: Sequence[Row], method: str) -> float:
    chosen = [row for row in table if row["method"] == method and row["bits"] == 4]
    return float(np.mean([float(row["KL (mnat)"] or 0) for row in chosen]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=DEMO_CHECKPOINTS, default=DEMO_CHECKPOINTS, help="checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        "quantization",
        "Quality of quantised weights",
        "The reference model in float32 over the held-out stories in rows of "
        f"{ROW} tokens, with the values that the quantised "
        "weights stand for; embedding, routers and norms as they are. KL divergence from the unquantised model's "
        "distribution, a thousandth of a nat; error of the weights relative to their root mean square.",
    )
    table = list(rows(options.models))
    general = [method for method, (_, points) in METHODS.items() if points is None]
    for method in general:
        report.say(f"int4, mean over models and formats: KL {_mean_kl(table, method):.2f} mnat with {method}")
    report.say(
        "weighting the error by the weights' own size changes little and not always for the better, so that search is "
        "by plain squared error; symmetric scales may be negative, which leaves no number unused"
    )
    report.tables = {"Methods": table}
    report.finish()


if __name__ == "__main__":
    main()
