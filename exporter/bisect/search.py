"""Takes a bundle that fails and names the pass, the layer and the node that brought the error.

Golden is the same checkpoint traced again and not fused. Every node of the bundle is run on golden's own values, ring
state included, and what it gives is held against golden's value of the same name: the first that is off is the
culprit, since nothing before it can have led it astray. Golden itself is held against the PyTorch reference before.

Nodes are run twice: their function bodies, which are what the file says and what other engines run, and then, where
this version has native kernels, those, which a session runs. The graph as a whole is run as a session runs it.

The nodes between two values that both graphs have are the smallest model already: for a bundle of this version that
is one node with its function body. Polygraphy's `debug reduce` could only remove nodes, so there is nothing left for
it to do (and it would need onnx-graphsurgeon); its runner confirms that what was written fails on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporter.bisect.blame import Case, blame, changed_values, layer_of
from exporter.bisect.local import ROUNDING, LocalComparison, Off, alone, pairs, steps_of
from exporter.bisect.modules import TemplateFault, module_off, template_fault
from exporter.bisect.report import BisectReport, Culprit
from exporter.bisect.stages import plan_of, rebuild
from exporter.bisect.weights import BundleWeights
from exporter.bisect.write import write_culprit
from exporter.borders import boundary_lengths
from exporter.bundle_graph import load_graph
from exporter.layer_parity import compare_graph
from exporter.layer_report import LayerReport
from exporter.parity_tools import require_polygraphy
from exporter.save import absolute, refuse_existing
from exporter.taps import module_path
from exporter.validate import open_matching
from graph_passes.graph import source_line
from reference.checkpoint import Checkpoint
from reference.parity import TOLERANCES
from runtime import load
from runtime.bundle import Bundle, read_bundle
from runtime.errors import BackendError
from runtime.kernels import kernels

Progress = Callable[[str, int, int], None]
_STAGE, _STEPS = "bisecting", 5


def bisect(
    bundle: str | Path,
    checkpoint: str | Path | None,
    out: str | Path,
    *,
    seed: int = 0,
    weights_folder: Path | None = None,
    progress: Progress | None = None,
) -> BisectReport:
    """Find the first node of `bundle` that computes something else than `checkpoint` says (default: its own).

    out: folder that must not exist yet; it gets the smallest failing model, or stays away for a healthy bundle.
    weights_folder: see `read_bundle`.

    Raises what `validate` raises when the two cannot be compared, ExportError for `out`, and CierzoError without
    Polygraphy.
    """
    require_polygraphy()
    target = absolute(out)
    refuse_existing(target)
    search = _Search(Path(bundle), checkpoint, target, seed, weights_folder, progress)
    return search.run()


class _Search:
    """One bisection, step by step."""

    def __init__(
        self,
        path: Path,
        checkpoint: str | Path | None,
        out: Path,
        seed: int,
        weights_folder: Path | None,
        progress: Progress | None,
    ) -> None:
        session = load(path, weights_folder=weights_folder)
        self._checkpoint: Checkpoint = open_matching(session, checkpoint)
        length = boundary_lengths(session, self._checkpoint.config.layer_windows)[-1]
        del session
        self._bundle: Bundle = read_bundle(path, weights_folder=weights_folder)
        self._model = load_graph(self._bundle)
        self._out, self._progress = out, progress
        self._row = np.random.default_rng(seed).integers(0, self._checkpoint.config.vocab_size, length, dtype=np.int64)

    def run(self) -> BisectReport:
        self._report(0)
        plan = plan_of(self._bundle, self._checkpoint)
        weights = BundleWeights(self._bundle, self._model, self._checkpoint)
        self._reference, wrong = weights.reference(), weights.wrong
        self._report(1)
        rebuilt = rebuild(self._bundle, self._checkpoint, plan, weights.formats)
        golden = weights.bind(rebuilt.golden)
        self._report(2)
        rows = [self._row, self._row[: len(self._row) // 2 + 1][::-1].copy()][: self._bundle.manifest.kv.max_batch]
        self._teach(rows, weights)
        steps = steps_of(rows, plan.chunk)
        local = LocalComparison(golden, self._bundle.manifest, self._bundle.weights_folder, steps)
        shared = pairs(self._model, golden)
        case = Case(self._model, rebuilt, weights, golden, shared, local)
        report = BisectReport(
            str(self._bundle.path), str(self._checkpoint.path), None, tuple(wrong.values()), len(shared), len(steps)
        )
        against = self._modules(golden, in_place=False)
        self._report(3)
        if not against.passed:
            fault = template_fault(rebuilt, self._bundle, self._checkpoint, steps)
            self._report(_STEPS)
            if fault is not None:
                return self._template(report, fault)
            return self._whole(report, golden, against, "trace")
        whole, refusal = None, None
        try:
            whole = self._modules(self._model, in_place=True)
        except BackendError as error:  # a kernel may refuse what a body computes wrongly: a window wider than its ring
            refusal = error
        # Where nothing is wrong in the end, what one node rounds differently is no fault unless it is a large one.
        right = whole is not None and whole.passed and not wrong
        tolerance = TOLERANCES["float32"].ceiling if right else ROUNDING
        offs = local.off(self._model, shared, tolerance=tolerance)
        self._report(4)
        if not offs and wrong:
            offs = self._readers(local, shared, weights)
        if not offs:  # what this version makes otherwise is named as well, however little it moves
            changed = changed_values(self._model, rebuilt.stages[-1].model)
            offs = local.off(self._model, shared, only=changed, tolerance=0.0)
        native = not offs and kernels() is not None
        if native:
            offs = local.off(self._model, shared, tolerance=tolerance, native=True)
        if offs:
            piece = alone(self._model, shared, offs[0].value)
            culprit = blame(case, offs[0], piece, tuple(off.value for off in offs[1:]), native=native)
            self._report(_STEPS)
            return self._written(report, culprit, piece, offs[0], native=native)
        self._report(_STEPS)
        if whole is None:
            assert refusal is not None
            raise refusal
        return report if whole.passed else self._whole(report, self._model, whole, None)

    def _report(self, done: int) -> None:
        if self._progress is not None:
            self._progress(_STAGE, done, _STEPS)

    def _modules(self, model: ir.Model, *, in_place: bool) -> LayerReport:
        return compare_graph(
            model, self._bundle, self._checkpoint, self._row, reference=self._reference, in_place=in_place
        )

    def _teach(self, rows: list[np.ndarray], weights: BundleWeights) -> None:
        """Put a token whose embedding is wrong into the first row: no other token would show it."""
        embedding = weights.wrong.get("embed_tokens.weight")
        if embedding is not None and embedding.largest < float("inf"):
            rows[0] = rows[0].copy()
            rows[0][len(rows[0]) // 2] = embedding.first // self._checkpoint.config.hidden_size

    def _readers(self, local: LocalComparison, shared: dict[str, str], weights: BundleWeights) -> list[Off]:
        """The values made from a wrong weight, however little it moves them: the first that golden has too."""
        made: set[ir.Value] = set()
        for node in self._model.graph:
            inputs = [v for v in node.inputs if v is not None]
            reads = any(weights.parameter_of(str(v.name)) in weights.wrong for v in inputs)
            if reads or any(v in made and v.name not in shared for v in inputs):
                made.update(node.outputs)
        return local.off(self._model, shared, only=[str(v.name) for v in made], tolerance=-1.0)

    def _template(self, report: BisectReport, fault: TemplateFault) -> BisectReport:
        """Name the stage before golden that changed the function, in the template."""
        piece = alone(fault.model, fault.shared, fault.off.value)
        node = list(piece.graph)[-1]
        canonical = fault.stage == "canonicalise"
        what = "Canonicalisation" if canonical else f"This version's pass {fault.stage}"
        why = (
            f"{what} makes it: the traced graph computes this value right, and the graph after it does not. This is a "
            f"bug in this version. The node is that of the template, one layer of each kind "
            f"({source_line(node) or 'the tracer noted no line'})."
        )
        culprit = _culprit(fault.off, node, "tracer" if canonical else "pass", fault.stage, why)
        return self._written(report, culprit, piece, fault.off)

    def _whole(self, report: BisectReport, model: ir.Model, layers: LayerReport, stage: str | None) -> BisectReport:
        """Name the first module that is off where no single node can be named."""
        first = layers.first_failure
        assert first is not None
        off, borders = module_off(model, self._bundle, self._checkpoint, self._reference, self._row, first)
        piece = alone(model, borders, off.value)
        node = list(piece.graph)[-1]
        if stage is not None:
            kind = "tracer"
            why = (
                f"The graph is wrong before any pass: {first.module} of the traced graph is not what the PyTorch model "
                f"computes, while every module before it agrees, and canonicalisation changes nothing. The "
                f"{len(piece.graph)} nodes between them were written. This is a bug in this version."
            )
        else:
            kind = "whole"
            why = (
                f"No node is off by itself, but run as a whole {first.module} is the first module that leaves its "
                f"budget ({first.error:.1e} where {first.budget:.1e} is allowed): errors of rounding add up, or the "
                "engine runs the graph differently than it runs its nodes."
            )
        return self._written(report, _culprit(off, node, kind, stage, why, first.module), piece, off)

    def _written(
        self, report: BisectReport, culprit: Culprit, piece: ir.Model, off: Off, *, native: bool = False
    ) -> BisectReport:
        found = BisectReport(report.bundle, report.checkpoint, culprit, report.weights, report.nodes, report.steps)
        tolerance = 0.0
        if np.issubdtype(off.expected.dtype, np.floating) and np.isfinite(off.error):
            tolerance = min(ROUNDING, off.error / 2) * float(np.abs(off.expected).max(initial=0.0))
        return write_culprit(self._out, found, piece, off.inputs, off.expected, off.got, tolerance, native=native)


def _culprit(off: Off, node: ir.Node, kind: str, stage: str | None, why: str, module: str = "") -> Culprit:
    path = module or module_path(node)
    return Culprit(
        kind=kind,
        stage=stage,
        reproduced=True if stage else None,
        layer=layer_of(path, off.value),
        module=path,
        node=str(node.name),
        op=node.op_type,
        value=off.value,
        error=off.error if np.isfinite(off.error) else None,
        step=off.step,
        weight=None,
        why=why,
        others=(),
    )
