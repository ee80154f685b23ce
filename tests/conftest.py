"""Set before anything heavy is imported: two test processes share two cores, and nothing may reach the network."""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest  # noqa: E402  after the environment is set


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Two figures that a reader of CI's output wants to see: the mutation kill rate, and what the galleries hold."""
    properties = [
        (report.outcome, name, value)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call"
        for name, value in report.user_properties
    ]
    if faults := [(outcome, *value) for outcome, name, value in properties if name == "mutation"]:
        killed = [(fault, margin) for outcome, fault, margin in faults if outcome == "passed"]
        terminalreporter.section("proofs")
        line = f"mutation kill rate: {len(killed)} of {len(faults)} faults ({100 * len(killed) / len(faults):.0f} %)"
        if killed:
            name, margin = min(killed, key=lambda item: item[1])
            line += f"; the narrowest, {name!r}, is off by {margin:,.0f} times the tolerance"
        terminalreporter.line(line)
    kinds = sorted({str(value[0]) for _, name, value in properties if name == "spelling"})
    for kind in kinds:
        own = [(outcome, value[1]) for outcome, name, value in properties if name == "spelling" and value[0] == kind]
        fused = sum(verdict == "fused" for _, verdict in own)
        failed = sum(outcome == "failed" for outcome, _ in own)
        terminalreporter.line(
            f"gallery of {kind}: {len(own)} spellings, {fused} fused, {len(own) - fused} refused with a reason, "
            f"{failed} against expectation"
        )
