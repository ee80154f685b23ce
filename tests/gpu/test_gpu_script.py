"""The script for a GPU, as far as it goes without one: its plumbing, its report, and its checks on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda.catalogue import representative_kernels
from tests.gpu import findings, parts, report, script
from tests.gpu.attention_checks import check_decode
from tests.gpu.device import OnCpu, described
from tests.gpu.expert_checks import check_top
from tests.gpu.findings import Check, ContextLostError, Fact, Finding, Launched, Notebook, OutOfTimeError, Skip, Timing
from tests.gpu.graph_checks import check_graph
from tests.kernels.cuda.rolling_cases import RollingCase
from tests.kernels.cuda.rolling_decode_cases import step
from tests.support.kernel_devices import Buffer, CpuDevice

ALONE = [part.name for part in parts.PARTS if part.section != parts.KERNELS]
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
FAST = Timing("speed", "copy", 12.5, 2900.0, "GB/s", 0.97, "the copy's bandwidth", 0.85)
SLOW = Timing("speed", "decode | 8", 100.0, 2000.0, "GB/s", 0.67, "the copy's bandwidth", 0.85)
FINDINGS: tuple[Finding, ...] = (
    Check("kernels", "decode", True, 0.5),
    Fact("device copy, GB/s", 3000.0),
    FAST,
    SLOW,
    Skip("plugins", "tensorrt", "it is not installed here", expected=True),
    Launched("a.cu a "),
)
FAILED = Check("kernels", "prefill", False, None, "AssertionError at x.py:3: 2 times what is allowed")
UNDONE = Skip("engine", "all of it", "no bundles were given")


def notebook(**options: Any) -> Notebook:
    return Notebook("kernels", seed=5, say=lambda line: None, **options)


# -- without a GPU --


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gpu", *arguments]
    return subprocess.run(command, cwd=script.ROOT, env=WITHOUT_GPU, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = run_script("--out", str(tmp_path / "results"), "--quick")
    assert done.returncode == report.NO_GPU
    assert done.stdout.startswith("There is no GPU here")
    assert len(done.stdout.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_it_needs_neither_pytest_nor_torch_nor_the_exporter_for_kernels() -> None:
    blocked = ("pytest", "torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "exporter", "reference")
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from tests.gpu import script, parts, plugin_checks, engine_checks, try_plan, bench\n"
        "sys.exit(script.main([]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=script.ROOT, env=WITHOUT_GPU, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (report.NO_GPU, "")


def test_a_part_without_a_gpu_is_a_check_that_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    part = next(part for part in parts.PARTS if part.name == "sampling")
    options = script.Options(tmp_path, True, (), None, 1)
    (found,) = script._spawned(part, 0, options, (9, 0), time.monotonic() + 60, ())
    assert isinstance(found, Check)
    assert not found.held
    assert "BackendError" in found.said


def test_arguments() -> None:
    given = script.parse(["--only", "speed", "--quick", "--seed", "7", "--bundle", "b"])
    assert (given.only, given.quick, given.seed, given.bundle) == (["speed"], True, 7, Path("b"))
    assert script.parse([]).out == script.RESULTS
    with pytest.raises(SystemExit):
        script.parse(["--only", "nothing"])


# -- processes --


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("pass", None),
        ("import sys; sys.exit(17)", script._LOST),
        ("import sys; sys.exit('no')", "the process ended with 1 no"),
        ("import os; os.abort()", "the process ended with -6"),
        ("import time; time.sleep(60)", "the process did not end in 1 s and was stopped"),
    ],
)
def test_how_a_process_ended(code: str, how: str | None) -> None:
    assert script._ended([sys.executable, "-S", "-c", code], 1 if "sleep" in code else 30) == how


def test_a_part_that_is_lost_goes_on_behind_the_check_that_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process loses the GPU at its second check, the next one dies at its third, the last one ends."""
    commands: list[list[str]] = []

    def ended(command: list[str], seconds: float) -> str | None:
        path = Path(command[command.index("--findings") + 1])
        passed = int(command[command.index("--passed") + 1])
        commands.append(command)
        book = notebook(path=path, passed=passed)
        book.check("first", lambda: 0.25)
        if not passed:
            with pytest.raises(ContextLostError):
                book.check("second", lambda: _raise("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was met"))
            return script._LOST
        book.check("second", lambda: 0.25)
        if passed == 2:
            book._begin("third")
            return "the process ended with -11"
        book.check("third", lambda: 0.25)
        book.check("fourth", lambda: 0.25)
        return None

    monkeypatch.setattr(script, "_ended", ended)
    part = parts.Part("some", "kernels", lambda task: None, 60, 60)
    found = script._spawned(part, 0, script.Options(tmp_path, False, (), None, 1), (9, 0), time.monotonic() + 60, ())
    assert [(item.name, item.held) for item in found if isinstance(item, Check)] == [
        *(("first", True), ("second", False), ("third", False), ("fourth", True))
    ]
    assert [command[command.index("--passed") + 1] for command in commands] == ["0", "2", "3"]


def _raise(text: str) -> None:
    raise BackendError(text)


