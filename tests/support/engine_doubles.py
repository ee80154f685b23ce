"""Sessions of the TensorRT backend without a GPU: its engine on `HostDevice` and `PlanDouble`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from exporter.build.lower import lower_for_engine
from runtime import Session
from runtime.backends.tensorrt import TensorRtEngine
from runtime.bundle import Bundle, Progress, read_bundle
from runtime.engine_info import (
    DECODE,
    EMBEDDED,
    INPUT,
    PREFILL,
    REFIT,
    WEIGHTLESS,
    EngineInfo,
    EngineWeight,
    PlanInfo,
    PlanProfile,
)
from runtime.weight_expression import Stored
from tests.support.gpu_double import HostDevice
from tests.support.plan_double import PlanDouble

ROLLING = ("RollingAttention",)


@dataclass(frozen=True, slots=True)
class Doubled:
    """A session, and what it runs on."""

    session: Session
    engine: TensorRtEngine
    device: HostDevice
    plans: dict[str, PlanDouble]


def engine_info(
    bundle: Bundle,
    *,
    arithmetic: str = "float32",
    plugins: Sequence[str] = ROLLING,
    tensors: Sequence[EngineWeight] = (),
    orders: dict[str, tuple[int, ...]] | None = None,
) -> EngineInfo:
    """What a build of the bundle would say of its engine. The plans' files are not there."""
    kv = bundle.manifest.kv
    decode = [PlanProfile(1, 1, 1, 1)]
    if kv.max_batch > 1:
        decode.append(PlanProfile(1, kv.max_batch, 1, 1))
    profiles = {PREFILL: (PlanProfile(1, kv.max_batch, 1, kv.chunk),), DECODE: tuple(decode)}
    return EngineInfo(
        name="double",
        backend="tensorrt",
        flavor="tensorrt",
        version="11.0.0",
        compute_capability="8.9",
        arithmetic=arithmetic,
        kv=arithmetic,
        plugins=tuple(plugins),
        weights=WEIGHTLESS if tensors else EMBEDDED,
        max_batch=kv.max_batch,
        chunk=kv.chunk,
        graph_sha256=bundle.manifest.files[bundle.manifest.graph.file].sha256 or "",
        plans={kind: PlanInfo(f"{kind}.plan", 1, "0" * 64, profiles[kind]) for kind in (PREFILL, DECODE)},
        tensors=tuple(tensors),
        orders=orders or {},
    )


def embedded(folder: Path, *, device: HostDevice | None = None, plugins: Sequence[str] = ROLLING) -> Doubled:
    """A session whose plans are the bundle's own graph, weights and all: the same computation as ONNX Runtime's.

    Only for bundles with their weights in the folder itself.
    """
    bundle = read_bundle(folder)
    return _session(bundle, engine_info(bundle, plugins=plugins), str(folder / bundle.manifest.graph.file), device)


def weightless(
    folder: Path,
    *,
    arithmetic: str = "float32",
    device: HostDevice | None = None,
    plugins: Sequence[str] = ROLLING,
    progress: Progress | None = None,
) -> Doubled:
    """A session whose plans hold no weights: they come out of the bundle's files."""
    bundle = read_bundle(folder)
    lowered = lower_for_engine(bundle, arithmetic, arithmetic)
    info = engine_info(
        bundle, arithmetic=arithmetic, plugins=plugins, tensors=lowered.weights, orders=dict(lowered.orders)
    )
    return _session(bundle, info, lowered.onnx, device, progress)


def unbound(folder: Path, refitted: Sequence[str] = ()) -> Doubled:
    """A session of a toy bundle whose plans hold no weights; see `unbound_toy`."""
    bundle = read_bundle(folder)
    model, weights = unbound_toy(folder, refitted)
    return _session(bundle, engine_info(bundle, tensors=weights), model, None)


def unbound_toy(folder: Path, refitted: Sequence[str] = ()) -> tuple[bytes, tuple[EngineWeight, ...]]:
    """The graph of a toy bundle with its weights as inputs, and how they are made; those `refitted` by refitting."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    weights = []
    for tensor in [t for t in model.graph.initializer if t.external_data]:
        place = {entry.key: entry.value for entry in tensor.external_data}
        stored = Stored(place["location"], int(place.get("offset", 0)), "F32", tuple(tensor.dims))
        role = REFIT if tensor.name in refitted else INPUT
        weights.append(EngineWeight(tensor.name, "F32", tuple(tensor.dims), role, stored))
        model.graph.initializer.remove(tensor)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert weights
    return model.SerializeToString(), tuple(weights)


def _session(
    bundle: Bundle, info: EngineInfo, model: bytes | str, device: HostDevice | None, progress: Progress | None = None
) -> Doubled:
    device = HostDevice() if device is None else device
    refittable = [weight.name for weight in info.tensors if weight.role == REFIT]
    plans = {kind: PlanDouble(device, kind, model, info.plans[kind].profiles, refittable) for kind in (PREFILL, DECODE)}
    engine = TensorRtEngine(bundle, info, device, plans, progress=progress)
    return Doubled(Session(bundle, engine), engine, device, plans)


def with_tensors(info: EngineInfo, tensors: Sequence[EngineWeight]) -> EngineInfo:
    """The same engine with other weights."""
    return replace(info, tensors=tuple(tensors))
