"""Engines of tiny bundles, each built once per process, and what their lists of kernels say."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from exporter.build import build as building
from exporter.build import plan_engine
from exporter.build.kernels import HOST, PLUGIN, PRODUCT, KernelCall
from runtime.bundle import Bundle, read_bundle
from runtime.engine_info import EngineInfo
from runtime.kernels.cuda.launch import Kernel
from tests.support.bundles import exported
from tests.support.tensorrt_rtx import tensorrt_rtx

tensorrt_rtx()

SIZES: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 128,
    "options": {"prove": False},
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "window": SIZES,
    "full": {**SIZES, "window": None, "context": 32},
    "layers": {
        **SIZES,
        "architecture": "ministral",
        "num_layers": 3,
        "layer_windows": [None, 5, 5],
        "context": 32,
    },
    "mixtral": {**SIZES, "architecture": "mixtral"},
    "int4": {**SIZES, "options": {"weights": "int4", "prove": False}},
}
"""Two layers of 4 heads and 2 KV heads, but for `layers`, which has 3."""

CHUNK, ROWS = 6, 2
_folder = tempfile.TemporaryDirectory(prefix="cierzo-engines-")
_built: dict[str, Engine] = {}


@dataclass(frozen=True, slots=True)
class Engine:
    """A built engine. compiled: the CUDA kernels that its plugins launch."""

    built: plan_engine.BuiltEngine
    kernels: Mapping[str, tuple[KernelCall, ...]]
    compiled: tuple[Kernel, ...]

    @property
    def info(self) -> EngineInfo:
        return self.built.info

    def of(self, plan: str, profile: int = 0) -> tuple[KernelCall, ...]:
        """What a step runs on the GPU, in order."""
        return tuple(kernel for kernel in self.kernels[plan] if kernel.profile == profile and kernel.kind != HOST)

    def profiles(self) -> Iterator[tuple[str, int]]:
        """Every profile of every plan."""
        for name, plan in self.info.plans.items():
            yield from ((name, index) for index in range(len(plan.profiles)))


def built_plans(bundle: Path, **options: Any) -> plan_engine.BuiltEngine:
    """`build` for the backend tensorrt."""
    built = building.build(bundle, **options)
    assert isinstance(built, plan_engine.BuiltEngine)
    return built


def bundle_of(model: str, folder: Path, *, max_batch: int = ROWS, **more: Any) -> Bundle:
    """A bundle of MODELS in `folder`, its own to be written into."""
    source = exported(chunk=CHUNK, max_batch=max_batch, **{**MODELS[model], **more}).bundle
    shutil.copytree(source, folder)
    return read_bundle(folder)


def engine(model: str, *, compute_capability: str = "8.9", max_batch: int = ROWS, **options: Any) -> Engine:
    """The engine of that bundle, built with these options, once."""
    key = f"{model} {compute_capability} {max_batch} {sorted(options.items())}"
    if key not in _built:
        bundle = bundle_of(model, Path(_folder.name) / str(len(_built)), max_batch=max_batch)
        with kernels_compiled() as compiled:
            built = built_plans(bundle.path, compute_capability=compute_capability, **options)
        _built[key] = Engine(built, read_kernel_lists(built.folder), tuple(compiled))
    return _built[key]


@contextmanager
def kernels_compiled() -> Iterator[list[Kernel]]:
    """Within this block a build compiles no CUDA kernels but lists them: their compiler has tests of its own."""
    compiled: list[Kernel] = []
    with mock.patch.object(plan_engine, "compile_kernel", lambda kernel, _: compiled.append(kernel)):
        yield compiled


def read_kernel_lists(folder: Path) -> dict[str, tuple[KernelCall, ...]]:
    """kernels.json of an engine, by plan."""
    document = json.loads((folder / plan_engine.KERNELS_FILE).read_text(encoding="utf-8"))
    return {plan: tuple(map(_call, lists["kernels"])) for plan, lists in document.items()}


def _call(written: dict[str, Any]) -> KernelCall:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in written.items()}
    return KernelCall(**values)


def names(tensors: Sequence[str]) -> list[str]:
    """Names of the tensors of a KernelCall, of which a name may have blanks and a type has none."""
    return [tensor.rpartition(" ")[0] for tensor in tensors]


def products(kernels: Sequence[KernelCall]) -> list[KernelCall]:
    """Those that multiply matrices."""
    return [kernel for kernel in kernels if kernel.kind == PRODUCT]


def plugins(kernels: Sequence[KernelCall], op: str) -> list[KernelCall]:
    """Those that the plugin of this op runs; a plugin's kernel is named as its node."""
    return [kernel for kernel in kernels if kernel.kind == PLUGIN and op in kernel.name]
