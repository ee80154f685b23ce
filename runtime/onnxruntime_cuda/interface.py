"""What goes into an engine's graphs and comes out, and a check that a graph is the one that engine.json describes.

Letters: B batch rows, T tokens of a step, R of them whose logits are asked for, V vocabulary, G KV heads, D head dim,
S slots of a ring, N rows of logits, K highest of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.engine_info import INPUT, PREFILL
from runtime.errors import BundleError
from runtime.manifest import Manifest
from runtime.step_engine_info import BOUNDS, PAGE, TOP_LOGITS, StepEngineInfo

LOGITS, VALUES, IDS = "logits", "values", "ids"
"""Input and outputs of the graph that finds the highest logits."""


@dataclass(frozen=True, slots=True)
class ElementType:
    """A type of numbers. onnx: its number in ONNX. called: by ONNX Runtime, of a tensor."""

    onnx: int
    called: str


ELEMENT_TYPES = {
    "F32": ElementType(1, "tensor(float)"),
    "U8": ElementType(2, "tensor(uint8)"),
    "I8": ElementType(3, "tensor(int8)"),
    "I32": ElementType(6, "tensor(int32)"),
    "I64": ElementType(7, "tensor(int64)"),
    "F16": ElementType(10, "tensor(float16)"),
    "BF16": ElementType(16, "tensor(bfloat16)"),
}
"""By the names of safetensors."""

_KV_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Form = tuple[str, Sequence[int | None]]
"""Type and shape of an input or output; None for what a step decides."""


def ring_type(info: StepEngineInfo) -> str:
    """Of the numbers in KV rings. Raises BundleError for one that is not known."""
    if info.kv not in _KV_TYPES:
        raise BundleError(
            f"The engine {info.name} has rings of the type {info.kv!r}, and this Cierzo knows {', '.join(_KV_TYPES)}. "
            "Build it again with `cierzo build`."
        )
    return _KV_TYPES[info.kv]


def ring_shapes(manifest: Manifest, info: StepEngineInfo) -> dict[str, tuple[int, int]]:
    """[S, G·D] of each ring by the name of its input."""
    width = manifest.model.num_kv_heads * manifest.model.head_dim
    return {name: (ring.slots, width) for ring in info.rings for name in (ring.past_key, ring.past_value)}


def inputs_of(manifest: Manifest, info: StepEngineInfo, kind: str) -> dict[str, Form]:
    """The inputs of the graph for many tokens or of that for one, but for weights and what only some graphs read."""
    graph = manifest.graph
    found: dict[str, Form] = {graph.input_ids: ("I64", (None, None)), graph.start_positions: ("I64", (None,))}
    if kind == PREFILL:
        found[graph.logit_positions] = ("I64", (None, None))
        if info.scratch is not None:
            found[BOUNDS] = ("I32", (2,))
    dtype = ring_type(info)
    return found | {name: (dtype, (None, *shape)) for name, shape in ring_shapes(manifest, info).items()}


def outputs_of(manifest: Manifest, info: StepEngineInfo, kind: str) -> dict[str, Form]:
    """The outputs of the graph for many tokens or of that for one."""
    model, dtype, shapes = manifest.model, ring_type(info), ring_shapes(manifest, info)
    found: dict[str, Form] = {manifest.graph.logits: ("F32", (None, None, model.vocab_size))}
    for ring in info.rings:
        found[ring.present_key] = (dtype, (None, *shapes[ring.past_key]))
        found[ring.present_value] = (dtype, (None, *shapes[ring.past_value]))
    if kind == PREFILL and info.scratch is not None:
        for name in (*info.scratch.keys, *info.scratch.values):
            found[name] = (dtype, (None, PAGE, model.num_kv_heads, model.head_dim))
    return found


def check_step_graph(manifest: Manifest, info: StepEngineInfo, kind: str, inputs: Any, outputs: Any) -> None:
    """Compare a session's inputs and outputs with what manifest and engine.json say. kind: PREFILL or DECODE.

    Weights may be missing, as each graph reads those that it needs, and token counts, which only layers with a window
    need. Raises BundleError for everything else.
    """
    optional: dict[str, Form] = {w.name: (w.dtype, w.shape) for w in info.tensors if w.role == INPUT}
    if kind == PREFILL:
        optional[manifest.graph.token_counts] = ("I64", (None,))
    where = f"the graph {info.graphs[kind].file} of the engine {info.name}"
    _check(where, "inputs", inputs, inputs_of(manifest, info, kind), optional)
    _check(where, "outputs", outputs, outputs_of(manifest, info, kind), {})


def check_top_graph(manifest: Manifest, info: StepEngineInfo, kind: str, inputs: Any, outputs: Any) -> None:
    """The same for the graph that finds the highest logits."""
    vocab_size = manifest.model.vocab_size
    count = min(TOP_LOGITS, vocab_size)
    where = f"the graph {info.graphs[kind].file} of the engine {info.name}"
    _check(where, "inputs", inputs, {LOGITS: ("F32", (None, vocab_size))}, {})
    _check(where, "outputs", outputs, {VALUES: ("F32", (None, count)), IDS: ("I64", (None, count))}, {})


def _check(where: str, words: str, found: Any, needed: Mapping[str, Form], optional: Mapping[str, Form]) -> None:
    described = {**needed, **optional}
    arguments = {argument.name: argument for argument in found}
    if different := sorted((arguments.keys() - described.keys()) | (needed.keys() - arguments.keys())):
        raise BundleError(
            f"The {words} of {where} are not those that the manifest and engine.json describe; they differ in "
            f"{', '.join(different[:8])}. Build it again with `cierzo build`."
        )
    for name, argument in arguments.items():
        dtype, shape = described[name]
        called = ELEMENT_TYPES[dtype].called if dtype in ELEMENT_TYPES else dtype
        # A free dimension comes back as a name (str) or None and is compared with nothing.
        fits = len(argument.shape) == len(shape) and all(
            want is None or not isinstance(have, int) or have == want
            for have, want in zip(argument.shape, shape, strict=True)
        )
        if argument.type != called or not fits:
            raise BundleError(
                f"{name} in {where} is {argument.type} {argument.shape}, and the manifest and engine.json describe "
                f"{called} {[-1 if extent is None else extent for extent in shape]}. Build it again with `cierzo "
                "build`."
            )
