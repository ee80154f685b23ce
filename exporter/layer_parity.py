"""Holds every module's output against the reference: where along the depth does an engine leave its budget?

Two Polygraphy runners get the same row. One is the reference in float64 over the full context, streamed layer by
layer; the other is the bundle's own graph with its module outputs tapped, run through the rolling steps chunk by
chunk over several wraps. The budget of a module follows the one rule of `reference.parity`: what the reference itself
errs there in the engine's dtype, times the table's multiple, between its floor and its ceiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporter.borders import boundary_lengths
from exporter.bundle_graph import load_graph
from exporter.layer_report import LayerReport, ModuleParity
from exporter.parity_tools import largest_differences, quiet_polygraphy, require_polygraphy
from exporter.quantized_reference import QuantizedReference, quantized_reference
from exporter.taps import RollingTaps, modules_of
from exporter.validate import open_matching
from reference.checkpoint import Checkpoint
from reference.config import ModelConfig
from reference.parity import Budget
from runtime import load
from runtime.bundle import Bundle, read_bundle
from runtime.chunking import split_into_steps
from runtime.errors import BundleError

HELD_BYTES = 1 << 30
"""Module outputs that are held at once. A longer row is still run whole, but compared at positions spread over it."""

_BYTES_PER_NUMBER = 8 + 4 + 4
"""Truth in float64, the reference in float32, the engine in float32."""

Progress = Callable[[str, int, int], None]
Row = npt.NDArray[np.int64]
Stages = tuple[tuple[str, ...], ...]


def compare_layers(
    bundle: str | Path,
    checkpoint: str | Path | None = None,
    *,
    seed: int = 0,
    tokens: int | None = None,
    held_bytes: int = HELD_BYTES,
    weights_folder: Path | None = None,
    progress: Progress | None = None,
) -> LayerReport:
    """Compare every module of the bundle's graph with the reference model of `checkpoint`.

    tokens: length of the random row, by default the longest border of `validate` (3 W + C for the widest window W).
    held_bytes: bound on the outputs held at once; see HELD_BYTES. weights_folder: see `read_bundle`.

    Raises what `validate` raises when the comparison cannot be run, and CierzoError without Polygraphy.
    """
    require_polygraphy()
    session = load(bundle, weights_folder=weights_folder)
    opened = open_matching(session, checkpoint)
    length = tokens if tokens is not None else boundary_lengths(session, opened.config.layer_windows)[-1]
    row = np.random.default_rng(seed).integers(0, opened.config.vocab_size, length, dtype=np.int64)
    del session  # its rings and weights; the taps make a graph of their own
    read = read_bundle(bundle, weights_folder=weights_folder)
    model = load_graph(read)
    return compare_graph(model, read, opened, row, held_bytes=held_bytes, progress=progress)


def compare_graph(
    model: ir.Model,
    bundle: Bundle,
    checkpoint: Checkpoint,
    row: Row,
    *,
    reference: QuantizedReference | None = None,
    held_bytes: int = HELD_BYTES,
    in_place: bool = True,
    progress: Progress | None = None,
) -> LayerReport:
    """`compare_layers` for any graph with the inputs and outputs of `bundle`, whose weights lie in its folder.

    Plugin nodes run as a session runs them, with native kernels where there are any: it is the engine that is judged.

    reference: what the reference computes with where weights are quantised; by default what the bundle holds.
    in_place: see `exporter.taps.RollingTaps`.
    """
    names = modules_of(model)
    stages = _stages(checkpoint.config)
    missing = tuple(path for stage in stages for path in stage if path not in names)
    present = tuple(tuple(path for path in stage if path in names) for stage in stages)
    if not any(present):
        raise BundleError(
            "The nodes of the bundle's graph do not say which module they come from, so its modules cannot be "
            "compared. Export the checkpoint again with this version."
        )
    sizes = [_BYTES_PER_NUMBER * sum(_features(checkpoint.config, path) for path in stage) for stage in stages]
    kept = min(len(row), max(1, held_bytes // max(sizes)))
    positions = np.unique(np.linspace(0, len(row) - 1, kept).astype(np.int64))
    groups = _grouped([size * len(positions) for size in sizes], held_bytes)
    from exporter.layer_runners import EngineRunner, ReferenceRunner, cut

    held = reference or quantized_reference(bundle)
    truth = ReferenceRunner(checkpoint, held, row, present, groups, positions, progress)
    taps = [[names[path] for index in group for path in present[index]] for group in groups]
    paths = [[path for index in group for path in present[index]] for group in groups]

    def engine_outputs(group: int) -> dict[str, npt.NDArray[Any]]:
        steps = split_into_steps([row], np.zeros(1, np.int64), bundle.manifest.kv.chunk)
        rolling = RollingTaps(
            model, bundle.manifest, bundle.weights_folder, taps[group], in_place=in_place, native=True
        )
        found = _at_positions(rolling, steps, dict(zip(paths[group], taps[group], strict=True)), positions)
        return {path: cut(array, positions, truth.limits[path]) for path, array in found.items()}

    engine = EngineRunner(engine_outputs)
    modules: list[ModuleParity] = []
    with quiet_polygraphy():
        modules.extend(_compared(truth, engine, len(groups), progress))
    return LayerReport(
        modules=tuple(modules),
        missing=missing,
        tokens=len(row),
        compared_positions=len(positions),
        decided=truth.decided,
        groups=len(groups),
        chunk=bundle.manifest.kv.chunk,
        windows=checkpoint.config.layer_windows,
        dtype=held.rounding.kind,
    )


def _compared(reference: Any, engine: Any, groups: int, progress: Progress | None) -> Iterator[ModuleParity]:
    """Every module in order; both runners go through the groups side by side, so that only one group is held."""
    from polygraphy.comparator import Comparator

    from exporter.layer_runners import GROUP

    feeds = ({GROUP: np.array([group], np.int64)} for group in range(groups))
    for number, results in enumerate(Comparator.run([reference, engine], data_loader=feeds, streaming=True), start=1):
        budgets: dict[str, Budget] = reference.budgets
        allowed = {path: module.allowed for path, module in budgets.items()}
        for path, (error, passed) in largest_differences(results, allowed).items():
            module = budgets[path]
            if reference.limits[path] == 0:
                continue  # behind a router that is undecided at the very first token
            yield ModuleParity(
                path, depth_of(path), error, module.allowed, module.reference_error, module.largest_logit, passed
            )
        if progress is not None:
            progress("comparing modules", number, groups)


def depth_of(path: str) -> int:
    """0 for the embedding, 1 … L for the layers; what is behind them gets −1, as the path alone does not say L."""
    parts = path.split(".")
    return int(parts[1]) + 1 if parts[0] == "layers" else 0 if path == "embed_tokens" else -1


def _stages(config: ModelConfig) -> Stages:
    """The modules of the model in the order of computation; a layer's own output comes last among its modules."""
    inner = ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    inner += ["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else []
    inner += ["self_attn.o_proj", "post_attention_layernorm"]
    inner += ["moe.router", "moe"] if config.moe is not None else ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    layers = [(*(f"layers.{index}.{name}" for name in inner), f"layers.{index}") for index in range(config.num_layers)]
    return (("embed_tokens",), *layers, ("norm", "lm_head"))


def _features(config: ModelConfig, path: str) -> int:
    name = path.rpartition(".")[2]
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {
        "q_proj": queries,
        "k_proj": keys,
        "v_proj": keys,
        "q_norm": queries,
        "k_norm": keys,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
        "router": config.moe.num_experts if config.moe is not None else 0,
        "lm_head": config.vocab_size,
    }
    return sizes.get(name, config.hidden_size)


def _grouped(sizes: Sequence[int], limit: int) -> tuple[tuple[int, ...], ...]:
    """Stage numbers in consecutive groups of at most `limit` bytes, one stage at least."""
    groups: list[list[int]] = [[]]
    held = 0
    for stage, size in enumerate(sizes):
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(stage)
        held += size
    return tuple(tuple(group) for group in groups)


def _at_positions(
    rolling: RollingTaps, steps: Any, values: dict[str, str], positions: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[Any]]:
    """Tapped values [T, features] of one row at `positions`, gathered over the steps."""
    pieces: dict[str, list[npt.NDArray[Any]]] = {path: [] for path in values}
    first = 0
    for feeds, taps in rolling.run(steps, 1):
        width = next(iter(feeds.values())).shape[1]
        inside = positions[(positions >= first) & (positions < first + width)] - first
        for path, name in values.items():
            pieces[path].append(taps[name].reshape(width, -1)[inside])
        first += width
    return {path: np.concatenate(parts) for path, parts in pieces.items()}
