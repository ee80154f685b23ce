"""A machine without a GPU: `load` says what is missing in one paragraph, and nothing runs on the CPU instead.

The real onnxruntime-gpu is asked, in a process of its own (tests/support/onnxruntime_gpu.py).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import BackendError, load
from runtime.backends import BACKENDS
from runtime.bundle import read_bundle
from runtime.onnxruntime_cuda.provider import PROVIDER
from runtime.onnxruntime_cuda.sessions import StepSession
from tests.support.cuda_stand_in import stand_in_libraries
from tests.support.host_place import host_place
from tests.support.onnxruntime_gpu import gpu_wheel, provider_library, run_python
from tests.support.toy_bundle import ToyModel, write_toy_bundle
from tests.support.toy_steps import write_step_engine

MODEL = ToyModel()

LOAD = """
from runtime import CierzoError, load
try:
    load(job, backend="onnxruntime-cuda")
    answer = "loaded"
except CierzoError as error:
    answer = [type(error).__name__, error.exit_code, str(error)]
"""

COMMAND = """
import runpy, sys
sys.argv = ["cierzo", "generate", job, "--backend", "onnxruntime-cuda", "--ids", "1 2"]
try:
    runpy.run_module("exporter", run_name="__main__")
except SystemExit as end:
    answer = end.code
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_toy_bundle(tmp_path_factory.mktemp("toy"), MODEL)
    write_step_engine(folder, MODEL)
    return folder


MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "libraries": (
        {"stand_in": False},
        r"cannot load its CUDA provider \(lib\w+\.so\.\d+: cannot open .*`pip install 'onnxruntime-gpu\[cuda\]' ",
    ),
    "device": ({"compute_capability": None}, r"no GPU that CUDA can use \(no CUDA-capable device is detected\)"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_said_and_nothing_else(folder: Path, what: str) -> None:
    machine, words = MISSING[what]
    ran = run_python(LOAD, str(folder), **machine)
    kind, code, said = ran.answer
    assert (kind, code) == ("BackendError", 2)
    assert re.search(words, said)
    assert "\n" not in said
    assert "backend='onnxruntime', which runs on the CPU" in said
    assert ran.output == "", "ONNX Runtime's log and what it prints are no part of it"


@pytest.mark.parametrize("package", ["cu13", "cublas"])
def test_libraries_are_found_in_any_folder_of_python_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """ONNX Runtime's own search ends beside its own folder, which here is another one."""
    system, packages = tmp_path / "system", tmp_path / "packages"
    installed = packages / "nvidia" / package / "lib"
    for folder in (system, installed):
        folder.mkdir(parents=True)
    for library in stand_in_libraries(provider_library(gpu_wheel())).iterdir():
        folder = system if library.name.startswith("libcuda") else installed  # the driver, and what all are linked to
        (folder / library.name).symlink_to(library)
    source = """
import sys
from runtime.onnxruntime_cuda.provider import open_cuda
sys.path.append(job)
answer = open_cuda().name
"""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(system))
    ran = run_python(source, str(packages), stand_in=False)
    assert ran.answer == "an NVIDIA GPU of compute capability 9.0"


def test_the_command_says_the_same_without_a_traceback(folder: Path) -> None:
    ran = run_python(COMMAND, str(folder), stand_in=False)
    assert ran.answer == 2
    assert "cannot load its CUDA provider" in " ".join(ran.output.split())
    for word in ("Traceback", "onnxruntime_src", "[E:", "EP Error"):
        assert word not in ran.output


def test_the_build_for_the_cpu_is_told_apart(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"is the build for the CPU.*pip uninstall -y onnxruntime && pip install"):
        load(folder, backend="onnxruntime-cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_fell_back_to_the_cpu_is_refused(folder: Path) -> None:
    """As ONNX Runtime makes one where it knows no such provider, or has one that fails."""
    place = replace(host_place(), provider=PROVIDER)
    with pytest.raises(BackendError, match=r"with CPUExecutionProvider and not with CUDAExec"):
        StepSession(folder / "engines" / "toy" / "decode.onnx", place)


def test_a_gpu_that_is_too_old(folder: Path) -> None:
    source = """
import runtime.onnxruntime_cuda.provider as provider
from runtime import CierzoError
provider.LEAST_COMPUTE_CAPABILITY = (9, 1)
try:
    provider.open_cuda()
except CierzoError as error:
    answer = str(error)
"""
    assert "has the compute capability 9.0" in run_python(source).answer


@pytest.mark.parametrize("options", [{"threads": 1}, {"profile": "somewhere"}], ids=str)
def test_options_that_mean_nothing_to_it_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=r"no use for `threads`|no profile of nodes"):
        load(folder, backend="onnxruntime-cuda", **options)


def test_its_device_is_the_gpu(folder: Path) -> None:
    assert "onnxruntime-cuda" in BACKENDS
    with pytest.raises(BackendError, match=r"no device 'cpu'. Available: cuda"):
        load(folder, backend="onnxruntime-cuda", device="cpu")
    assert read_bundle(folder).manifest.engines.keys() == {"toy"}
