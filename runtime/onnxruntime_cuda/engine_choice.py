"""Which of a bundle's engines to run with the ONNX Runtime that is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle import Bundle
from runtime.engine_choice import choose, misfit_of_bundle
from runtime.engine_files import checked_file
from runtime.step_engine_info import StepEngineInfo, parse_step_engine


@dataclass(frozen=True, slots=True)
class BuiltStepEngine:
    """An engine of a bundle: its folder, and what its engine.json says."""

    folder: Path
    info: StepEngineInfo

    def files(self) -> Mapping[str, Path]:
        """The graphs' files. Raises BundleError for one whose size or hash is not what engine.json says."""
        return {
            kind: checked_file(self.folder, graph.file, graph.bytes, graph.sha256, "graph")
            for kind, graph in self.info.graphs.items()
        }


def choose_step_engine(bundle: Bundle, asked: str | None, backend: str, version: str) -> BuiltStepEngine:
    """The engine of `bundle` that runs here. asked: its name, or None for the only one that fits. backend: the name of
    the backend that asks. version: of the installed ONNX Runtime.

    Raises as `runtime.engine_choice.choose` does.
    """

    def misfit(info: StepEngineInfo) -> str | None:
        if reason := misfit_of_bundle(bundle, info.graph_sha256, info.chunk, info.max_batch):
            return reason
        if (wanted := _minor(info.version)) != _minor(version):
            install = f"`pip install 'onnxruntime-gpu=={wanted}.*'`"
            return f"is for ONNX Runtime {wanted} ({install}), and {version} is installed"
        return None

    document, info = choose(
        bundle,
        asked,
        backend,
        f"`cierzo build {bundle.path} --backend {backend}`",
        lambda document: parse_step_engine(document.name, document.root),
        misfit,
    )
    return BuiltStepEngine(document.folder, info)


def _minor(version: str) -> str:
    """ "1.31" of "1.31.1": which kernels there are changes with minor versions only."""
    return ".".join(version.split(".")[:2])
