"""Makes what `python -m tests.gpu` needs for the engines of ONNX graphs, on a machine without a GPU."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import exporter.compile
import exporter.write
from benchmarks.sparse_checkpoints import PUBLISHED, write_sparse
from exporter.build.build import build
from exporter.quantize.file import QuantizedFile
from reference.checkpoint import Checkpoint
from runtime.bundle import read_bundle
from tests.gpu.ort_models import (
    BACKEND,
    CONTEXT,
    FOLDER,
    HEADER,
    ROWS,
    TWINS,
    VOCABULARY,
    Large,
    Text,
    Twin,
    text_file,
    write_texts,
)
from tests.support.bundles import Exported, exported, shared_traces
from tests.support.parity import Judge, Rows, boundary_lengths, random_rows, uneven_feeds

_NEVER_SLIDES = 6
"""The length that takes the place of the window where there is none."""
_SEEDS = 24

_MIXTRAL: dict[str, Any] = PUBLISHED["Mixtral-8x22B"] | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
LARGE: dict[str, Large] = {
    # No position limit below what is fed: the shape is the published one, and so is the window.
    "mistral-7b": Large(
        PUBLISHED["Mistral-7B"] | {"max_position_embeddings": 1 << 18},
        {"chunk": 2048, "max_batch": 1},
        "bfloat16",
        target=0.8,
    ),
    "mixtral-8x7b-int4": Large(
        _MIXTRAL,
        {"chunk": 1024, "max_batch": 1, "context": 8192, "weights": "int4", "quantizer": "rtn"},
        "float16",
    ),
}


def prepare_onnxruntime(
    folder: Path,
    say: Callable[[str], None] = print,
    twins: Mapping[str, Twin] = TWINS,
    large: Mapping[str, Large] = LARGE,
) -> None:
    """Make the bundles in `folder`/onnxruntime, whose like are replaced. Raises what exporting and building raise."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    for kind in ("twins", "large"):
        (folder / FOLDER / kind).mkdir(parents=True)
    for name, twin in twins.items():
        for engine in _prepare_twin(folder / FOLDER / "twins", name, twin):
            say(f"{name}: {engine}")
    for name, shape in large.items():
        say(f"{name}: {prepare_large(folder / FOLDER / 'large', name, shape)}")


def _prepare_twin(folder: Path, name: str, twin: Twin) -> Iterator[str]:
    settings = {"vocab_size": VOCABULARY, "dtype": "bfloat16", "options": {"copy": True}, **twin.settings}
    context = CONTEXT if twin.window is None or "layer_windows" in settings else None
    case = exported(chunk=twin.chunk, context=context, max_batch=ROWS, window=twin.window, **settings)
    shutil.copytree(case.bundle, folder / name)
    for arithmetic in twin.arithmetic:
        write_texts(text_file(folder, name, arithmetic), list(texts_of(case, twin, arithmetic)))
        yield build(folder / name, backend=BACKEND, arithmetic=arithmetic).folder.name


def texts_of(case: Exported, twin: Twin, arithmetic: str) -> Iterator[Text]:
    """Rows of every length at a boundary of the window, alone and together, fed in uneven pieces, whole, or singly."""
    judge = Judge(case, arithmetic=arithmetic)
    lengths = boundary_lengths(twin.window or _NEVER_SLIDES, twin.chunk)
    longest = lengths[-1]
    for length in lengths:
        yield _text(judge, f"{length} tokens in uneven pieces", [length], uneven_feeds)
    for three in (lengths[-3:], [lengths[0], *lengths[-2:]], [1, longest, 2]):
        yield _text(judge, f"rows of {', '.join(map(str, three))} tokens in uneven pieces", three, uneven_feeds)
    yield _text(judge, f"{longest} tokens at once", [longest], lambda rows, seed: [rows])
    yield _text(judge, f"{longest} tokens one by one", [longest], lambda rows, seed: [[[t]] for t in rows[0]])


def _text(judge: Judge, name: str, lengths: list[int], feeds_of: Callable[[Rows, int], list[Rows]]) -> Text:
    rows = [_row(judge, length, _SEEDS * index) for index, length in enumerate(lengths)]
    decided = judge.decided(rows)
    assert 2 * sum(decided) >= sum(lengths), f"routers are undecided too early in {name}: {decided}"
    compared = [row[:length] for row, length in zip(rows, decided, strict=True)]
    whole = [row for row in compared if row]
    truth, budget = judge.truth_and_budget(whole)
    others = judge.transformers(whole)
    nothing = truth[0][:0]
    filled = iter(zip(truth, others, strict=True))
    pairs = [next(filled) if row else (nothing, nothing) for row in compared]
    return Text(
        name, feeds_of(rows, sum(lengths)), [pair[0] for pair in pairs], [pair[1] for pair in pairs], budget.allowed
    )


def _row(judge: Judge, length: int, first_seed: int) -> list[int]:
    """Of some texts of this length the first in which routers stay decided for the longest."""
    drawn = (random_rows([length], judge.vocab_size, seed)[0] for seed in range(first_seed, first_seed + _SEEDS))
    best: tuple[int, list[int]] = (-1, [])
    for row in drawn:
        (decided,) = judge.decided([row])
        if decided > best[0]:
            best = decided, row
        if decided == length:
            break
    return best[1]


def prepare_large(folder: Path, name: str, large: Large) -> str:
    """The bundle `folder`/`name` with its engine, and without its weights. Returns the engine's name."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        checkpoint = write_sparse(Path(made) / "checkpoint", large.config, shard_bytes=None)
        with (
            shared_traces(),
            mock.patch.object(exporter.write, "write_quantized_file", _write_hole),
            mock.patch.object(exporter.compile, "refuse_full_disk"),
        ):
            exporter.compile.export(checkpoint, folder / name, hashes=False, prove=False, **large.options)
        engine = build(folder / name, backend=BACKEND, arithmetic=large.arithmetic).folder.name
    sizes = {}
    for file in read_bundle(folder / name).manifest.weights.files:
        path = folder / name / file
        with path.open("rb") as stream:
            count = int.from_bytes(begin := stream.read(8), "little")
            path.with_name(file + HEADER).write_bytes(begin + stream.read(count))
        sizes[file] = path.stat().st_size
        path.unlink()
    told = {"config": dict(large.config), "files": sizes, "arithmetic": large.arithmetic, "target": large.target}
    told["bits"] = 4 + 16 / 32 if "weights" in large.options else 16
    (folder / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return engine


def _write_hole(checkpoint: Checkpoint, planned: QuantizedFile, path: Path, progress: Any = None) -> str:
    """In place of `write_quantized_file`, which would read and quantise a hole for an hour. Its hash is nobody's."""
    with path.open("wb") as stream:
        stream.write(planned.layout.header)
        stream.truncate(planned.layout.nbytes)
    return "0" * 64
