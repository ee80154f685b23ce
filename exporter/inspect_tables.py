"""How `cierzo inspect` draws its report: tables of at most 80 columns, numbers to three digits beside exact ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exporter.console import facts_table, new_table
from exporter.fusion_table import draw_fusion
from exporter.inspect_receipts import draw_receipts
from exporter.inspect_report import (
    BundleFacts,
    EngineFacts,
    InspectReport,
    KernelFacts,
    KVUse,
    ParameterCount,
    ReceptiveField,
    StoredTensors,
)
from exporter.node_table import draw_nodes

_LAYOUTS = {"huggingface": "Hugging Face", "native": "Mistral's own"}
_PLACES = {"copied": "copied into the bundle", "linked": "linked from the checkpoint", "folder": "in their own folder"}
_LABELS = {"embedding": "embedding", "mlp": "MLP", "norms": "norms", "lm_head": "lm_head"}


def draw(report: InspectReport, console: Console) -> None:
    """Print `report`: the model, its parameters, the receptive field, KV memory, and what lies on disk."""
    console.print(f"[bold]{escape(report.path)}[/bold] ({report.kind})", soft_wrap=True)
    console.print(_model_table(report))
    if report.parameters.groups is not None:
        console.print(_parameter_table(report.parameters))
    console.print(_reach_table(report.receptive_field))
    console.print(_kv_table(report.kv))
    if report.stored is not None:
        console.print(_stored_table(report.stored))
    if report.bundle is not None:
        console.print(_bundle_table(report.bundle))
        console.print(_memory_table(report.bundle))
        console.print(_kernel_table(report.bundle.kernels))
        console.print(_file_table(report.bundle.files))
        if report.bundle.engines:
            console.print(_engine_table(report.bundle.engines))
        for engine in report.bundle.engines:
            if engine.nodes is not None:
                console.print(draw_nodes(f"Nodes of {escape(engine.name)}", engine.nodes))
        if (lowered := report.bundle.lowered) is not None:
            console.print(draw_nodes(f"Nodes of an engine for {lowered.backend}, {lowered.arithmetic}", lowered.nodes))
        if report.bundle.receipts:
            console.print(draw_receipts(report.bundle.receipts))
        for table in draw_fusion(report.bundle.fusion):
            console.print(table)


def count(number: int) -> str:
    """A number of parameters to three digits: 7.24 B, 842 M, 51.2 K, 640."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= 0.9995 * size:  # what rounds up to 1000 K is 1.00 M
            return f"{_three_digits(number / size)} {unit}"
    return str(number)


def size(nbytes: int) -> str:
    """A number of bytes to three digits in binary units: 4.00 GiB, 512 MiB, 640 B."""
    for power, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= power:
            return f"{_three_digits(nbytes / power)} {unit}"
    return f"{nbytes} B"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _model_table(report: InspectReport) -> Table:
    model, total = report.model, report.parameters.total
    active = report.parameters.active
    parameters = f"{count(total)} ({total:,})"
    if active is not None and active != total:
        parameters += f", {count(active)} active per token"
    experts = f"{model.num_experts}, of which each token visits {model.top_k}" if model.num_experts else None
    sharing = {model.num_heads: "MHA", 1: "MQA"}.get(model.num_kv_heads, "GQA")
    rope = None if model.rope_type is None else f"{model.rope_type}, theta {model.rope_theta:,.0f}"
    return facts_table(
        "",
        {
            "architecture": model.architecture,
            "parameters": parameters,
            "layers": model.num_layers,
            "hidden size": model.hidden_size,
            "heads": f"{model.num_heads} query, {model.num_kv_heads} key-value ({sharing})",
            "head dimensions": model.head_dim,
            "intermediate size": model.intermediate_size,
            "experts": experts,
            "activation": model.activation,
            "RoPE": rope,
            "vocabulary": f"{model.vocab_size:,}"
            + (", embedding tied to lm_head" if model.tie_word_embeddings else ""),
            "positions trained": model.max_position_embeddings,
            "weights stored as": model.dtype,
            "quantised by": model.quantization,
            "layout": _LAYOUTS.get(model.layout or ""),
        },
    )


def _parameter_table(parameters: ParameterCount) -> Table:
    table = new_table("Parameters", "part", "count", "exact", "share")
    for group, number in (parameters.groups or {}).items():
        table.add_row(_LABELS.get(group, group), count(number), f"{number:,}", _share(number, parameters.total))
    table.add_section()
    table.add_row("total", count(parameters.total), f"{parameters.total:,}", "100.0%", style="bold")
    if parameters.active is not None and parameters.active != parameters.total:
        share = _share(parameters.active, parameters.total)
        table.add_row("active per token", count(parameters.active), f"{parameters.active:,}", share, style="bold")
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part * 1000 >= whole else "< 0.1%"


def _reach_table(field: ReceptiveField) -> Table:
    windows = field.layer_windows
    rows: dict[str, object] = {}
    for window in sorted({window for window in windows if window is not None}):
        layers = [index for index, other in enumerate(windows) if other == window]
        rows[f"window of {window:,}"] = f"{len(layers)} of {len(windows)} layers ({_ranges(layers)})"
    full = [index for index, window in enumerate(windows) if window is None]
    if full:
        rows["full attention"] = f"{len(full)} of {len(windows)} layers ({_ranges(full)})"
        rows["receptive field"] = "unbounded: a layer with full attention sees the whole context"
    else:
        equal = len(set(windows)) == 1
        rows["receptive field"] = f"{field.exact:,} tokens exactly, {'L·(W − 1) + 1' if equal else '1 + Σ(W − 1)'}"
        rows["customarily quoted"] = f"{field.customary:,} tokens, {'L·W' if equal else 'ΣW'}"
    return facts_table("Attention", rows)


