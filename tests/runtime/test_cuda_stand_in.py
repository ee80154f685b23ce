"""The stand-in for a GPU is as strict as one, and says which device it is; see tests/support/cuda_stand_in."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.cuda_cpu import compiler
from tests.support.cuda_stand_in import CAPABILITIES, StandInError, stand_in_libraries
from tests.support.onnxruntime_gpu import Ran, gpu_wheel, provider_library, run_python

PRELUDE = """
import ctypes
cuda = ctypes.CDLL("libcudart.so.13")
cuda.cudaGetErrorString.restype = ctypes.c_char_p
SIZE = ctypes.c_size_t

def made(call, *arguments):
    handle = ctypes.c_void_p()
    assert getattr(cuda, call)(ctypes.byref(handle), *arguments) == 0
    return handle

stream = made("cudaStreamCreateWithFlags", 1)
device = made("cudaMalloc", SIZE(64))
pinned = made("cudaMallocHost", SIZE(64))
pageable = ctypes.create_string_buffer(64)
answer = []
"""
REFUSED, SPOILT = 900, 901


def drive(source: str, capability: str = "9.0") -> Ran:
    return run_python(PRELUDE + source, compute_capability=capability)


@pytest.mark.parametrize(
    ("call", "written"),
    [
        ("cuda.cudaStreamSynchronize(stream)", "cudaStreamSynchronize during capture"),
        ("cuda.cudaDeviceSynchronize()", "cudaDeviceSynchronize during capture"),
        ("cuda.cudaMalloc(ctypes.byref(ctypes.c_void_p()), SIZE(64))", "cudaMalloc during capture"),
        ("cuda.cudaFree(device)", "cudaFree during capture"),
        ("cuda.cudaMemcpy(device, pinned, SIZE(64), 1)", "cudaMemcpy during capture"),
        (
            "cuda.cudaMemcpyAsync(device, pageable, SIZE(64), 1, stream)",
            "cudaMemcpyAsync of pageable memory during capture",
        ),
    ],
)
def test_what_a_gpu_refuses_during_a_capture_spoils_it(call: str, written: str) -> None:
    ran = drive(f"""
assert cuda.cudaStreamBeginCapture(stream, 0) == 0
answer.append({call})
answer.append(cuda.cudaStreamEndCapture(stream, ctypes.byref(ctypes.c_void_p())))
answer.append({call})
""")
    assert ran.answer == [REFUSED, SPOILT, 0]
    assert next(event.what for event in ran.events if event.kind == "violation") == written


def test_captured_copies_are_made_by_each_launch_and_not_before() -> None:
    ran = drive("""
back = ctypes.create_string_buffer(64)
def seen():
    assert cuda.cudaMemcpy(back, device, SIZE(64), 2) == 0
    return back.raw[:1].decode()
assert cuda.cudaMemset(device, ord("-"), SIZE(64)) == 0
ctypes.memset(pinned, ord("a"), 64)
assert cuda.cudaStreamBeginCapture(stream, 0) == 0
assert cuda.cudaMemcpyAsync(device, pinned, SIZE(64), 1, stream) == 0
graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
assert cuda.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
assert cuda.cudaGraphInstantiate(ctypes.byref(ready), graph, ctypes.c_ulonglong(0)) == 0
answer.append(seen())
for letter in "bc":
    ctypes.memset(pinned, ord(letter), 64)
    assert cuda.cudaGraphLaunch(ready, stream) == 0
    answer.append(seen())
""")
    assert ran.answer == ["-", "b", "c"]


def test_device_memory_is_out_of_the_hosts_reach() -> None:
    with pytest.raises(AssertionError, match=r"ended with -11"):
        drive("ctypes.string_at(device, 1)")


@pytest.mark.parametrize(
    ("call", "written"),
    [
        ("cuda.cudaMemcpy(device, pageable, SIZE(1 << 20), 1)", "a copy beyond the end of an allocation"),
        ("cuda.cudaMemcpy(device, pageable, SIZE(64), 2)", "a copy between other memories than it says"),
        ("cuda.cudaMemset(pinned, 0, SIZE(64))", "a fill of no device memory"),
        ("cuda.cudaFree(pageable)", "freeing what was not allocated"),
    ],
)
def test_misuse_of_memory_is_refused(call: str, written: str) -> None:
    ran = drive(f"answer = [{call}, cuda.cudaPeekAtLastError(), cuda.cudaGetLastError(), cuda.cudaGetLastError()]")
    assert ran.answer == [1, 1, 1, 0]
    assert [event.what for event in ran.events if event.kind == "violation"] == [written]


def test_memory_runs_out() -> None:
    ran = drive("""
