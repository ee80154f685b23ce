"""Writes the smallest failing model: the culprit alone with its weights, its inputs, what is due and what it gives."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporter.bisect.report import BisectReport
from exporter.parity_tools import quiet_polygraphy
from exporter.recipes import is_recipe
from exporter.save import bundle_folder
from runtime.kernels import kernels

MODEL, WEIGHTS = "culprit.onnx", "culprit.weights"
_INLINE_BYTES = 64 << 20
"""Weights above this lie beside the model, since an ONNX file holds 2 GB at most and viewers less."""

Array = npt.NDArray[Any]


def write_culprit(
    out: Path,
    report: BisectReport,
    piece: ir.Model,
    inputs: Mapping[str, Array],
    expected: Array,
    got: Array,
    tolerance: float,
    *,
    native: bool = False,
) -> BisectReport:
    """Write the folder `out`, whole or not at all, and return the report that lies in it.

    piece: the nodes alone, which give out one value. tolerance: largest absolute difference that counts as rounding.
    native: the fault is in a native kernel, so that the model fails only where that runs.
    Raises ExportError when `out` is there already or cannot be written.
    """
    with bundle_folder(out) as folder:
        name = str(piece.graph.outputs[0].name)
        for value in piece.graph.inputs:
            value.shape = ir.Shape(inputs[str(value.name)].shape)
        piece.graph.outputs[0].shape = ir.Shape(got.shape)
        fed = {str(value.name): np.ascontiguousarray(inputs[str(value.name)]) for value in piece.graph.inputs}
        _save_model(piece, folder)
        _save_arrays(folder / "inputs.npz", fed)
        _save_arrays(folder / "expected.npz", {name: expected})
        _save_arrays(folder / "got.npz", {name: got})
        _save_for_polygraphy(folder, fed, name, expected)
        readme = _KERNEL_README if native else _readme(tolerance)
        (folder / "README.txt").write_text(readme, encoding="utf-8")
        done = replace(
            report,
            folder=str(out),
            nodes_written=sum(not is_recipe(node) for node in piece.graph),
            confirmed=not passes_alone(folder, fed, name, expected, tolerance, native=native),
        )
        text = json.dumps(done.to_json() | {"tolerance": tolerance}, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    return done


def _save_model(piece: ir.Model, folder: Path) -> None:
    weights = [value.const_value for value in piece.graph.initializers.values() if value.const_value is not None]
    if sum(weight.nbytes for weight in weights) > _INLINE_BYTES:
        ir.save(piece, folder / MODEL, external_data=WEIGHTS)
        return
    for name, value in piece.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=name)
    ir.save(piece, folder / MODEL)


def _save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """An npz file; numpy.savez cannot take names that are its own parameters', nor mypy names that are not known."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.save(file, array, allow_pickle=False)


def _save_for_polygraphy(folder: Path, fed: dict[str, Array], name: str, expected: Array) -> None:
    """The same arrays in Polygraphy's own spelling, which is what its command reads."""
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import save_json

    results = RunResults()
    results.append(("golden", [IterationResult({name: expected}, runtime=0.0, runner_name="golden")]))
    with quiet_polygraphy():
        save_json([fed], str(folder / "inputs.json"))
        results.save(str(folder / "expected.json"))


def _readme(tolerance: float) -> str:
    return (
        "polygraphy run culprit.onnx --onnxrt --load-inputs inputs.json --load-outputs expected.json "
        f"--check-error-stat max --rtol 0 --atol {tolerance:.6g}\n"
        "It fails as long as the node computes something else than expected.npz (got.npz is what the bundle computed); "
        "report.json says which node of the bundle it is and why.\n"
    )


_KERNEL_README = (
    "culprit.onnx gives expected.npz for inputs.npz in every ONNX Runtime, since its function body is right; got.npz "
    "is what Cierzo's native kernel gave.\n"
    "To see that, register the library that runtime.kernels.library_path() names: onnxruntime's "
    "SessionOptions.register_custom_ops_library.\n"
)


def passes_alone(
    folder: Path, fed: dict[str, Array], name: str, expected: Array, tolerance: float, *, native: bool = False
) -> bool:
    """Whether the model in `folder`, loaded from its file, gives `expected` within `tolerance`.

    native: with this process's kernels.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc

    with quiet_polygraphy():
        session = partial(_native_session, folder / MODEL) if native else SessionFromOnnx(str(folder / MODEL))
        results = Comparator.run([OnnxrtRunner(session, name="bundle")], data_loader=[fed])
        golden = RunResults()
        golden.append(("golden", [IterationResult({name: expected}, runtime=0.0, runner_name="golden")]))
        results.extend(golden)
        compare = SimpleCompareFunc(atol=tolerance, rtol=0.0, check_error_stat="max")
        return bool(Comparator.compare_accuracy(results, compare_func=compare))


def _native_session(model: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    if (found := kernels()) is not None:
        options.register_custom_ops_library(str(found.library))
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
