"""The same random model through Cierzo and through its peers, side by side in one run.

    python -m benchmarks.peers --quick                  # small models: does everything work?
    python -m benchmarks.peers --only cierzo llama      # some engines
    python -m benchmarks.peers --stop-after convert     # environments and files, so that the next run only measures

At first use every peer is installed into an environment of its own below `--workdir` (llama.cpp is compiled, which
takes minutes) and the checkpoints are made and converted; a later run finds all of that there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checkpoints import Shape
from benchmarks.peers import models, tables
from benchmarks.peers.contestants import CHECKED, MEASURED, OURS, Contestant
from benchmarks.peers.conversion import Conversion, convert
from benchmarks.peers.environments import ENVIRONMENTS, HERE, Environments
from benchmarks.peers.figures import Samples
from benchmarks.peers.models import Model
from benchmarks.peers.rounds import Field, Plan
from benchmarks.peers.window import KEPT, TEXTS, WINDOWS, check
from benchmarks.peers.workers.protocol import SPARE
from benchmarks.report import RESULTS, Report
from runtime.backends.cores import physical_cores

_STAGES = ("install", "convert", "measure")


class Benchmark:
    """The stages of one run, with the folder that keeps what they make."""

    def __init__(self, workdir: Path, only: Sequence[str], *, reuse: bool) -> None:
        self._reuse = reuse
        self.workdir = workdir.resolve()
        self.environments = Environments(self.workdir)
        self.measured = [one for one in MEASURED if _wanted(one, only)]
        self.checked = [one for one in CHECKED if one is CHECKED[0] or _wanted(one, only)]

    def install(self) -> None:
        """All environments of the contestants."""
        for contestant in (*self.measured, *self.checked):
            self.environments.install(contestant.environment)
            self.environments.install(contestant.converter)

    def convert(self, name: str, shape: Shape, contestants: Sequence[Contestant]) -> dict[str, Conversion]:
        """The checkpoint of one model in every contestant's format, by the contestant's name."""
        checkpoint = models.checkpoint(self.workdir / "checkpoints", name, shape)
        folder = self.workdir / "converted" / name
        done: dict[str, Conversion] = {}
        for contestant in contestants:
            if contestant.slug not in done:
                target = folder / contestant.slug
                anew = contestant.ours and not self._reuse  # Cierzo's sources may have changed since
                done[contestant.slug] = convert(self.environments, contestant, checkpoint, target, anew=anew)
        return {contestant.name: done[contestant.slug] for contestant in contestants}

    def measure(self, model: Model, plan: Plan, report: Report) -> None:
        """One model's tables and sentences into the report."""
        made = self.convert(model.name, model.shape, self.measured)
        able = [one for one in self.measured if made[one.name].error is None]
        field = Field(self.environments, model, plan, self.workdir / "logs")
        field.run(able, {one.name: made[one.name].path for one in able})
        samples = {one.name: field.samples.get(one.name, Samples()) for one in self.measured}
        report.tables[f"{model.title}: tokens a second"] = tables.speed(model, self.measured, samples)
        if OURS in samples and samples[OURS].rates:
            report.tables[f"{model.title}: {OURS} over each"] = tables.ratios(model, self.measured, samples)
            report.summary += tables.sentences(model, self.measured, samples)
        report.tables[f"{model.title}: memory, loading, conversion"] = tables.memory(
            model, self.measured, samples, made
        )
        report.tables[f"{model.title}: slowest and fastest sample"] = tables.samples_of(model, self.measured, samples)
        failed = tables.failures(self.measured, samples, made, self.workdir)
        if failed:
            report.tables[f"{model.title}: what did not work"] = failed
        if not model.shape.experts:  # of a mixture only the chosen experts are read
            report.say(tables.bandwidth_shares(model, self.measured, samples, statistics.median(field.bandwidths)))

    def check_windows(self, report: Report) -> None:
        """The table of the window check into the report."""
        made = self.convert("window-check", models.WINDOW_CHECK, self.checked)
        able = [one for one in self.checked if made[one.name].error is None]
        verdicts = check(
            self.environments, able, {one.name: made[one.name].path for one in able}, self.workdir / "logs"
        )
        report.tables["Is the sliding window kept?"] = tables.windows(self.checked, verdicts, made, self.workdir)

    def versions(self) -> dict[str, str]:
        """Of everything that ran, the peers' as `environment: distribution`."""
        used = {name for one in (*self.measured, *self.checked) for name in (one.environment, one.converter)}
        return {
            distribution if name == HERE else f"{name}: {distribution}": version
            for name in ENVIRONMENTS
            if name in used
            for distribution, version in self.environments.versions(name).items()
        }


