"""Taps: inner values of a bundle's graph made into outputs, and the graph run through its rolling steps.

A tap is found by the module path that the tracer left on each node (`pkg.torch.onnx.name_scopes`), which fused nodes
keep as they keep the name of the value. Where a module has one parameter, what is made from that is surer still.

Letters: B rows, T tokens of a step, C hidden size.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from exporter.recipes import parameters
from graph_passes.lower.formats import packed_name
from runtime.chunking import Step, all_positions
from runtime.errors import BackendError
from runtime.kernels import kernels
from runtime.manifest import Manifest
from runtime.rolling_kv import scale_ring

Array = npt.NDArray[Any]
SCOPES = "pkg.torch.onnx.name_scopes"
_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"


def module_path(node: ir.Node) -> str:
    """The innermost module that `node` belongs to, such as `layers.0.self_attn.q_proj`; empty at the top."""
    text = node.metadata_props.get(SCOPES)
    scopes: list[str] = list(ast.literal_eval(text)) if text else []
    return str(scopes[-2]).removeprefix("model.") if len(scopes) >= 2 else ""


def modules_of(model: ir.Model) -> dict[str, str]:
    """Module path to the name of the value that the module gives out, in the order of the graph.

    A module's output is what its parameter makes, or else the last value that its nodes make and others read (a router
    may give out choices beside its scores). A layer's output is the sum that ends it; `moe`, which the tracer may see
    through, is what that sum adds to the residual stream.
    """
    found: dict[str, ir.Value] = {}
    for node in model.graph:
        path = module_path(node)
        for value in node.outputs:
            read = value.is_graph_output() or any(module_path(use.node) != path for use in value.uses())
            if path and read and _is_float(value) and not path.endswith(".moe"):
                found[path] = value
    found |= _by_parameter(model)
    for path, value in list(found.items()):
        parts = path.split(".")
        if len(parts) == 2 and parts[0] == "layers":
            addend = _feed_forward(value, f"{path}.post_attention_layernorm")
            router = f"{path}.moe.router"
            if addend is not None and router in found:
                found[f"{path}.moe"] = addend
    order = {value: place for place, value in enumerate(v for node in model.graph for v in node.outputs)}
    return {path: str(value.name) for path, value in sorted(found.items(), key=lambda item: order[item[1]])}


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (None, ir.DataType.FLOAT) and (value.shape is None or len(value.shape) >= 2)


def _by_parameter(model: ir.Model) -> dict[str, ir.Value]:
    """Modules by their parameter: the first value behind `path.weight` that is no rearrangement of it.

    Of a quantised parameter it is the first behind its numbers.
    """
    found: dict[str, ir.Value] = {}
    for name, value in parameters(model).items():
        path, dot, kind = name.removesuffix(packed_name("")).rpartition(".")
        if not dot or kind != "weight":
            continue
        uses = list(value.uses())
        while len(uses) == 1 and uses[0].node.op_type in ("Transpose", "Cast", "Identity"):
            uses = list(uses[0].node.outputs[0].uses())
        if len(uses) == 1:
            found[path] = _finished(uses[0].node.outputs[0], path)
        elif path == "embed_tokens":  # tied: the embedding is gathered, the head multiplies
            for use in uses:
                tied = "embed_tokens" if use.node.op_type == "Gather" else "lm_head"
                found[tied] = _finished(use.node.outputs[0], tied)
    return found


def _finished(value: ir.Value, path: str) -> ir.Value:
    """What a module gives out whose parameter makes `value`: rows of two bytes are widened, a bias is added."""
    for use in value.uses():
        if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) and use.node.op_type == "Cast":
            return use.node.outputs[0]
        if use.node.op_type == "Add" and any(v is not None and v.name == f"{path}.bias" for v in use.node.inputs):
            return use.node.outputs[0]
    return value


def _feed_forward(end: ir.Value, norm: str) -> ir.Value | None:
    """The operand of the layer's last sum that comes from the feed-forward norm."""
    node = end.producer()
    if node is None or node.op_type != "Add":
        return None
    for operand in node.inputs:
        seen: set[ir.Value] = set()
        stack = [operand]
        while stack:
            value = stack.pop()
            if value is None or value in seen or value.producer() is None:
                continue
            seen.add(value)
            producer = value.producer()
            assert producer is not None
            if module_path(producer) == norm:
                return operand
            stack.extend(producer.inputs)
    return None