free, total = SIZE(), SIZE()
cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
block = ctypes.c_void_p()
answer = [total.value >> 30, total.value - free.value, cuda.cudaMalloc(ctypes.byref(block), free)]
answer.append(cuda.cudaMalloc(ctypes.byref(ctypes.c_void_p()), SIZE(1)))
answer.append(cuda.cudaGetErrorString(answer[-1]).decode())
answer.append(cuda.cudaFree(block))
""")
    assert ran.answer == [80, 4096, 0, 2, "out of memory", 0]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_device_is_described_as_nvidias_bindings_read_it(capability: str) -> None:
    ran = drive(
        """
from cuda.bindings import runtime
found = runtime.cudaDeviceProp()
assert cuda.cudaGetDeviceProperties(ctypes.c_void_p(found.getPtr()), 0) == 0
names = "warpSize maxThreadsPerBlock multiProcessorCount l2CacheSize maxThreadsPerMultiProcessor memoryBusWidth"
names += " sharedMemPerBlock sharedMemPerMultiprocessor sharedMemPerBlockOptin regsPerMultiprocessor unifiedAddressing"
answer = {name: getattr(found, name) for name in names.split()}
answer["capability"] = f"{found.major}.{found.minor}"
answer["dims"] = [list(found.maxThreadsDim), list(found.maxGridSize)]
attributes = runtime.cudaDeviceAttr
value = ctypes.c_int()
for name in ("MultiProcessorCount", "MaxSharedMemoryPerBlockOptin", "MaxThreadsPerMultiProcessor", "L2CacheSize"):
    number = int(getattr(attributes, f"cudaDevAttr{name}"))
    assert cuda.cudaDeviceGetAttribute(ctypes.byref(value), number, 0) == 0
    answer[name] = value.value
""",
        capability,
    )
    said: dict[str, Any] = ran.answer
    assert said["capability"] == capability
    assert (said["warpSize"], said["maxThreadsPerBlock"], said["unifiedAddressing"]) == (32, 1024, 1)
    assert said["dims"] == [[1024, 1024, 64], [2**31 - 1, 65535, 65535]]
    assert said["sharedMemPerBlock"] == 48 << 10
    assert said["regsPerMultiprocessor"] == 65536
    assert said["sharedMemPerMultiprocessor"] == said["sharedMemPerBlockOptin"] + 1024
    assert said["MultiProcessorCount"] == said["multiProcessorCount"] >= 58
    assert said["MaxSharedMemoryPerBlockOptin"] == said["sharedMemPerBlockOptin"]
    assert said["MaxThreadsPerMultiProcessor"] == said["maxThreadsPerMultiProcessor"]
    assert said["L2CacheSize"] == said["l2CacheSize"]
    assert said["memoryBusWidth"] in (192, 384, 512, 5120)


def test_a_call_that_the_stand_in_lacks_ends_the_process_with_its_name(tmp_path: Path) -> None:
    """A provider of a later version loads, and says what it wants as soon as that is called."""
    program = tmp_path / "later.c"
    program.write_text("int cudaOfTomorrow(void); int main(void) { return cudaOfTomorrow(); }", encoding="utf-8")
    today = stand_in_libraries(provider_library(gpu_wheel()))
    stub = tmp_path / "stub.c"
    stub.write_text("int cudaOfTomorrow(void) { return 0; }", encoding="utf-8")
    linking = tmp_path / "libcudart.so.13"
    build = compiler().split()
    subprocess.run(
        [*build, "-x", "c", "-shared", "-fPIC", str(stub), "-Wl,-soname,libcudart.so.13", "-o", str(linking)],
        check=True,
    )
    later = tmp_path / "later"
    subprocess.run([*build, "-x", "c", str(program), "-x", "none", str(linking), "-o", str(later)], check=True)
    built = stand_in_libraries(later)
    assert built != today
    done = subprocess.run(
        [str(later)], env={"LD_LIBRARY_PATH": str(built)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == -6
    assert "does not know cudaOfTomorrow" in done.stderr


def test_a_library_that_the_stand_in_lacks_is_named(tmp_path: Path) -> None:
    stub = tmp_path / "stub.c"
    stub.write_text("int cudnnThing(void) { return 0; }", encoding="utf-8")
    linking, later = tmp_path / "libcudnn.so.9", tmp_path / "later.so"
    build = [*compiler().split(), "-x", "c", "-shared", "-fPIC", str(stub)]
    subprocess.run([*build, "-Wl,-soname,libcudnn.so.9", "-o", str(linking)], check=True)
    needed = ["-x", "none", "-Wl,--no-as-needed", str(linking)]
    subprocess.run([*build, *needed, "-o", str(later)], check=True)
    with pytest.raises(StandInError, match=re.escape("['libcudnn']")):
        stand_in_libraries(later)
