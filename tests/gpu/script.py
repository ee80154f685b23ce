"""One script, one call, no network: what can only be shown on a machine with an NVIDIA GPU.

    python -m tests.gpu [--out FOLDER] [--quick] [--only SECTION ...] [--bundle FOLDER] [--seed N]

Sections: kernels, speed, plugins, engine, onnxruntime. Needs Python 3.11, numpy, ml_dtypes, cuda-core, cuda-bindings
and NVRTC; torch for speed; a TensorRT library for plugins and engines, onnxruntime-gpu for onnxruntime (wheels.py
brings packages to where there is no network), and for the last two bundles that `python -m tests.gpu.prepare FOLDER`
made elsewhere. What is not there is said, and left out.

Exit codes: 0 all held, 1 something did not, 2 there is no GPU, 3 nothing failed but part of what was asked for could
not be done. A target for speed that was missed is in the report and changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from runtime.errors import BackendError
from tests.gpu.findings import (
    Check,
    ContextLostError,
    Fact,
    Finding,
    Launched,
    Notebook,
    OutOfTimeError,
    Skip,
    now_path,
    read_findings,
    spoken,
    told,
    write_finding,
)
from tests.gpu.machine import describe_machine, find_gpu, library_folders, processes_at_once
from tests.gpu.ort_weights import work_folder
from tests.gpu.parts import KERNELS, PARTS, SECTIONS, Part, Task, missing_kernels
from tests.gpu.report import NO_GPU, Run, exit_code, report_name, verdict, write_report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
WHOLE_SECONDS, QUICK_SECONDS = 515, 115
SHARES = {"kernels": 0.25, "speed": 0.15, "plugins": 0.05, "engine": 0.1, "onnxruntime": 0.45}
"""Of the whole time: a section may last until those of the sections up to it, among the ones asked for, are over."""
_GRACE = 25
"""Seconds that a part may go on after its time, to finish what it is at."""


@dataclass(frozen=True, slots=True)
class Options:
    out: Path
    quick: bool
    only: tuple[str, ...]
    bundle: Path | None
    seed: int
    work: Path | None = None
    rehearsal: bool = False

    @property
    def sections(self) -> tuple[str, ...]:
        return tuple(section for section in SECTIONS if not self.only or section in self.only)

    def until(self, section: str) -> float:
        """The share of the whole time after which the section is over."""
        shares = [SHARES[each] for each in self.sections]
        return sum(shares[: self.sections.index(section) + 1]) / sum(shares)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; options of the script's own processes are not shown."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the report goes, as .md and .json")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions; under two minutes")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=[], help="these sections alone")
    parser.add_argument("--bundle", type=Path, help="a folder that `python -m tests.gpu.prepare` made")
    parser.add_argument("--seed", type=int, help="of all random numbers; by default the time")
    for name in ("--part", "--findings", "--capability"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--passed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rehearsal", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the script; returns its exit code."""
    given = parse(arguments)
    seed = int(time.time()) if given.seed is None else given.seed
    options = Options(given.out, given.quick, tuple(given.only), given.bundle, seed, given.work, given.rehearsal)
    if given.part is not None:
        return _child(options, given)
    if options.rehearsal:
        return _run(options, (9, 0))
    try:
        capability = find_gpu()
    except BackendError as error:
        print(f"There is no GPU here that these checks could run on: {error}")
        return NO_GPU
    return _run(options, capability)