def test_the_whole_script_with_processes_that_find_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, int]] = []

    def spawned(part: parts.Part, share: int, *more: Any) -> list[Finding]:
        ran.append((part.name, share))
        return [Check(part.section, f"{part.name} {share}", True, 0.5), *map(Launched, kernels)]

    kernels = [described(kernel) for kernel in representative_kernels((9, 0))]
    monkeypatch.setattr(script, "find_gpu", lambda: (9, 0))
    monkeypatch.setattr(script, "describe_machine", lambda capability: {"GPU": "some"})
    monkeypatch.setattr(script, "_spawned", spawned)
    assert script.main(["--out", str(tmp_path)]) == report.HELD
    assert sorted(ran) == sorted((part.name, share) for part in parts.PARTS for share in range(part.shares))
    assert [name for name, _ in ran[len(ran) - len(ALONE) :]] == ALONE, "one after the other, in this order"
    assert "checks hold" in capsys.readouterr().out
    assert "every kernel that builds ask for has run" in (tmp_path / "gpu.md").read_text()
    del kernels[5]
    assert script.main(["--out", str(tmp_path), "--only", "kernels"]) == report.FAILED


# -- findings and the report --


def test_findings_survive_their_file() -> None:
    text = "\n".join(findings.write_finding(finding) for finding in (*FINDINGS, FAILED))
    assert findings.read_findings(text + '\n{"kind": "Check", "sec') == [*FINDINGS, FAILED]
    assert findings.read_findings('{"kind": "Unknown"}\n[]\n') == []


def test_checks() -> None:
    book = notebook()
    assert book.check("in the budget", lambda: 1.0)
    assert book.check("without one", lambda: None)
    assert not book.check("over it", lambda: 1.01)
    assert not book.check("none", lambda: float("nan"))
    assert not book.check("raises", lambda: _raise("a sentence"))
    assert [check.held for check in book.findings if isinstance(check, Check)] == [True, True, False, False, False]
    last = book.findings[-1]
    assert isinstance(last, Check)
    assert "BackendError" in last.said
    assert "a sentence" in last.said


def test_time_that_is_over() -> None:
    book = notebook(seconds=-1)
    with pytest.raises(OutOfTimeError):
        book.check("late", lambda: None)
    (skip,) = book.findings
    assert isinstance(skip, Skip)
    assert not skip.expected


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (FINDINGS, report.HELD),
        ((*FINDINGS, FAILED), report.FAILED),
        ((*FINDINGS, UNDONE), report.PARTLY),
        ((*FINDINGS, FAILED, UNDONE), report.FAILED),
        ((), report.FAILED),
    ],
)
def test_exit_codes(found: tuple[Finding, ...], code: int) -> None:
    assert report.exit_code(found) == code


def test_the_report(tmp_path: Path) -> None:
    run = report.Run({"GPU": "H100", "date": "today"}, "kernels, speed", 7, 61.0, (*FINDINGS, FAILED, UNDONE))
    text = report.write_report(run, tmp_path / "new").read_text()
    for words in (
        *("GPU H100; date today", "Seed 7", "1 of 2 checks hold, 1 of 2 targets for speed are reached, 1 things"),
        *("| decode | yes | 0.50 |", "**kernels, prefill**: AssertionError at x.py:3", "| device copy, GB/s | 3000 |"),
        *("| speed: decode \\| 8 | 100.0 | 2000 GB/s | 0.67 of the copy's bandwidth | ≥ 0.85 | **no** |",),
        *("engine, all of it: no bundles were given", "kernels: 1 of 2 hold; the largest error is 0.50 of its budget"),
    ):
        assert words in text
    document = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert [timing["reached"] for timing in document["timings"]] == [True, False]
    assert len(document["checks"]) == 2
    assert document["facts"] == {"device copy, GB/s": 3000.0}


# -- checks --


def test_a_case_end_to_end() -> None:
    book = notebook()
    check_decode(OnCpu(book.launched), book, [("one", step(20, 23, (5, -1, 61)))])
    kernel, check = book.findings
    assert isinstance(check, Check)
    assert check.held
    assert check.worst is not None
    assert 0 < check.worst <= 1
    assert isinstance(kernel, Launched)
    assert kernel.kernel.startswith("rolling_decode.cu rolling_decode ACTIVATION=")


class _Wrong(OnCpu):
    """A device of which some memory is not what was written."""

    def download(self, buffer: Buffer) -> Any:
        array = super().download(buffer)
        if array.dtype == np.int32:
            array[..., -1] += 1
        return array


def test_what_is_wrong_is_seen() -> None:
    book = notebook()
    check_top(_Wrong(book.launched), book, large=False)
    checks = [finding for finding in book.findings if isinstance(finding, Check)]
    assert not any(check.held for check in checks if "NaN" not in check.name)
    assert all("AssertionError" in check.said for check in checks if not check.held)


def test_replays_are_held_against_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    case = RollingCase(20, 23, (18, 0), (1, 1), heads=4, head_dim=16)
    device = OnCpu(lambda kernel: None)
    check_graph(device, case, 4, seed=3)
    monkeypatch.setattr(OnCpu, "captured", lambda self, launches: launches(self.launcher) or (lambda: None))
    with pytest.raises(AssertionError, match="attended after step 1 is not what the launches"):
        check_graph(device, case, 4, seed=3)


def test_devices_are_written_between_their_guards() -> None:
    device = OnCpu(lambda kernel: None, CpuDevice())
    buffer = device.upload(np.arange(6, dtype=np.int64))
    device.write(buffer, np.arange(6, 12, dtype=np.int64))
    np.testing.assert_array_equal(device.download(buffer), np.arange(6, 12))


def test_kernels_that_did_not_run_are_named() -> None:
    known = representative_kernels((9, 0))
    ran = [described(kernel) for kernel in known]
    assert parts.missing_kernels((9, 0), ran) == []
    assert parts.missing_kernels((9, 0), ran[1:]) == ran[:1]
    undone = script._coverage((9, 0), [Launched(kernel) for kernel in ran[1:]])
    assert isinstance(undone, Check)
    assert not undone.held
    assert undone.said == ran[0]
