"""What the report says of the machine, and whether it has a GPU."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.errors import BackendError
from runtime.kernels.cuda.device_launcher import checked, load_driver
from runtime.tensorrt.flavor import FLAVORS

_DISTRIBUTIONS = (
    *("numpy", "ml-dtypes", "torch", "cupy-cuda13x", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "onnx"),
    *("onnxruntime", "onnxruntime-gpu", "transformers", "polygraphy"),
)


def find_gpu() -> tuple[int, int]:
    """The compute capability of the first GPU. Raises BackendError, one sentence or two, where there is none."""
    driver = load_driver()
    checked(driver, "start", driver.cuInit(0))
    if not checked(driver, "count GPUs", driver.cuDeviceGetCount()):
        raise BackendError("The driver counts no GPU.")
    device = checked(driver, "be opened", driver.cuDeviceGet(0))
    names = (f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}" for part in ("MAJOR", "MINOR"))
    major, minor = (
        int(checked(driver, "tell its version", driver.cuDeviceGetAttribute(_attribute(driver, name), device)))
        for name in names
    )
    return major, minor


def _attribute(driver: Any, name: str) -> Any:
    return getattr(driver.CUdevice_attribute, name)


def describe_machine(compute_capability: tuple[int, int]) -> dict[str, Any]:
    """GPU, driver, versions of packages and the date."""
    described = {
        "GPU": _from_driver_tool("name") or "unknown",
        "compute capability": ".".join(map(str, compute_capability)),
        "driver": _from_driver_tool("driver_version") or "unknown",
        "memory": _from_driver_tool("memory.total") or "unknown",
        "CUDA of the driver": _cuda_version(),
        "NVRTC": _nvrtc_version(),
        "Python": platform.python_version(),
    }
    libraries = {str(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    named = (*_DISTRIBUTIONS, *sorted(name for name in libraries if name.startswith(FLAVORS[0])))
    described |= {name: version for name in named if (version := _version(name)) is not None}
    return {**described, "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}


def library_folders(path: Iterable[str]) -> list[str]:
    """Folders of NVIDIA's Python packages with libraries, under the entries of a Python path.

    onnxruntime-gpu looks for them beside itself only, and here it lies in a folder of its own, away from torch's.
    """
    found = (folder for entry in path for folder in sorted((Path(entry) / "nvidia").glob("*/lib")))
    return list(dict.fromkeys(str(folder) for folder in found if folder.is_dir()))


def processes_at_once() -> bool:
    """Whether several processes may use the GPU, as far as the driver's tool says."""
    return _from_driver_tool("compute_mode") in (None, "Default")


def _from_driver_tool(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cuda_version() -> str:
    driver = load_driver()
    version = int(checked(driver, "tell its version", driver.cuDriverGetVersion()))
    return f"{version // 1000}.{version % 1000 // 10}"


def _nvrtc_version() -> str:
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):
        return "not installed"
    return f"{major}.{minor}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
