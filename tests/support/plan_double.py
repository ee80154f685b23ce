"""Plans that ONNX Runtime runs, on memory of a `HostDevice`: a session cannot tell them from the library's."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

import runtime.backends.onnxruntime  # noqa: F401 - looks at denormal numbers before a session flushes them to zero
from runtime.engine_info import PlanProfile
from runtime.engine_weights import nbytes_of
from runtime.errors import BackendError
from runtime.tensorrt.plans import PlanTensor
from tests.support.gpu_double import POISON, GpuFault, HostDevice, Operation

SCRATCH_BYTES = 1000
_ELEMENT: dict[str, tuple[int, Any]] = {
    "F32": (TensorProto.FLOAT, np.float32),
    "F16": (TensorProto.FLOAT16, np.float16),
    "BF16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "I64": (TensorProto.INT64, np.int64),
    "I8": (TensorProto.INT8, np.int8),
    "I4": (TensorProto.INT4, None),
}
"""ONNX's numbers of types, and numpy's types, by how plans spell them."""


@dataclass(frozen=True, slots=True)
class _Refittable:
    dtype: str
    shape: tuple[int, ...]


class PlanDouble:
    """See Plan. model: in ONNX, with weights as inputs or not. refittable: inputs that refitting makes constants."""

    def __init__(
        self,
        device: HostDevice,
        name: str,
        model: bytes | str,
        profiles: Sequence[PlanProfile],
        refittable: Sequence[str] = (),
    ) -> None:
        self.device, self.name, self._profiles = device, name, tuple(profiles)
        self._model = model
        graph = (onnx.load_from_string(model) if isinstance(model, bytes) else _read(model)).graph
        held = {tensor.name for tensor in graph.initializer}
        described = {
            value.name: _described(value, is_input)
            for is_input, values in ((True, graph.input), (False, graph.output))
            for value in values
            if value.name not in held
        }
        self.tensors: Mapping[str, PlanTensor] = {k: v for k, v in described.items() if k not in refittable}
        self.weights = {name: _Refittable(described[name].dtype, described[name].shape) for name in refittable}
        self.filled: dict[str, bytes] = {}
        self._session: ort.InferenceSession | None = None

    @property
    def session(self) -> ort.InferenceSession:
        """ONNX Runtime's, opened when a step runs first, since it does not compute in every type."""
        if self._session is None:
            if self.weights.keys() != self.filled.keys():
                raise GpuFault("the plan lacks its weights")
            self._session = _open(self._with_weights())
        return self._session

    @property
    def profiles(self) -> int:
        return len(self._profiles)

    def scratch_bytes(self, profile: int) -> int:
        return SCRATCH_BYTES + profile

    def open(self, profile: int, scratch: int, nbytes: int) -> ContextDouble:
        assert nbytes >= self.scratch_bytes(profile)
        return ContextDouble(self, self._profiles[profile], scratch, nbytes)

    def refitter(self) -> RefitterDouble:
        return RefitterDouble(self)

    def fill(self, weights: Mapping[str, bytes]) -> None:
        """Let the plan's weights hold these bytes."""
        self.filled, self._session = dict(weights), None

    def _with_weights(self) -> bytes | str:
        if not self.filled:
            return self._model
        assert isinstance(self._model, bytes), "only what was lowered has weights to fill"
        model = onnx.load_from_string(self._model)
        for name, content in self.filled.items():
            weight = self.weights[name]
            model.graph.initializer.append(
                TensorProto(name=name, data_type=_ELEMENT[weight.dtype][0], dims=weight.shape, raw_data=content)
            )
        return bytes(model.SerializeToString())


def _read(file: str) -> onnx.ModelProto:
    return onnx.load(file, load_external_data=False)


def _described(value: onnx.ValueInfoProto, is_input: bool) -> PlanTensor:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim)
    return PlanTensor(next(k for k, (element, _) in _ELEMENT.items() if element == tensor.elem_type), shape, is_input)