def with_outputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of `model` that also gives out the values `names`; weights stay where they lie."""
    copy = model.clone()
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    present = {str(value.name) for value in copy.graph.outputs}
    copy.graph.outputs.extend(values[name] for name in dict.fromkeys(names) if name not in present)
    return copy


def open_session(model: ir.Model, folder: Path | None, *, native: bool, threads: int = 0) -> ort.InferenceSession:
    """A CPU session of `model`, whose weights lie in `folder`. Raises BackendError when it cannot be loaded.

    native: plugin nodes run the kernels of this process's sessions, where it has them, and else their function bodies.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if native and (found := kernels()) is not None:
        options.register_custom_ops_library(str(found.library))
    if folder is not None:
        options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(folder))
    try:
        data = ir.to_proto(model).SerializeToString()
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base below Exception
        raise BackendError(f"ONNX Runtime {ort.__version__} cannot load the graph with its taps: {error}") from error


@dataclass(frozen=True, slots=True)
class Ring:
    """A ring as the graph declares it: the input and the output that it is bound to, its shape without B, its type."""

    past: str
    present: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def rings_of(model: ir.Model, manifest: Manifest) -> list[Ring]:
    """The rings of `model`, layer by layer, those of scales behind the others.

    Their types are what the graph declares, which before its lowering are others than the manifest's.
    """
    declared = {str(value.name): value.dtype for value in model.graph.inputs}
    rings: list[Ring] = []
    for layer in manifest.kv.layers:
        slots = (manifest.model.num_kv_heads, layer.capacity)
        names = [(layer.past_key, layer.present_key), (layer.past_value, layer.present_value)]
        scales = [(scale_ring(past), scale_ring(present)) for past, present in names]
        for pairs, shape in ((names, (*slots, manifest.model.head_dim)), (scales, slots)):
            for past, present in pairs:
                if (dtype := declared.get(past)) is not None:
                    rings.append(Ring(past, present, shape, dtype.numpy()))
    return rings


class RollingTaps:
    """The graph through its rolling steps, one step at a time, with the taps of each. All tokens' logits are asked for.

    in_place: bind each ring as `past` and as `present`, as a session does; otherwise a step leaves the ring that it
    read as it was, so that both can be looked at.
    native: see `open_session`.
    """

    def __init__(
        self,
        model: ir.Model,
        manifest: Manifest,
        folder: Path | None,
        names: Iterable[str],
        *,
        in_place: bool,
        native: bool,
    ) -> None:
        self._manifest, self._in_place = manifest, in_place
        self._names = list(dict.fromkeys(names))
        self._rings = rings_of(model, manifest)
        self._session = open_session(with_outputs(model, self._names), folder, native=native)

    def run(self, steps: Iterable[Step], batch: int) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
        """Yield (inputs, taps) of each step, from empty rings. Raises BackendError when a step fails.

        Rings among the inputs are the buffers themselves: with `in_place` they already hold what the step wrote.
        """
        graph = self._manifest.graph
        rings = {ring.past: np.zeros((batch, *ring.shape), ring.dtype) for ring in self._rings}
        for step in steps:
            positions = {
                graph.input_ids: step.input_ids_BT,
                graph.start_positions: step.start_positions_B,
                graph.token_counts: step.token_counts_B,
                graph.logit_positions: all_positions(step),
            }
            feeds = positions | rings
            after, taps = self._step(feeds, rings)
            yield feeds, taps
            rings = after

    def _step(
        self, feeds: Mapping[str, Array], rings: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        binding = self._session.io_binding()
        wanted = {argument.name for argument in self._session.get_inputs()}
        # An OrtValue made from a numpy array on the CPU is a view of it: the views must live as long as the step.
        views = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items() if name in wanted}
        for name, view in views.items():
            binding.bind_ortvalue_input(name, view)
        after = dict(rings) if self._in_place else {name: np.empty_like(ring) for name, ring in rings.items()}
        presents = {ring.present: after[ring.past] for ring in self._rings}
        for ring in self._rings:
            if self._in_place and ring.past in views:
                view = views[ring.past]
            else:
                view = views[ring.present] = ort.OrtValue.ortvalue_from_numpy(presents[ring.present])
            binding.bind_ortvalue_output(ring.present, view)
        loose = [name for name in dict.fromkeys([*self._names, self._manifest.graph.logits]) if name not in presents]
        for name in loose:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # see open_session
            raise BackendError(
                f"ONNX Runtime {ort.__version__} failed to run the graph with its taps: {error}"
            ) from error
        values = binding.get_outputs()
        by_name = dict(zip([*presents, *loose], values, strict=True))
        taps = {name: presents[name] if name in presents else by_name[name].numpy() for name in self._names}
        return after, taps
