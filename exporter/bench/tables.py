"""How `cierzo bench` draws its report: tables of at most 100 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exporter.bench.profile import BODY, KERNEL
from exporter.bench.report import BenchReport, Prefill, Profile, Spread
from exporter.console import facts_table, new_table
from exporter.inspect_tables import count, size

_SHOWN = 16
"""Rows of a profile; what is left is one more."""

_KINDS = {KERNEL: "native kernel", BODY: "function body"}


def draw(report: BenchReport, console: Console) -> None:
    """Print `report`: the machine and its limits, speed, memory, and where the time goes."""
    model, machine, options = report.model, report.machine, report.options
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(f"[bold]{escape(report.bundle)}[/bold]", soft_wrap=True)
    console.print(
        facts_table(
            "",
            {
                "model": f"{model['architecture']}, {count(model['parameters'])} parameters ({model['weights']})",
                "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
                f"{machine['system']}, load {machine['load_average']}",
                "versions": f"Python {machine['python']}, {versions}",
                "kernels": _kernels(report.kernels),
                "measured": ", ".join(
                    plural(options[name], word)
                    for name, word in (("threads", "thread"), ("batch", "row"), ("rounds", "round"))
                )
                + f", {plural(options['decode_tokens'], 'token')} decoded in a group",
            },
        )
    )
    console.print(_limits_table(report))
    console.print(_speed_table(report))
    console.print(_memory_table(report))
    console.print(_reads_table(report))
    for phase, profile in report.profile.items():
        console.print(_profile_table(phase, profile))
    for left_out in report.left_out:
        console.print(f"Left out: {escape(left_out.what)}. {escape(left_out.reason)}", soft_wrap=True)


def _kernels(kernels: Mapping[str, Any]) -> str:
    if kernels["isa"] is None:
        return f"none: {kernels['reason']}"
    return f"{kernels['isa']}, for {', '.join(kernels['ops']) or 'none of the nodes of this graph'}"


def number(value: float | None) -> str:
    """Three digits, whole from a hundred on; - for what is unknown."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def share(value: float | None) -> str:
    """A share in per cent; - for an unknown one."""
    return "-" if value is None else f"{100 * value:.0f} %"


def plural(number: int, word: str) -> str:
    """1 thread, 2 threads."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _range(spread: Spread, unit: float = 1.0) -> str:
    return f"{number(spread.least / unit)} to {number(spread.most / unit)}"


def _limits_table(report: BenchReport) -> Table:
    limits = report.limits
    threads = plural(report.options["threads"], "thread")
    table = new_table(f"The machine's limits on {threads}", "limit", "median", "range")
    rows = [
        ("memory read, GB/s", limits.read_bandwidth, 1e9),
        ("float32 product, Gop/s", limits.float_operations, 1e9),
        ("8-bit products in registers, Gop/s", limits.int8_operations, 1e9),
    ]
    for name, spread, unit in rows:
        if spread is None:
            table.add_row(name, "-", "-")
        else:
            table.add_row(name, number(spread.median / unit), _range(spread, unit))
    return table


def _speed_table(report: BenchReport) -> Table:
    table = new_table(
        "Speed", "context", "prefill tok/s", "range", "of peak", "decode tok/s", "range", "ms", "of bandwidth", left=0
    )
    for at in report.contexts:
        table.add_row(
            f"{at.context:,}",
            *_prefill_cells(at.prefill),
            number(at.decode.tokens_per_second.median),
            _range(at.decode.tokens_per_second),
            number(at.decode.milliseconds),
            share(at.decode.share_of_read_bandwidth),
        )
    if report.first_token is not None:
        first = report.first_token
        elapsed = f"{number(first.seconds.median)} s ({_range(first.seconds)})"
        table.caption = (
            f"First token after a prompt of {first.tokens:,}: {elapsed}, "
            f"{number(first.tokens_per_second)} tokens/s, {share(first.share_of_matmul_peak)} of the matmul peak"
        )
        table.caption_justify = "left"
    return table


def _prefill_cells(prefill: Prefill) -> tuple[str, str, str]:
    """Rate, its range, and the share of the peak."""
    rates = [prefill.tokens_per_second * prefill.seconds.median / elapsed for elapsed in prefill.seconds.samples]
    return number(prefill.tokens_per_second), _range(Spread.of(rates)), share(prefill.share_of_matmul_peak)


def _memory_table(report: BenchReport) -> Table:
    memory = report.memory
    shown = {
        "load": f"{number(report.load_seconds.median)} s ({_range(report.load_seconds)})",
        "resident before loading": memory.before,
        "after loading": memory.loaded,
        "after the first tokens": memory.ready,
        "at the end": memory.end,
        "of that not backed by files": memory.anonymous,
        "at most": memory.peak,
        "KV buffers": memory.kv_bytes,
    }
    return facts_table(
        "Memory",
        {
            name: value if isinstance(value, str) else "-" if value is None else size(value)
            for name, value in shown.items()
        },
    )


def _reads_table(report: BenchReport) -> Table:
    table = new_table("Read by a decode step", "op", "nodes", "weights", "how known")
    for read in report.step.reads:
        table.add_row(read.op, str(read.nodes), size(read.bytes), "counted" if read.counted else "from the graph")
    table.add_section()
    table.add_row("all weights", "", size(report.step.weight_bytes), "", style="bold")
    if report.step.kv_bytes_read is not None:
        table.add_row("KV buffers", "", size(report.step.kv_bytes_read), "counted")
    return table


def _profile_table(phase: str, profile: Profile) -> Table:
    table = new_table(
        f"Where the time goes: {phase}, {plural(profile.tokens, 'token')} after {profile.context:,} "
        f"(mean of {plural(profile.steps, 'step')})",
        "op", "runs as", "nodes", "ms", "share", "GB/s", "Gop/s", left=2,
    )  # fmt: skip
    rows, rest = profile.rows[:_SHOWN], profile.rows[_SHOWN:]
    for row in rows:
        rates = [None if n is None else n / row.milliseconds * 1e-6 for n in (row.bytes, row.operations)]
        table.add_row(
            escape(row.op), _KINDS.get(row.kind, "ONNX op"), str(row.nodes), number(row.milliseconds), share(row.share),
            *(number(rate) for rate in rates),
        )  # fmt: skip
    if rest:
        nodes, time = sum(row.nodes for row in rest), sum(row.milliseconds for row in rest)
        table.add_row(f"{len(rest)} others", "", str(nodes), number(time), share(time / profile.milliseconds), "", "")
    between = profile.between_milliseconds
    table.add_row("between nodes", "", "", number(between), share(between / profile.milliseconds), "", "")
    table.add_section()
    table.add_row("whole step, profiled", "", "", number(profile.milliseconds), "100 %", "", "", style="bold")
    return table
