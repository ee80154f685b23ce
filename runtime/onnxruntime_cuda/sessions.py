"""ONNX Runtime's sessions of an engine's graphs, and bindings of their inputs and outputs to addresses.

A binding is made once for all steps that use the same addresses. What ONNX Runtime logs as an error it also raises, so
the log is silent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.errors import BackendError
from runtime.json_files import brief
from runtime.onnxruntime_cuda.interface import ELEMENT_TYPES
from runtime.onnxruntime_cuda.place import Place

_LOGS_NOTHING = 4
_GRAPH_NUMBER = "gpu_graph_id"
_DEVICE = 0


class StepSession:
    """A session of one graph on a place.

    constants: initializers of the graph that the file has no content of, by name. captures: whether its steps are
    captured and launched as one; then addresses may only change with the number that `Binding.run` is given.

    Raises BackendError for a graph that cannot be loaded, or of which not all nodes run on the place's provider.
    """

    def __init__(
        self, path: Path, place: Place, *, captures: bool = False, constants: Mapping[str, Any] | None = None
    ) -> None:
        self._path, self.place = path, place
        options = ort.SessionOptions()
        options.log_severity_level = _LOGS_NOTHING
        # Plans of memory are kept for every shape that was ever seen, and their block is taken beside what was taken.
        options.enable_mem_pattern = False
        # The graphs were optimised when they were built: what runs is what engine.json says.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        for key, value in place.entries.items():
            options.add_session_config_entry(key, value)
        if constants:
            options.add_external_initializers(list(constants), list(constants.values()))
        provider = (place.provider, {**place.options, **(place.capturing if captures else {})})
        try:
            # ONNX Runtime's Python code would run on the CPU what the provider fails to.
            self._session = ort.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions share no base below Exception
            raise BackendError(self._failed("cannot load", error)) from error
        self._session.disable_fallback()
        self._constants = constants if place.reads_host else None
        if (found := self._session.get_providers()[0]) != place.provider:
            raise BackendError(
                f"ONNX Runtime {ort.__version__} loads {path} with {found} and not with {place.provider}. Look with "
                "`nvidia-smi` whether the GPU works, and install onnxruntime-gpu anew."
            )

    @property
    def inputs(self) -> Sequence[Any]:
        """Name, type and shape of each."""
        found: Sequence[Any] = self._session.get_inputs()
        return found

    @property
    def input_names(self) -> set[str]:
        """The names of all inputs."""
        return {argument.name for argument in self.inputs}

    @property
    def outputs(self) -> Sequence[Any]:
        """Name, type and shape of each."""
        found: Sequence[Any] = self._session.get_outputs()
        return found

    def run(self, binding: Any, options: Any) -> None:
        """Run a step, and wait until it is done. Raises BackendError where it fails."""
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # see __init__
            raise BackendError(self._failed("failed to run", error)) from error

    def io_binding(self) -> Any:
        """ONNX Runtime's binding of nothing."""
        return self._session.io_binding()

    def close(self) -> None:
        """Give its memory back; nothing may be run any more, and its bindings must have been closed."""
        self._session = self._constants = None

    def _failed(self, what: str, error: Exception) -> str:
        said = " ".join(str(error).split()).rstrip(".")
        if "Failed to allocate memory" in said or "out of memory" in said.lower():
            return (
                f"ONNX Runtime {ort.__version__} {what} {self._path.name}, since the memory of the device does not "
                f"suffice for the intermediate values of a step ({brief(said)}). Feed fewer rows at once, or export "
                "the checkpoint again with a smaller chunk."
            )
        return (
            f"ONNX Runtime {ort.__version__} {what} {self._path}: {said}. If the engine was built for another version "
            "of it, build it again with `cierzo build`."
        )


class Binding:
    """Inputs and outputs of a session at addresses, which must stay valid as long as this is run."""

    def __init__(self, session: StepSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._options = ort.RunOptions()
        self._options.log_severity_level = _LOGS_NOTHING
        self._kept: dict[str, NDArray[np.generic]] = {}

    def input(self, name: str, dtype: str, shape: Sequence[int], address: int) -> None:
        """Read `name` from this address of the device; a later call for it replaces this one."""
        place = self._session.place
        self._binding.bind_input(name, place.device_type, _DEVICE, ELEMENT_TYPES[dtype].onnx, list(shape), address)

    def host_input(self, name: str, dtype: str, array: NDArray[np.generic]) -> None:
        """Read `name` from an array of the host, whose content may change between runs."""
        self._kept[name] = array
        onnx_type = ELEMENT_TYPES[dtype].onnx
        self._binding.bind_input(name, "cpu", _DEVICE, onnx_type, list(array.shape), array.ctypes.data)

    def output(self, name: str, dtype: str, shape: Sequence[int], address: int) -> None:
        """Write `name` to this address of the device; a later call for it replaces this one."""
        place = self._session.place
        self._binding.bind_output(name, place.device_type, _DEVICE, ELEMENT_TYPES[dtype].onnx, list(shape), address)

    def capture_as(self, number: int) -> None:
        """All runs are one captured graph of this number, which stands for these addresses and no others."""
        self._options.add_run_config_entry(_GRAPH_NUMBER, str(number))

    def close(self) -> None:
        """Let go of the session; nothing may be run any more."""
        self._binding = None

    def run(self) -> None:
        """Run a step with what lies at the addresses, and wait until it is done. Raises BackendError."""
        self._session.run(self._binding, self._options)
