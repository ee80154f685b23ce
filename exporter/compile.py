"""The way from a checkpoint to a bundle, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import onnx_ir as ir

from exporter.defaults import DEFAULT_MAX_BATCH, FRONTENDS, KV_KINDS, TRACING, WEIGHT_KINDS
from exporter.describe import small_files, version
from exporter.frontends import REFERENCE, Frontend, open_frontend, trace
from exporter.partial import remove_leftovers
from exporter.placement import foresee
from exporter.plan import ExportPlan, make_plan
from exporter.quantize.options import read_options
from exporter.save import absolute, bundle_folder, refuse_existing, refuse_full_disk, refuse_names
from exporter.stitch import stitch
from exporter.text_ends import with_text_ends
from exporter.trace import past_names, present_names
from exporter.unchanged import states_of
from exporter.write import Job, plan_weights, write_bundle
from graph_passes import pipeline
from graph_passes.fuse.sliding_window import LONGEST_WINDOW
from graph_passes.ops import DOMAIN
from graph_passes.ops.grouped_query_attention import GROUPED_QUERY_ATTENTION
from graph_passes.ops.rolling_attention import ROLLING_ATTENTION
from graph_passes.ops.sliding_window_attention import FULL
from graph_passes.region import IR_VERSION
from reference.checkpoint import open_checkpoint
from reference.torch_state import plain_torch
from reference.weights import bind
from runtime.errors import ExportError, FusionError
from runtime.tokenizer_files import has_tokenizer, needed_files

Progress = Callable[[str, int, int], None]


@plain_torch()
def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    weights: str = WEIGHT_KINDS[0],
    block_size: int | None = None,
    zero_points: bool | None = None,
    scales: str | None = None,
    quantizer: str | None = None,
    keep: Collection[str] = (),
    copy: bool = False,
    hashes: bool = True,
    chunk: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    context: int | None = None,
    kv: str | None = None,
    prove: bool = True,
    dump_passes: str | Path | None = None,
    progress: Progress | None = None,
    ignore_config_keys: Collection[str] = (),
    layout: str | None = None,
    text_only: bool = False,
    frontend: str = FRONTENDS[0],
    attention: str | None = None,
) -> Path:
    """Compile the checkpoint in folder `checkpoint` into the bundle folder `out`, and return `out`.

    weights: "stored" leaves every weight in the type and in the files that it has, and the graph says how it becomes
        what is computed with; "fp32" converts into a file of the bundle, unless the checkpoint holds exactly that
        already. Arithmetic is float32 in both, and so are the logits the same. Infinite values and such that are no
        numbers are found only where values are read: with "fp32" and with `copy`. "int8" and "int4" quantise matrices
        (`exporter.quantize.decide` says which) into a file of the bundle. A checkpoint that is quantised already is
        copied as it is, by "stored" and by the kind that it has; "fp32" turns its weights back into numbers.
    block_size: weights that share a scale, 16 to 256; by default 32. zero_points: whether a block has one; by default
        not. scales: "float16" (the default) or "float32". quantizer: "search" (the default), which looks for the scales
        of least squared error, or "rtn", which takes those that the largest weights give. The last four are for the
        quantised kinds only, and None means the default, or what a quantised checkpoint has.
    keep: parameters that a quantised kind leaves more precise, each "NAME" (as stored) or "NAME=int8": NAME is one of
        GROUPS in `exporter.defaults`, or a pattern over parameters such as "layers.3.*". The most precise counts.
    copy: write the weights into the bundle, so that it needs no file of the checkpoint; else they are linked or named
        (see `exporter.placement`).
    hashes: record hashes of the checkpoint's files, which reads them once.
    chunk, max_batch, context: see `exporter.plan`.
    kv: type of the KV buffers, "float32", "float16" or "int8"; None is float32, and float16 with quantised weights.
    prove: hold every fusion numerically against the nodes that it replaces.
    dump_passes: a folder that gets the template's graph before and after each pass.
    progress: called with (stage, done, total), in bytes for the stages BYTE_STAGES of `exporter.defaults`.
    ignore_config_keys, layout, text_only: see `open_checkpoint`.
    frontend, attention: what is traced, "reference" or "transformers", and for the latter with "sdpa" (the default) or
        "eager" attention; see `exporter.frontends`. The bundle is the same function with the same plugin nodes.

    Raises ConfigError, CheckpointError and TokenizerError for what the checkpoint is, ExportError and its children for
    everything later. `out` exists afterwards, whole, or not at all.
    """
    target = absolute(out)
    if weights not in WEIGHT_KINDS:
        raise ExportError(f"weights = {weights!r} is not one that this version writes ({', '.join(WEIGHT_KINDS)}).")
    quantize = read_options(
        weights, block_size=block_size, zero_points=zero_points, scales=scales, quantizer=quantizer, keep=keep
    )
    refuse_names([target])
    refuse_existing(target)
    dump_folder = None if dump_passes is None else _made_dump_folder(dump_passes, target)
    opened = open_checkpoint(checkpoint, ignore_config_keys=ignore_config_keys, layout=layout, text_only=text_only)
    files = {entry.file for entry in opened.tensors.values()}
    seen = states_of([*sorted(files), *small_files(opened, opened.tokenizer_files)])
    refuse_names([opened.path, *seen])
    chosen = open_frontend(frontend, attention, opened, ignore_config_keys)
    tokenizer = needed_files(opened.tokenizer_files) if has_tokenizer(opened.tokenizer_files) else ()
    opened = with_text_ends(opened, tokenizer)
    placed = plan_weights(opened, bind(opened), weights, copy, quantize)
    kv = kv or KV_KINDS[0 if placed.quantized is None else 1]
    plan = make_plan(opened.config, chunk=chunk, max_batch=max_batch, context=context, kv=kv)
    remove_leftovers(target)
    refuse_full_disk(target, placed.disk_bytes)
    if placed.file is None:
        foresee(placed.files, target)
    model, report = build_graph(plan, frontend=chosen, prove=prove, dump_folder=dump_folder, progress=progress)
    options = {
        "weights": weights,
        "block_size": block_size,
        "zero_points": zero_points,
        "scales": scales,
        "quantizer": quantizer,
        "keep": list(keep),
        "copy": copy,
        "hashes": hashes,
        "frontend": chosen.name,
        "attention": chosen.attention,
        "chunk": plan.chunk,
        "max_batch": max_batch,
        "context": plan.context,
        "kv": plan.kv,
        "prove": prove,
        "ignore_config_keys": sorted(ignore_config_keys),
        "layout": layout,
        "text_only": text_only,
    }
    fusion = report.to_json()
    with bundle_folder(target) as folder:
        write_bundle(
            folder, Job(opened, plan, placed, tokenizer, chosen, options, hashes, seen), model, fusion, progress
        )
    return target


def _made_dump_folder(dump_passes: str | Path, target: Path) -> Path:
    """The folder for the graphs between passes; raises ExportError when it cannot be made, or lies in the bundle."""
    folder = absolute(dump_passes)
    if target in (folder, *folder.parents):
        raise ExportError(f"The passes cannot be dumped into the bundle {target} itself. Choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"The folder {folder} for the dumped passes cannot be made: {error}.") from error
    return folder


@plain_torch()
def build_graph(
    plan: ExportPlan,
    *,
    frontend: Frontend = REFERENCE,
    prove: bool = True,
    dump_folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[ir.Model, pipeline.PipelineReport]:
    """The fused graph of all layers with unbound weights, and what the passes did to its template.

    Raises ExportError for a window too wide to be recognised, and FusionError when the whole model does not hold each
    plugin node as often as the architecture says.
    """
    widest = max((window for window in plan.kinds if window is not None), default=0)
    if widest > LONGEST_WINDOW:
        raise ExportError(
            f"The checkpoint says a sliding window of {widest:,} tokens, and masks are recognised up to "
            f"{LONGEST_WINDOW:,} only. If no text will be that long, set sliding_window to null there and give the "
            "--context you need."
        )
    if progress is not None:
        progress(TRACING, 0, 1)
    template = trace(plan, frontend)
    twin = trace(plan.twin, frontend) if plan.twin is not None else None
    if progress is not None:
        progress(TRACING, 1, 1)
    report = pipeline.run(
        template,
        expected_fusions(plan, len(plan.kinds)),
        twin=twin,
        proving=prove,
        dump_folder=dump_folder,
        progress=progress,
    )
    model = stitch(template, plan)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "cierzo", version("cierzo")
    model.graph.name = f"{plan.config.architecture}-{plan.config.num_layers}"
    _check_nodes(model, plan)
    return model, report


def expected_fusions(plan: ExportPlan, layers: int) -> dict[str, int]:
    """How often each rule must fire in a graph of `layers` layers.

    Query and key turn, key and value are written; a layer has two norms, and the model one more behind the last.
    """
    config = plan.config
    attention = ("gqa", "sliding_window", "rolling_attention")
    expected = {"rope": 2 * layers, "rolling_kv": 2 * layers, **dict.fromkeys(attention, layers)}
    expected["rms_norm"] = (4 if config.qk_norm else 2) * layers + 1
    if config.moe is not None:
        expected |= {"moe_gate": layers, "moe": layers}
    else:
        expected |= {"gated_activation": layers}
    # Four projections of the attention, and the router or the three of the feed-forward layer; then the output.
    expected["linear"] = (5 if config.moe is not None else 7) * layers + 1
    return expected


TAKEN_IN = (*(op.name for op in ROLLING_ATTENTION.calls), GROUPED_QUERY_ATTENTION.name)
"""Plugin ops whose nodes end up inside other ones; their function bodies may stay, since others call them."""


def expected_nodes(plan: ExportPlan) -> dict[str, int]:
    """How often each plugin node must be in the whole model."""
    rules = expected_fusions(plan, plan.config.num_layers)
    by_op = {rule.op.name: rules.get(rule.name, 0) for rule, _ in pipeline.PIPELINE}
    return by_op | dict.fromkeys(TAKEN_IN, 0)


def _check_nodes(model: ir.Model, plan: ExportPlan) -> None:
    """The contract on the whole model: node counts, and each layer's own window on its attention node."""
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    for op, expected in expected_nodes(plan).items():
        found = sum(node.op_type == op for node in nodes)
        if found != expected:
            raise FusionError(f"The model holds {found} nodes of {op} where {expected} are due. Nothing was written.")
    attention = [node for node in nodes if node.op_type == ROLLING_ATTENTION.name]
    windows = tuple(node.attributes["window"].as_int() for node in attention)
    due = tuple(FULL if window is None else window for window in plan.config.layer_windows)
    if windows != due:
        raise FusionError(
            f"The attention nodes were found to have the windows {windows} and the checkpoint says {due} "
            f"({FULL} is full attention). Nothing was written."
        )
    for layer, node in enumerate(attention):
        rings = (*node.inputs[5:7], *node.outputs[1:3])
        names = tuple("nothing" if ring is None else str(ring.name) for ring in rings)
        if names != (*past_names(layer), *present_names(layer)):
            raise FusionError(
                f"The attention of layer {layer} reads and writes the rings {', '.join(names)}, which could not stay "
                "where they are. Nothing was written."
            )
