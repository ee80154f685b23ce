"""What a session uses of a plan, and a check that the plan is the one that the manifest and engine.json describe.

`library_plan.py` has plans of the library itself; tests have plans that run on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.engine_info import INPUT, EngineInfo
from runtime.errors import BackendError, BundleError
from runtime.manifest import Manifest

KV_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8": "F8_E4M3"}
"""Types of rings as engine.json names them, and as tensors are described here."""

Shape = Sequence[int | None]


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """An input or output. dtype: as safetensors spells it. shape: −1 for what a step decides.

    on_device: whether its memory is the GPU's, as all but a few small inputs of shape arithmetic are. is_linear:
    whether its numbers lie in the order of its axes, without gaps.
    """

    dtype: str
    shape: tuple[int, ...]
    is_input: bool
    on_device: bool = True
    is_linear: bool = True


class Context(Protocol):
    """A plan with scratch memory, to run steps. Every method raises BackendError for what the library refuses."""

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        """Of an input, for the steps to come."""
        ...

    def set_address(self, name: str, address: int) -> None:
        """Where an input or output lies on the GPU, for the steps to come."""
        ...

    def enqueue(self) -> None:
        """Queue a step on the device's stream."""
        ...


class Refitter(Protocol):
    """Fills weights into a plan."""

    def prototype(self, name: str) -> tuple[str, int] | None:
        """Type and count of numbers of the weight of that name; None if the plan has none."""
        ...

    def set(self, name: str, dtype: str, count: int, address: int) -> bool:
        """Take the numbers at this address of the host, which must stay there until `refit` returns."""
        ...

    def missing(self) -> Sequence[str]:
        """Weights that were not set and are needed."""
        ...

    def refit(self) -> bool:
        """Put what was set into the plan."""
        ...


class Plan(Protocol):
    """A loaded plan."""

    @property
    def tensors(self) -> Mapping[str, PlanTensor]: ...

    @property
    def profiles(self) -> int:
        """How many optimisation profiles it has."""
        ...

    def scratch_bytes(self, profile: int) -> int:
        """Memory that a context of this profile needs besides inputs and outputs."""
        ...

    def open(self, profile: int, scratch: int, nbytes: int) -> Context:
        """A context with scratch memory of `nbytes` at this address, which contexts that run in turn may share."""
        ...

    def refitter(self) -> Refitter: ...


def check_plan(manifest: Manifest, info: EngineInfo, kind: str, plan: Plan) -> None:
    """Compare a loaded plan with what the manifest and engine.json say of it.

    Raises BundleError when names, types, shapes or the number of profiles differ, and BackendError for an input whose
    memory would have to be the host's.
    """
    where = f"the plan {info.plans[kind].file} of the engine {info.name}"
    if plan.profiles != len(info.plans[kind].profiles):
        raise BundleError(
            f"{where[0].upper()}{where[1:]} has {plan.profiles} profiles and not {len(info.plans[kind].profiles)}, as "
            "engine.json says. Build it again with `cierzo build`."
        )
    for words, inputs, expected in (
        ("inputs", True, _expected_inputs(manifest, info)),
        ("outputs", False, _expected_outputs(manifest, info)),
    ):
        found = {name: tensor for name, tensor in plan.tensors.items() if tensor.is_input == inputs}
        if found.keys() != expected.keys():
            different = ", ".join(sorted(found.keys() ^ expected.keys())[:8])
            raise BundleError(
                f"The {words} of {where} are not those that the manifest and engine.json describe; they differ in "
                f"{different}. Build it again with `cierzo build`."
            )
        for name, (dtype, shape) in expected.items():
            _check_tensor(where, name, found[name], dtype, shape)


def _check_tensor(where: str, name: str, found: PlanTensor, dtype: str, shape: Shape) -> None:
    fits = len(found.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(found.shape, shape, strict=True)
    )
    if found.dtype != dtype or not fits:
        described = [-1 if extent is None else extent for extent in shape]
        raise BundleError(
            f"{name} in {where} is {found.dtype} {list(found.shape)}, and the manifest and engine.json describe "
            f"{dtype} {described}. Build it again with `cierzo build`."
        )
    if not found.is_linear:
        raise BackendError(
            f"{name} in {where} lies in memory in an order of the library's own, which Cierzo does not write. Build "
            "the engine with plugins, or report this with the bundle's config."
        )
    if not found.on_device:
        raise BackendError(
            f"{name} in {where} must lie in the host's memory, since the library computes shapes with it, and Cierzo "
            "keeps all inputs on the GPU. Build the engine with plugins, or report this with the bundle's config."
        )


def _expected_inputs(manifest: Manifest, info: EngineInfo) -> Mapping[str, tuple[str, Shape]]:
    graph = manifest.graph
    expected: dict[str, tuple[str, Shape]] = {
        graph.input_ids: ("I64", (None, None)),
        graph.start_positions: ("I64", (None,)),
        graph.token_counts: ("I64", (None,)),
        graph.logit_positions: ("I64", (None, None)),
    }
    for layer in manifest.kv.layers:
        expected[layer.past_key] = expected[layer.past_value] = _ring(manifest, info, layer.capacity)
    for weight in info.tensors:
        if weight.role == INPUT:
            expected[weight.name] = (weight.dtype, weight.shape)
    return expected


def _expected_outputs(manifest: Manifest, info: EngineInfo) -> Mapping[str, tuple[str, Shape]]:
    expected: dict[str, tuple[str, Shape]] = {manifest.graph.logits: ("F32", (None, None, manifest.model.vocab_size))}
    for layer in manifest.kv.layers:
        expected[layer.present_key] = expected[layer.present_value] = _ring(manifest, info, layer.capacity)
    return expected


def _ring(manifest: Manifest, info: EngineInfo, capacity: int) -> tuple[str, Shape]:
    if info.kv not in KV_TYPES:
        raise BundleError(
            f"The engine {info.name} has rings of the type {info.kv!r}, and this Cierzo knows {', '.join(KV_TYPES)}. "
            "Build it again with `cierzo build`."
        )
    return KV_TYPES[info.kv], (None, manifest.model.num_kv_heads, capacity, manifest.model.head_dim)
