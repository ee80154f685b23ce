"""What runs in the processes that tests/support/onnxruntime_gpu.py starts. `import onnxruntime` is onnxruntime-gpu."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.cuda_stand_in.journal import JOURNAL, MARK

TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "bfloat16": 16,
}
"""Numbers of ONNX's types."""
SPELLINGS = {"float": "float32", "double": "float64"}


def mark(text: str) -> None:
    """A line of its own between the events."""
    with open(os.environ[JOURNAL], "a", encoding="utf-8") as file:
        file.write(f"{MARK}\t{text}\t0\t0,0,0\t0,0,0\t0\n")


def place(job: Mapping[str, Any]) -> dict[str, Any]:
    """Make a session that may use the CPU too; it leaves the graph as it runs it in a file. See Placement."""
    import onnxruntime as ort

    options = _session_options(job["optimized"])
    options.optimized_model_filepath = job["executed"]
    try:
        session = ort.InferenceSession(job["graph"], options, providers=["CUDAExecutionProvider"], enable_fallback=0)
    except Exception as error:  # as below
        return {"error": f"{type(error).__name__}: {error}", "assigned": {}}
    return {"error": None, "assigned": _assigned(session)}


def run_step(job: Mapping[str, Any]) -> dict[str, Any]:
    """See Step and Observed."""
    import onnxruntime as ort

    said: dict[str, Any] = {"error": None, "assigned": {}, "begun": 0}
    options = _session_options(job["optimized"])
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "0" if job["cpu_fallback"] else "1")
    with np.load(job["arrays"]) as arrays:
        constants = {name: _on_host(arrays[name], *described) for name, described in job["constants"].items()}
        if constants:
            options.add_external_initializers(list(constants), list(constants.values()))
        mark(f"{job['label']} making")
        try:
            providers = [("CUDAExecutionProvider", job["options"])]
            session = ort.InferenceSession(job["graph"], options, providers=providers, enable_fallback=0)
            said["assigned"] = _assigned(session)
            binding = _bind(session, job, arrays)
            for run in range(job["runs"]):
                mark(f"{job['label']} run {run}")
                said["begun"] = run + 1
                session.run_with_iobinding(binding)
        except Exception as error:  # whatever the library raises is what the test wants to see
            said["error"] = f"{type(error).__name__}: {error}"
    mark(f"{job['label']} over")
    return said


def _session_options(optimized: bool) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _assigned(session: Any) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        counts.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return {provider: dict(sorted(ops.items())) for provider, ops in sorted(counts.items())}


def _bind(session: Any, job: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    import onnxruntime as ort

    def dims(described: Any) -> list[int]:
        return [job["sizes"][dim] if isinstance(dim, str) else dim for dim in described.shape]

    def on_device(described: Any) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(dims(described), TYPES[_dtype(described)], "cuda", 0)

    binding, bound = session.io_binding(), {}
    for described in session.get_inputs():
        name = described.name
        if name in job["values"]:
            content = _on_host(arrays[name], *job["values"][name])
        elif name in job["on_host"]:
            content = _zeros(dims(described), _dtype(described))
        if name in job["on_host"]:
            bound[name] = content
        else:
            bound[name] = on_device(described)
            if name in job["values"]:
                bound[name].update_inplace(content)
        binding.bind_ortvalue_input(name, bound[name])
    outputs = {described.name: described for described in session.get_outputs()}
    for name in sorted(outputs, key=lambda name: name in job["shares"]):  # the memory that others share comes first
        shared = job["shares"].get(name)
        bound[name] = on_device(outputs[name]) if shared is None else bound[shared]
        binding.bind_ortvalue_output(name, bound[name])
    return binding


def _on_host(content: np.ndarray[Any, Any], dtype: str, shape: list[int]) -> Any:
    """content: the bytes."""
    import onnxruntime as ort

    plain = np.ascontiguousarray(content).view("uint16" if dtype == "bfloat16" else dtype).reshape(shape)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(plain, TYPES[dtype])


def _dtype(described: Any) -> str:
    spelled: str = described.type.removeprefix("tensor(").removesuffix(")")
    return SPELLINGS.get(spelled, spelled)


def _zeros(shape: list[int], dtype: str) -> Any:
    count = int(np.prod(shape, dtype=np.int64)) * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)
    return _on_host(np.zeros(count, np.uint8), dtype, shape)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    names = {"job": asked["job"], "mark": mark}
    exec(asked["source"], names)
    Path(asked["answer"]).write_text(json.dumps(names["answer"]), encoding="utf-8")
