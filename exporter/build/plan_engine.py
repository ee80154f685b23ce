"""Engines of TensorRT: the lowered graph, plans built in a process of their own, kernels, the folder.

Letters: B batch rows, T tokens of a step, R rows of logits.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.build.child import run_job
from exporter.build.engine_folder import engine_folder
from exporter.build.job import BuildJob
from exporter.build.kinds import OPTIONS, EngineKind, Progress
from exporter.build.lower import LoweredGraph, lower_for_engine
from exporter.build.options import BuildOptions, require_nodes, resolve_options
from exporter.defaults import BUILDING, COMPILING, ENGINE_WEIGHTS
from exporter.hashing import own_entry
from graph_passes.ops import DOMAIN
from runtime.bundle import Bundle
from runtime.engine_info import (
    DECODE,
    EMBEDDED,
    ENGINE_FILE,
    ENGINES_FOLDER,
    PREFILL,
    EngineInfo,
    PlanInfo,
    PlanProfile,
    engine_to_json,
)
from runtime.errors import BackendError
from runtime.kernels.cuda.compiler import SUPPORTED_ARCHITECTURES, compile_kernel
from runtime.kernels.cuda.launch import Kernel
from runtime.kernels.cuda.top_logits import MOST_IDS, MOST_KEPT, TopProblem, top_logits_kernels
from runtime.weight_expression import files_of

if TYPE_CHECKING:
    from rich.table import Table

KERNELS_FILE = "kernels.json"
_LOWERED = "lowered.onnx"
_PLANS_AT_MOST = 256 << 20
"""Disk space kept for plans without weights; those of models with 32 layers take a tenth of it."""


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """What a build made.

    seconds: of the library, by plan. kernels: how many of each kind (`exporter.build.kernels.KINDS`), by plan and
    profile. compiled: CUDA kernels that the plugins launch. peak_bytes: memory of the process that built.
    """

    folder: Path
    info: EngineInfo
    seconds: Mapping[str, float]
    kernels: Mapping[str, Sequence[Mapping[str, int]]]
    compiled: int
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """What `cierzo build --json` prints."""
        from exporter.build.plan_tables import to_json

        return to_json(self)

    def draw(self) -> Table:
        """What a step runs."""
        from exporter.build.plan_tables import draw

        return draw(self)

    def written(self) -> str:
        """What lies in the folder, for a person."""
        from exporter.build.plan_tables import written

        return written(self)


def build_plans(
    opened: Bundle,
    *,
    backend: str,
    progress: Progress | None,
    flavor: str | None = None,
    compute_capability: str | None = None,
    arithmetic: str | None = None,
    kv: str | None = None,
    plugins: str | Collection[str] | None = None,
    weights: str | None = None,
) -> BuiltEngine:
    """Build an engine of two plans; see `exporter.build.build.build`."""
    _, options = resolve_options(
        opened,
        backend=backend,
        flavor=flavor,
        compute_capability=compute_capability,
        arithmetic=arithmetic,
        kv=kv,
        plugins=plugins,
        weights=ENGINE_WEIGHTS[0] if weights is None else weights,
    )
    _refuse_full_disk(opened, options)
    lowered = lower_for_engine(opened, options.arithmetic, options.kv)
    nodes = _plugin_nodes(lowered, options.plugins)
    require_nodes(opened, plugins, options.plugins, nodes)
    options = replace(options, plugins=tuple(sorted(nodes)))  # so that the same engine has one name, however asked for
    name = options.name(opened)
    with engine_folder(opened, name) as folder:
        graph = folder / _LOWERED
        graph.write_bytes(lowered.onnx)
        job = _job(opened, options, nodes, lowered, folder)

        def report(plan: str, percent: int) -> None:
            if progress is not None:
                progress(BUILDING.format(plan), percent, 100)

        result = run_job(job, report)
        graph.unlink()
        launched = [Kernel(each["source"], each["name"], each["definitions"]) for each in result["launched"]]
        compiled = _compile([*launched, *_choosing(opened, options)], options, progress)
        (folder / KERNELS_FILE).write_text(json.dumps(_kernel_lists(result), indent=1) + "\n", encoding="utf-8")
        info = _info(opened, options, lowered, job, folder)
        (folder / ENGINE_FILE).write_text(json.dumps(engine_to_json(info), indent=1) + "\n", encoding="utf-8")
    return BuiltEngine(
        folder=opened.path / ENGINES_FOLDER / name,
        info=info,
        seconds={plan: built["seconds"] for plan, built in result["plans"].items()},
        kernels={plan: built["summary"] for plan, built in result["plans"].items()},
        compiled=compiled,
        peak_bytes=result["peak_bytes"],
    )


def plan_profiles(bundle: Bundle) -> dict[str, tuple[PlanProfile, ...]]:
    """Profiles of both plans. One row is the common case of decoding, so it has a profile of static shapes."""
    chunk, rows = bundle.manifest.kv.chunk, bundle.manifest.kv.max_batch
    decode = [PlanProfile(1, 1, 1, 1)] + ([PlanProfile(1, rows, 1, 1)] if rows > 1 else [])
    return {PREFILL: (PlanProfile(1, rows, 1, chunk),), DECODE: tuple(decode)}


def _refuse_full_disk(bundle: Bundle, options: BuildOptions) -> None:
    needed = _PLANS_AT_MOST
    if options.weights == EMBEDDED:
        manifest = bundle.manifest
        stored = sum(file.bytes for file in manifest.weights.files.values())
        computed = manifest.model.parameters * (4 if options.arithmetic == "float32" else 2)
        # A plan may hold a weight once for each of its profiles.
        copies = sum(len(profiles) for profiles in plan_profiles(bundle).values())
        needed += copies * (computed if manifest.weights.quantization is None else stored)
    free = shutil.disk_usage(bundle.path).free
    if free < needed:
        raise BackendError(
            f"The engine may need {needed / 1e9:.2f} GB and the disk of {bundle.path} has {free / 1e9:.2f} GB left. "
            "Free some space, or build weightless plans."
        )


def _plugin_nodes(lowered: LoweredGraph, plugins: Collection[str]) -> dict[str, int]:
    """How many nodes of the graph each of the plugins is for; those for none are left out."""
    import onnx

    nodes = onnx.load_from_string(lowered.onnx).graph.node
    counts = Counter(node.op_type for node in nodes if node.domain == DOMAIN)
    return {name: counts[name] for name in plugins if counts[name]}


def _job(
    bundle: Bundle, options: BuildOptions, plugin_nodes: Mapping[str, int], lowered: LoweredGraph, folder: Path
) -> BuildJob:
    manifest = bundle.manifest
    graph, model = manifest.graph, manifest.model
    inputs: dict[str, tuple[str | int, ...]] = {
        graph.input_ids: ("B", "T"),
        graph.start_positions: ("B",),
        graph.token_counts: ("B",),
        graph.logit_positions: ("B", "R"),
    }
    for layer in manifest.kv.layers:
        ring = ("B", model.num_kv_heads, layer.capacity, model.head_dim)
        inputs |= {layer.past_key: ring, layer.past_value: ring}
    return BuildJob(
        flavor=options.flavor,
        compute_capability=options.compute_capability,
        plugins=tuple(plugin_nodes),
        plugin_nodes=sum(plugin_nodes.values()),
        onnx=str(folder / _LOWERED),
        folder=str(folder),
        plans=plan_profiles(bundle),
        inputs=inputs,
        weights=lowered.weights,
        embedded=options.weights == EMBEDDED,
        orders=lowered.orders,
        files={
            name: str(bundle.file(name)) for weight in lowered.weights for name in sorted(files_of(weight.expression))
        },
    )


def _kernel_lists(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"summary": plan["summary"], "kernels": plan["kernels"]} for name, plan in result["plans"].items()}


def _choosing(bundle: Bundle, options: BuildOptions) -> Collection[Kernel]:
    """The kernels that choose the highest logits, one or as many as they can; none for a GPU that has none."""
    if _capability(options) not in SUPPORTED_ARCHITECTURES:
        return ()
    vocabulary = min(bundle.manifest.model.vocab_size, MOST_IDS)
    counts = (1, min(MOST_KEPT, vocabulary))
    return dict.fromkeys(kernel for k in counts for kernel in top_logits_kernels(TopProblem(1, vocabulary, k)))


def _capability(options: BuildOptions) -> tuple[int, int]:
    major, minor = (int(part) for part in options.compute_capability.split("."))
    return major, minor


def _compile(launched: Collection[Kernel], options: BuildOptions, progress: Progress | None) -> int:
    """Compile what an engine will launch into the kernel cache, so that loading it here compiles nothing."""
    for index, kernel in enumerate(launched):
        if progress is not None:
            progress(COMPILING, index, len(launched))
        compile_kernel(kernel, _capability(options))
    if progress is not None and launched:
        progress(COMPILING, len(launched), len(launched))
    return len(launched)


def _info(bundle: Bundle, options: BuildOptions, lowered: LoweredGraph, job: BuildJob, folder: Path) -> EngineInfo:
    manifest, weightless = bundle.manifest, options.weights != EMBEDDED
    plans = {}
    for name, profiles in job.plans.items():
        file = f"{name}.plan"
        entry = own_entry(folder / file)
        plans[name] = PlanInfo(file, entry["bytes"], entry["sha256"], profiles)
    graph_sha256 = manifest.files[manifest.graph.file].sha256
    assert graph_sha256 is not None  # the manifest's own rule for the bundle's files
    return EngineInfo(
        name=options.name(bundle),
        backend=options.backend,
        flavor=options.flavor,
        version=options.version,
        compute_capability=options.compute_capability,
        arithmetic=options.arithmetic,
        kv=options.kv,
        plugins=job.plugins,
        weights=options.weights,
        max_batch=manifest.kv.max_batch,
        chunk=manifest.kv.chunk,
        graph_sha256=graph_sha256,
        plans=plans,
        tensors=lowered.weights if weightless else (),
        orders=lowered.orders if weightless else {},
    )


KIND = EngineKind(options=OPTIONS, build=build_plans)
