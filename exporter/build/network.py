"""The network that an engine is built of: the lowered graph, parsed, with its weights as the engine is to have them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.build.job import BuildJob
from runtime.engine_info import INPUT, EngineWeight
from runtime.engine_weights import BITS
from runtime.errors import BackendError
from runtime.tensorrt.flavor import Flavor
from runtime.weight_expression import pieces

_MOST_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Network:
    """A parsed graph. held: numbers that the library reads by address until the engine is built.

    stripped: whether weights are left out of plans, to be filled in when they are loaded.
    """

    builder: Any
    definition: Any
    parser: Any
    held: list[npt.NDArray[np.uint8]]
    stripped: bool


def parse_network(flavor: Flavor, logger: Any, job: BuildJob) -> Network:
    """Parse the job's graph; plugins that are registered take their nodes.

    A weight stays an input of the network, or becomes a constant: one without numbers where they are filled in later
    (only as a constant do quantised weights become part of the product that reads them), or one with its numbers.

    Raises BackendError with the node and the library's words for whatever it cannot take.
    """
    trt = flavor.trt
    builder = trt.Builder(logger)
    definition = builder.create_network(0)
    parser = trt.OnnxParser(definition, logger)
    if not parser.parse(Path(job.onnx).read_bytes()):
        raise BackendError(_refusal(flavor, parser))
    _require_plugins(flavor, definition, job)
    constants = [weight for weight in job.weights if job.embedded or weight.role != INPUT]
    held: list[npt.NDArray[np.uint8]] = []
    readers = _readers(definition, {weight.name for weight in constants})
    for weight in constants:
        _replace(trt, definition, weight, readers[weight.name], _numbers(job, weight, held) if job.embedded else 0)
    _settle_borders(flavor, definition)
    return Network(builder, definition, parser, held, bool(constants) and not job.embedded)


def _settle_borders(flavor: Flavor, definition: Any) -> None:
    """Let inputs and outputs lie row by row on the GPU, as whoever runs the plan lays them out.

    Raises BackendError for an input whose numbers decide on shapes: the library would read it on the host.
    """
    inputs = [definition.get_input(index) for index in range(definition.num_inputs)]
    outputs = [definition.get_output(index) for index in range(definition.num_outputs)]
    for tensor in (*inputs, *outputs):
        tensor.allowed_formats = 1 << int(flavor.trt.TensorFormat.LINEAR)
    if on_host := [tensor.name for tensor in inputs if tensor.is_shape_tensor]:
        raise BackendError(
            f"{flavor.name} {flavor.version} takes shapes from the numbers of {on_host[0]}, and a plan's inputs lie "
            "on the GPU. Export the checkpoint again, which writes a graph without such a node."
        )


def _refusal(flavor: Flavor, parser: Any) -> str:
    """What the parser says, by node; several errors at one node are one problem."""
    said: dict[str, str] = {}
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"{error.node_operator() or 'the graph'} {error.node_name()!r}" if error.node_name() else "the graph"
        said.setdefault(where, " ".join(str(error.desc()).split()))
    shown = "; ".join(f"{where}: {text}" for where, text in list(said.items())[:_MOST_SHOWN])
    more = f"; and {len(said) - _MOST_SHOWN} more nodes" if len(said) > _MOST_SHOWN else ""
    return (
        f"{flavor.name} {flavor.version} does not take the graph ({shown or 'it does not say why'}{more}). If a plugin "
        "could run that node, build with --plugins all; otherwise another --arithmetic or --kv may be taken."
    )


def _require_plugins(flavor: Flavor, definition: Any, job: BuildJob) -> None:
    """Raises BackendError if a node that a plugin was to run was not given to it: its body would run instead."""
    layers = (definition.get_layer(index) for index in range(definition.num_layers))
    given = sum(layer.type == flavor.trt.LayerType.PLUGIN_V3 for layer in layers)
    if given != job.plugin_nodes:
        raise BackendError(
            f"{flavor.name} {flavor.version} gave {given} of {job.plugin_nodes} nodes to the plugins asked for "
            f"({', '.join(job.plugins)}). Export the checkpoint again, or build with --plugins none."
        )


def _readers(definition: Any, names: set[str]) -> dict[str, list[tuple[Any, int, Any]]]:
    """Which layer reads each of these inputs, as its how manieth input, and the tensor itself."""
    found: dict[str, list[tuple[Any, int, Any]]] = {name: [] for name in names}
    for layer in (definition.get_layer(index) for index in range(definition.num_layers)):
        for index in range(layer.num_inputs):
            tensor = layer.get_input(index)
            if tensor is not None and tensor.name in found:
                found[tensor.name].append((layer, index, tensor))
    return found


def _replace(
    trt: Any, definition: Any, weight: EngineWeight, readers: list[tuple[Any, int, Any]], address: int
) -> None:
    """Put a constant into the place of an input; without an address it has no numbers, and a name to fill it by."""
    if not readers:
        return
    tensor = readers[0][2]
    constant = definition.add_constant(weight.shape, trt.Weights(tensor.dtype, address, _count(weight)))
    constant.name = f"{weight.name}.constant"
    if address == 0:
        named = definition.set_weights_name(constant.weights, weight.name)
        if not (named and definition.mark_weights_refittable(weight.name)):
            raise BackendError(
                f"The weight {weight.name} cannot be left out of the engine. Build it with --weights embedded."
            )
    for layer, index, _ in readers:
        layer.set_input(index, constant.get_output(0))
    definition.remove_tensor(tensor)


def _count(weight: EngineWeight) -> int:
    return int(np.prod(weight.shape, dtype=np.int64))


def _numbers(job: BuildJob, weight: EngineWeight, held: list[npt.NDArray[np.uint8]]) -> int:
    """The address of a weight's bytes: those of the file where they are as the engine reads them, else made ones."""
    parts = list(pieces(weight.expression, lambda name: Path(job.files[name]), job.orders))
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    expected = _count(weight) * BITS[weight.dtype] // 8
    if whole.nbytes != expected:
        raise BackendError(
            f"The weight {weight.name} has {whole.nbytes} bytes, and {expected} are needed. Export the bundle again."
        )
    held.append(whole)
    return int(whole.ctypes.data)