def _run(options: Options, capability: tuple[int, int]) -> int:
    work = work_folder()
    try:
        return _sections(replace(options, work=work), capability)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sections(options: Options, capability: tuple[int, int]) -> int:
    begun = time.monotonic()
    machine = {"rehearsal": "without a GPU"} if options.rehearsal else describe_machine(capability)
    asked = ", ".join(options.sections) + (", quickly" if options.quick else "")
    print("; ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"seed {options.seed}: {asked}", flush=True)
    findings: list[Finding] = []
    seconds = QUICK_SECONDS if options.quick else WHOLE_SECONDS

    def report() -> Run:
        run = Run(
            machine, asked, options.seed, time.monotonic() - begun, tuple(findings), report_name(options.sections)
        )
        write_report(run, options.out)
        return run

    for section in options.sections:
        parts = [part for part in PARTS if part.section == section]
        end = begun + seconds * options.until(section)
        if section == KERNELS:
            findings += _together(parts, options, capability, end)
            findings.append(_coverage(capability, findings))
        else:
            for part in parts:
                findings += _spawned(part, 0, options, capability, end, findings)
        report()  # what is known so far outlives whatever ends this process
    run = report()
    print(_last_words(run))
    print(f"{options.out / run.name}.md has it all.")
    return exit_code(findings)


def _last_words(run: Run) -> str:
    """What a person wants to see at the end: speeds, what does not hold, what was not done, the verdict."""
    told = [finding for finding in run.findings if not isinstance(finding, (Check, Launched))]
    failed = [finding for finding in run.findings if isinstance(finding, Check) and not finding.held]
    lines = [*(spoken(finding) for finding in (*told, *failed)), f"{run.seconds:.0f} s. {verdict(run)}"]
    return "\n".join(line for line in lines if line)


def _together(parts: Sequence[Part], options: Options, capability: tuple[int, int], end: float) -> list[Finding]:
    """All shares of all parts, as many at once as there are processors for: the GPU waits for float64 on the CPU."""
    jobs = [
        (part, share) for share in range(max(part.shares for part in parts)) for part in parts if share < part.shares
    ]
    workers = max(1, min(len(jobs), len(os.sched_getaffinity(0)) - 1)) if processes_at_once() else 1
    with ThreadPoolExecutor(workers) as pool:
        spawned = [pool.submit(_spawned, part, share, options, capability, end, ()) for part, share in jobs]
        return [finding for job in spawned for finding in job.result()]


def _coverage(capability: tuple[int, int], findings: Sequence[Finding]) -> Finding:
    launched = [finding.kernel for finding in findings if isinstance(finding, Launched)]
    try:
        missing = missing_kernels(capability, launched)
    except Exception as error:
        return Skip(KERNELS, "whether every kernel ran", told(error))
    if missing and any(isinstance(finding, Skip) and finding.section == KERNELS for finding in findings):
        return Skip(KERNELS, f"{len(missing)} kernels that builds ask for", "; ".join(missing))
    said = "; ".join(missing)
    check = Check(
        KERNELS, f"every kernel that builds ask for has run ({len(set(launched))} in all)", not missing, None, said
    )
    print(spoken(check), flush=True)
    return check


def _spawned(
    part: Part, share: int, options: Options, capability: tuple[int, int], end: float, known: Sequence[Finding]
) -> list[Finding]:
    """What one share of a part finds, in a process of its own, which ends when its time is over.

    A check that ends its process, or the process's use of the GPU, has failed; the next process goes on behind it.
    """
    begun, passed, found = time.monotonic(), 0, list[Finding]()
    end = min(end, begun + (part.quick_seconds if options.quick else part.seconds))
    for _ in range(_MOST_PROCESSES):
        seconds = end - time.monotonic()
        if seconds <= 1:
            return [*found, Skip(part.section, part.name, "the time for the whole script was over")]
        with tempfile.TemporaryDirectory(prefix="gpu-checks-") as folder:
            path = Path(folder) / "findings.jsonl"
            facts = [write_finding(finding) + "\n" for finding in known if isinstance(finding, Fact)]
            path.write_text("".join(facts), encoding="utf-8")
            command = [sys.executable, "-m", "tests.gpu", "--part", f"{part.name}:{share}", "--findings", str(path)]
            command += ["--seconds", f"{seconds:.1f}", "--seed", str(options.seed), "--passed", str(passed)]
            command += ["--capability", ".".join(map(str, capability)), *(["--quick"] if options.quick else [])]
            command += [] if options.bundle is None else ["--bundle", str(options.bundle.resolve())]
            command += [] if options.work is None else ["--work", str(options.work)]
            command += ["--rehearsal"] if options.rehearsal else []
            how = _ended(command, seconds + _GRACE)
            found += read_findings(path.read_text(encoding="utf-8"))[len(facts) :]
            number, name = _reached(path)
        if how is None:
            return found
        if how != _LOST:
            found.append(Check(part.section, name or f"the part {part.name}", False, None, how))
            print(spoken(found[-1]), flush=True)
        if number <= passed:  # it did not come as far as any check, and would not another time
            return found
        passed = number
    return [*found, Skip(part.section, f"{part.name} after its check {passed}", "too many processes of it were lost")]


_MOST_PROCESSES, _LOST_CODE, _LOST = 6, 17, "its process lost the GPU"


def _ended(command: Sequence[str], seconds: float) -> str | None:
    """None if the process ended well, _LOST if it says that it cannot go on, else how it ended, and its last words."""
    with tempfile.TemporaryFile() as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=_environment(), timeout=seconds, stderr=log, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        size = log.seek(0, 2)
        log.seek(max(0, size - 1200))
        words = " ".join(log.read().decode(errors="replace").split())
    if code == 0:
        return None
    if code == _LOST_CODE:
        return _LOST
    how = f"did not end in {seconds:.0f} s and was stopped" if code is None else f"ended with {code}"
    return f"the process {how} {words}".strip()


def _reached(path: Path) -> tuple[int, str]:
    """Number and name of the check that a process was at; 0 if it came to none."""
    try:
        number, name = json.loads(now_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0, ""
    return int(number), str(name)


def _environment() -> dict[str, str]:
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    # Compiled kernels: in a folder that can be written to, wherever this runs.
    kept = {"CIERZO_CACHE": str(Path(tempfile.gettempdir()) / f"cierzo-gpu-checks-{os.getuid()}")}
    libraries = [*filter(None, [os.environ.get("LD_LIBRARY_PATH")]), *library_folders(sys.path)]
    found = {"LD_LIBRARY_PATH": os.pathsep.join(libraries)} if libraries else {}
    return {**kept, **os.environ, **threads, **found, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _child(options: Options, given: argparse.Namespace) -> int:
    """A part in this process: 0 unless it ended by something that no check could keep."""
    name, _, share = given.part.partition(":")
    part = next(part for part in PARTS if part.name == name)
    path = Path(given.findings)
    known = [finding for finding in read_findings(path.read_text(encoding="utf-8")) if isinstance(finding, Fact)]
    major, minor = map(int, given.capability.split("."))
    book = Notebook(
        part.section,
        seed=options.seed,
        path=path,
        seconds=given.seconds,
        say=partial(print, flush=True),
        known=known,
        passed=given.passed,
    )
    capability = (major, minor)
    shares, bundles = (int(share), part.shares), options.bundle
    task = Task(book, options.quick, capability, *shares, bundles, options.work, options.rehearsal)
    try:
        part.run(task)
    except OutOfTimeError:
        return 0
    except ContextLostError:
        return _LOST_CODE
    except ImportError as error:
        book.skip(part.name, f"a package is missing here: {told(error)}")
    except BackendError as error:
        book.add(Check(part.section, part.name, False, None, told(error)))
    return 0