def _open(model: bytes | str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass(slots=True)
class ContextDouble:
    """See Context. Fails where the library would go wrong without a word."""

    plan: PlanDouble
    profile: PlanProfile
    scratch: int
    scratch_bytes: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    settled: bool = False

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        tensor = self.plan.tensors[name]
        if not tensor.is_input or len(shape) != len(tensor.shape):
            raise BackendError(f"{name} has no shape {list(shape)}")
        if any(extent not in (told, -1) for told, extent in zip(shape, tensor.shape, strict=True)):
            raise BackendError(f"{name} of {list(tensor.shape)} cannot have the shape {list(shape)}")
        self.shapes[name] = tuple(shape)
        self.settled = False

    def set_address(self, name: str, address: int) -> None:
        if name not in self.plan.tensors or address % 256:
            raise BackendError(f"{name} cannot lie at {address:#x}")
        self.addresses[name] = address

    def enqueue(self) -> None:
        device, tensors = self.plan.device, self.plan.tensors
        if missing := tensors.keys() - self.addresses.keys():
            raise GpuFault(f"nobody said where {sorted(missing)} lie")
        if device.capturing and not self.settled:
            raise GpuFault("shapes were changed, and no step ran before the capture")
        if untold := [name for name, x in tensors.items() if x.is_input and -1 in x.shape and name not in self.shapes]:
            raise GpuFault(f"nobody said how large {untold} are")
        batch, tokens = self.shapes["input_ids"]
        if any(self.shapes[name][0] != batch for name, x in tensors.items() if x.is_input and -1 in x.shape):
            raise GpuFault(f"inputs disagree on the number of rows: {self.shapes}")
        profile = self.profile
        if not (profile.min_batch <= batch <= profile.max_batch and profile.min_tokens <= tokens <= profile.max_tokens):
            raise BackendError(f"{batch} rows of {tokens} tokens are outside the profile {profile}")
        count = self.shapes["logit_positions"][1]
        assert count >= 1, "no plan gives fewer than one row of logits"
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        for name, tensor in tensors.items():
            if name not in shapes:  # a weight, a ring that is written, or the logits
                axes = (batch, count) if name == "logits" else (batch,)
                free = iter(axes)
                shapes[name] = tuple(next(free) if extent < 0 else extent for extent in tensor.shape)
        self.settled = True
        device.log.append(self.plan.name)
        device.submit(Operation(lambda: self._run(shapes, addresses)))

    def _run(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        device, session = self.plan.device, self.plan.session
        device.view(self.scratch, self.scratch_bytes).fill(POISON)
        binding = session.io_binding()
        for name, tensor in self.plan.tensors.items():
            element, dtype = _ELEMENT[tensor.dtype]
            nbytes = nbytes_of(tensor.dtype, shapes[name])
            array = device.view(addresses[name], nbytes).view(dtype).reshape(shapes[name])
            if tensor.dtype == "BF16":
                value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), element)
            else:
                value = ort.OrtValue.ortvalue_from_numpy(array)
            (binding.bind_ortvalue_input if tensor.is_input else binding.bind_ortvalue_output)(name, value)
        session.run_with_iobinding(binding)


@dataclass(slots=True)
class RefitterDouble:
    """See Refitter."""

    plan: PlanDouble
    given: dict[str, bytes] = field(default_factory=dict)

    def prototype(self, name: str) -> tuple[str, int] | None:
        weight = self.plan.weights.get(name)
        return None if weight is None else (weight.dtype, int(np.prod(weight.shape, dtype=np.int64)))

    def set(self, name: str, dtype: str, count: int, address: int) -> bool:
        assert (dtype, count) == self.prototype(name)
        self.given[name] = ctypes.string_at(address, nbytes_of(dtype, (count,)))
        return True

    def missing(self) -> Sequence[str]:
        return sorted(self.plan.weights.keys() - self.given.keys())

    def refit(self) -> bool:
        self.plan.fill(self.given)
        return True