def _wanted(contestant: Contestant, only: Sequence[str]) -> bool:
    return not only or any(part.lower() in contestant.name.lower() for part in only)


def _method(plan: Plan, quick: bool) -> str:
    windows = f"{TEXTS} texts of {WINDOWS} windows"
    return (
        f"Random weights, one text, {plan.threads} threads, {plan.rounds} rounds in which every engine has its turn; "
        "figures are medians over the rounds. Each engine is a process of its own that is stopped between its turns. "
        f"decode @c: {plan.steps} single tokens after a text of c tokens; prefill n: reading n tokens up to the last "
        "one's logits. All but OpenVINO GenAI are fed given tokens without sampling; OpenVINO GenAI generates greedily "
        "and is timed by its own clock. Options are the engines' own defaults but for threads and what the name says. "
        "The longest text is read in every round by some, by others in the first only, and then mostly kept open for "
        "the decode of later rounds (the table of samples has the counts). Converting is timed once, with imports; its "
        "peak is that of the largest process. RSS includes mapped files. KV is what the engine tells of its buffers. "
        f"Window: a small checkpoint whose config.json says `sliding_window` only, {windows}; the differences are of "
        "logits, relative to the largest (OpenVINO GenAI: of the next token's log-probability), from transformers in "
        f"float32, and up to {KEPT:g} counts as the same."
        + (" A trial with small models: the speeds mean nothing." if quick else "")
    )  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    home = Path(tempfile.gettempdir()) / "cierzo-peers"
    add(
        "--workdir",
        type=Path,
        default=home,
        help="environments, checkpoints, converted files: 20 GB (default: %(default)s)",
    )
    add("--quick", action="store_true", help="small models")
    add("--only", nargs="+", default=[], metavar="PART", help="engines whose names contain one of these")
    add("--models", nargs="+", default=[], metavar="PART", help="models whose names contain one of these")
    add("--rounds", type=int, default=3, help="turns of every engine (default: %(default)s)")
    add("--steps", type=int, default=48, help="tokens of one decode sample (default: %(default)s)")
    add("--threads", type=int, default=physical_cores(), help="of every engine (default: %(default)s)")
    add(
        "--far",
        nargs="*",
        default=[OURS],
        metavar="NAME",
        help="engines that read 32 windows too (default: %(default)s)",
    )
    add("--reuse", action="store_true", help="take Cierzo's bundles of the last run as well")
    add("--no-window", action="store_true", help="leave out the window check")
    add(
        "--results",
        type=Path,
        help="folder of the JSON and the Markdown (default: results/; with --quick below workdir)",
    )
    add("--stop-after", choices=_STAGES, default=_STAGES[-1], help="the last stage to run (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds * options.steps > SPARE:
        parser.error(f"rounds × steps may be {SPARE} at most: that is the room after a text")
    chosen = [
        model
        for model in (models.QUICK if options.quick else models.FULL)
        if not options.models or any(part in model.name for part in options.models)
    ]
    benchmark = Benchmark(options.workdir, options.only, reuse=options.reuse)
    benchmark.install()
    if options.stop_after == "install":
        return
    if options.stop_after == "convert":
        for model in chosen:
            benchmark.convert(model.name, model.shape, benchmark.measured)
        benchmark.convert("window-check", models.WINDOW_CHECK, benchmark.checked)
        return
    plan = Plan(options.rounds, options.steps, options.threads, tuple(options.far))
    report = Report("peers", "The same model through Cierzo and its peers", _method(plan, options.quick))
    report.machine["versions"] |= benchmark.versions()
    if not options.no_window:
        benchmark.check_windows(report)
    folder = options.results or (benchmark.workdir / "results" if options.quick else RESULTS)
    for model in chosen:
        benchmark.measure(model, plan, report)
        report.finish(folder)  # after every model, so that an interrupted run leaves what it has


if __name__ == "__main__":
    main()