def _ranges(indices: Sequence[int]) -> str:
    """Ascending layer numbers with runs joined: 0, 4-6, 8."""
    runs = []
    for _, members in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        run = [index for _, index in members]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(runs)


def _kv_table(uses: Sequence[KVUse]) -> Table:
    slides = any(use.windowed_fp32 < use.full_fp32 for use in uses)
    columns = ("fp32", "fp32, no window", "fp16", "fp16, no window") if slides else ("fp32", "fp16")
    table = new_table("KV memory of one sequence", "context", *columns, left=0)
    for use in uses:
        windowed, full = (use.windowed_fp32, use.windowed_fp16), (use.full_fp32, use.full_fp16)
        amounts = (windowed[0], full[0], windowed[1], full[1]) if slides else full
        context = f"{use.context // 1024}K" if use.context % 1024 == 0 else f"{use.context:,}"
        table.add_row(context, *(size(amount) for amount in amounts))
    return table


def _stored_table(stored: StoredTensors) -> Table:
    unused = f"{len(stored.unused)} ({', '.join(sorted(set(stored.unused.values())))})" if stored.unused else "none"
    rows = {
        "files": stored.files,
        "tensors": f"{stored.tensors:,}: {_types(stored.dtypes)}",
        "size": size(stored.bytes),
        "unused": unused,
    }
    return facts_table("On disk", rows)


def _types(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {dtype}" for dtype, number in numbers.items())


def _bundle_table(bundle: BundleFacts) -> Table:
    slots = ", ".join(f"{len(list(run))} x {capacity:,}" for capacity, run in groupby(bundle.capacities))
    return facts_table(
        "Bundle",
        {
            "written by": f"Cierzo {bundle.cierzo_version}, opset {bundle.opset}",
            "weights": f"{_types(bundle.weights_types)}; {_PLACES[bundle.weights_placement]}",
            "quantised": bundle.quantization,
            "weights' folder": bundle.weights_folder,
            "computed in": bundle.arithmetic,
            "tokens per step": f"{bundle.chunk:,} at most, for up to {bundle.max_batch} rows",
            "context": "unbounded, every layer slides" if bundle.context is None else f"{bundle.context:,} tokens",
            "ring slots": f"{slots} ({bundle.kv_dtype})",
            "KV memory": f"{size(bundle.kv_bytes_per_row)} per row, {size(bundle.kv_bytes)} for {bundle.max_batch}",
            "tokenizer": ", ".join(bundle.tokenizer) or "none",
        },
    )


def _memory_table(bundle: BundleFacts) -> Table:
    sessions = [bundle.memory]
    columns = ["1 row"]
    if bundle.max_batch > 1:
        sessions.append(bundle.memory_of_all_rows)
        columns.append(f"{bundle.max_batch} rows")
    table = new_table("Memory of a session on this machine", "part", *columns)
    for part, name in (
        ("weights, read from their files", "weights"),
        ("weights made at load", "folded"),
        ("KV", "kv"),
        ("buffers of a step", "buffers"),
        ("Python and ONNX Runtime", "overhead"),
    ):
        table.add_row(part, *(size(getattr(session, name)) for session in sessions))
    table.add_section()
    table.add_row("total", *(size(session.total) for session in sessions), style="bold")
    table.add_row("at most while loading", *(size(session.loading) for session in sessions))
    return table


def _kernel_table(kernels: KernelFacts) -> Table:
    return facts_table(
        "Native kernels on this machine",
        {
            "library": kernels.library,
            "instructions": kernels.isa,
            "native": _types({f"x {op}": number for op, number in kernels.native.items()}) or "no node",
            "portable bodies": _types({f"x {op}": number for op, number in kernels.bodies.items()}) or "no node",
            "ONNX Runtime's own": f"{sum(kernels.standard.values()):,} nodes of {len(kernels.standard)} ops",
            "why": kernels.reason,
        },
    )


def _file_table(files: Mapping[str, int]) -> Table:
    table = new_table("Files", "file", "size", "bytes")
    for name, nbytes in files.items():
        table.add_row(escape(name), size(nbytes), f"{nbytes:,}")
    return table


def _engine_table(engines: Sequence[EngineFacts]) -> Table:
    """Names say most: library, version, compute capability, arithmetic."""
    table = new_table("Engines", "engine", "with", "size", left=2)
    table.columns[0].no_wrap = True
    for engine in engines:
        if engine.problem is not None:
            table.add_row(escape(engine.name), escape(engine.problem))
        else:
            told = f"{engine.kv} rings"
            if engine.nodes is None:
                plugins = f"{len(engine.plugins) or 'no'} plugin{'' if len(engine.plugins) == 1 else 's'}"
                told = f"{told}\n{plugins}\n{engine.weights}"
            table.add_row(escape(engine.name), told, size(engine.bytes or 0))
    return table
