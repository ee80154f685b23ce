"""Where ONNX Runtime with its CUDA provider would run each node of a graph, found out without a GPU and without it.

All nodes must be on the device, and nothing may be copied between host and device inside a step: a step could then not
be captured as a CUDA graph, and every copy waits for the device. Whatever would be otherwise is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import onnx
from onnx.inliner import inline_local_functions

from exporter.build.cuda_provider import CUDA, KERNELS, VERSION, CudaKernel
from exporter.build.value_types import Types, value_types
from runtime.errors import BackendError

_SMALL = 100
"""Initializers of up to so many numbers may lie on the host without being missed on the device."""

Placed = tuple[onnx.NodeProto, CudaKernel]

_WAY_OUT = "Run this bundle with another backend, and please report it: engines should be made of such nodes only."


def flat(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with function bodies in the place of the nodes that call them, and CastLike as the Cast that it is.

    That is what ONNX Runtime makes of it as well.
    """
    inlined = (
        inline_local_functions(model) if model.functions else onnx.ModelProto.FromString(model.SerializeToString())
    )
    types = value_types(inlined)
    for node in inlined.graph.node:
        if (node.domain, node.op_type) == ("", "CastLike") and node.input[1] in types:
            to = types[node.input.pop(1)]
            node.op_type = "Cast"
            node.attribute.append(onnx.helper.make_attribute("to", int(to)))
    return inlined


def placement(model: onnx.ModelProto, host: Collection[str] = ()) -> Mapping[str, Mapping[str, int]]:
    """How many nodes of each op run where: provider -> op -> nodes, with function bodies inlined; ops in their order.

    host: inputs that are in the host's memory; all others are on the device. Raises BackendError for a node that would
    not run on the device, or that would have something copied there or back.
    """
    model = flat(model)
    types = value_types(model)
    constants = {tensor.name: _count(tensor) for tensor in model.graph.initializer}
    nodes: list[Placed] = []
    for node in model.graph.node:
        if (node.domain, node.op_type) == ("", "Constant"):  # an initializer, as soon as a session is made
            constants[node.output[0]] = 1
        else:
            nodes.append((node, _kernel(node, types)))
    _refuse_shape_arithmetic(nodes, {value.name for value in model.graph.input}, constants, types)
    _refuse_copies(nodes, constants, host)
    return {CUDA: dict(sorted(Counter(node.op_type for node, _ in nodes).items()))}


def _kernel(node: onnx.NodeProto, types: Types) -> CudaKernel:
    kernel = KERNELS.get((node.domain, node.op_type))
    if kernel is None:
        raise BackendError(
            f"The node {_named(node)} has no kernel among those of ONNX Runtime {VERSION} on CUDA that engines rely "
            f"on, and a step does not fall back to the CPU. {_WAY_OUT}"
        )
    for index, allowed in kernel.inputs.items():
        name = node.input[index] if index < len(node.input) else ""
        if name and types.get(name) not in allowed:
            found = types[name].name.lower() if name in types else "an unknown type"
            raise BackendError(
                f"The node {_named(node)} reads {name} as {found}, for which ONNX Runtime {VERSION} has no kernel on "
                f"CUDA, and a step does not fall back to the CPU. {_WAY_OUT}"
            )
    return kernel


def _named(node: onnx.NodeProto) -> str:
    return f"{node.name or node.output[0]} ({node.domain + ':' if node.domain else ''}{node.op_type})"


def _refuse_shape_arithmetic(
    nodes: Sequence[Placed], inputs: Collection[str], constants: Mapping[str, int], types: Types
) -> None:
    """ONNX Runtime computes with shapes on the CPU, whatever kernels there are.

    That is a node with an input in the host's memory that its kernel does not want there, if all of its inputs are
    such, or small constants, or inputs of the graph; and none is in a type that CPUs are slow in.
    """
    anywhere = {*inputs, *(name for name, count in constants.items() if count <= _SMALL)}
    on_host: set[str] = set()
    for node, kernel in nodes:
        if not on_host.isdisjoint(node.input):
            narrow = any(types[name].name in ("FLOAT16", "BFLOAT16") for name in node.input if name)
            moved = all(
                name in anywhere or (name in on_host and index not in kernel.host_inputs)
                for index, name in enumerate(node.input)
                if name
            )
            if moved and not narrow:
                raise BackendError(
                    f"ONNX Runtime {VERSION} would run the node {_named(node)} on the CPU, since it computes with "
                    f"shapes, and a step does not fall back to the CPU. {_WAY_OUT}"
                )
        on_host.update(name for index, name in enumerate(node.output) if index in kernel.host_outputs)


def _refuse_copies(nodes: Sequence[Placed], constants: Collection[str], host: Collection[str]) -> None:
    on_host = set(host)
    for node, kernel in nodes:
        for index, name in enumerate(node.input):
            if name and name not in constants and (name in on_host) != (index in kernel.host_inputs):
                way = "to the device" if name in on_host else "to the host"
                raise BackendError(
                    f"ONNX Runtime {VERSION} would copy {name} {way} in every step, for the node {_named(node)}. "
                    f"{_WAY_OUT}"
                )
        on_host.update(name for index, name in enumerate(node.output) if index in kernel.host_outputs)


def _count(tensor: onnx.TensorProto) -> int:
    count = 1
    for extent in tensor.dims:
        count *= extent
    return count
