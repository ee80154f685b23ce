"""Running one node on its native kernel, at every level of instructions that this machine has.

The level is chosen once for a process, so each lower one has a subprocess of its own that runs all cases of a file: a
module of tests/kernels with `if __name__ == "__main__": main("it", cases)`.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from runtime.kernels import kernels, library_path
from tests.support.guarded import guarded

Array = npt.NDArray[Any]
Attributes = Mapping[str, Any]
ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("portable", "avx2", "avx512")
"""The levels of x86-64, each with all that the ones before it have."""
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
"""Whether AddressSanitizer watches the heap: then inputs lie there, else before a page that cannot be read."""


def levels() -> tuple[str, ...]:
    """Levels of instructions that this machine can run, the one in use last."""
    found = kernels()
    if found is None and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("there is no C compiler, so there are no kernels to test", allow_module_level=True)
    assert found is not None, "the kernels are not built: install the package again"
    return (*LEVELS[: LEVELS.index(found.isa)], found.isa) if found.isa in LEVELS else ("portable", found.isa)


class Node:
    """One node of the domain cierzo in a session of its own; inputs are named after `inputs`, outputs after `outputs`.

    outputs: name to element type. functions: the node's body and what it calls, for a run without the kernel.
    """

    def __init__(
        self,
        op: str,
        inputs: Mapping[str, Array | None],
        outputs: Mapping[str, npt.DTypeLike],
        attributes: Attributes,
        *,
        native: bool = True,
        functions: Sequence[onnx.FunctionProto] = (),
        threads: int = 1,
    ) -> None:
        names = [name if array is not None else "" for name, array in inputs.items()]
        given = [_value_info(name, array.dtype, array.ndim) for name, array in inputs.items() if array is not None]
        results = [_value_info(name, np.dtype(dtype), None) for name, dtype in outputs.items()]
        node = onnx.helper.make_node(op, names, list(outputs), domain="cierzo", **attributes)
        graph = onnx.helper.make_graph([node], "one_node", given, results)
        imports = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("cierzo", 1)]
        model = onnx.helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False  # or a sanitizer could not tell one tensor from the next
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        if native:
            options.register_custom_ops_library(str(library_path()))
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self._outputs = tuple(outputs)

    def run(self, inputs: Mapping[str, Array | None], *, in_place: Mapping[str, str] | None = None) -> dict[str, Array]:
        """The outputs. in_place: output to the input whose memory it shares; the caller's arrays stay as they are."""
        binding = self._session.io_binding()
        place = functools.partial(np.array, order="C") if SANITIZED else guarded
        # An OrtValue is a view of its array, which has to live as long.
        arrays = {name: place(array) for name, array in inputs.items() if array is not None}
        bound = {name: _ort_value(array) for name, array in arrays.items()}
        for name, value in bound.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            if in_place and name in in_place:
                binding.bind_ortvalue_output(name, bound[in_place[name]])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, (np.array(array) for array in binding.copy_outputs_to_cpu()), strict=True))


def _ort_value(array: Array) -> onnxruntime.OrtValue:
    """The array as ONNX Runtime's value; bfloat16 is ml_dtypes' type, which ONNX Runtime takes as bare bits only."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    if kind == onnx.TensorProto.BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), kind)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _value_info(name: str, dtype: np.dtype[np.generic], rank: int | None) -> onnx.ValueInfoProto:
    shape = None if rank is None else [None] * rank
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(dtype), shape)


def run_cases(module: str, level: str, *arguments: str, **environment: str) -> str:
    """What all cases of tests/kernels/<module>.py print, run in a process at this level. Fails with its output."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    variables.pop("CIERZO_KERNELS", None)
    if level not in levels():
        raise ValueError(f"this machine has no level {level!r}")
    if level != levels()[-1]:
        variables["CIERZO_KERNELS"] = level
    command = [sys.executable, "-X", "faulthandler", "-m", f"tests.kernels.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{module} at {level}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def main(cases: Mapping[str, Callable[[], None]]) -> None:
    """Runs every case and prints `<level> <library> <number of cases>`; a failing case ends the process by its name.

    What ends the process at once (a signal, a sanitizer) does so after the name of its case.
    """
    found = kernels()
    assert found is not None
    for name, case in cases.items():
        print("case", name, file=sys.stderr, flush=True)
        try:
            case()
        except Exception as error:
            raise AssertionError(f"case {name} at {found.isa}: {error}") from error
    print(found.isa, found.library, len(cases))
