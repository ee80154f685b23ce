"""The function bodies of a bundle's graph, which run on machines without native kernels, and not in this run."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from exporter.describe import version
from exporter.gate.feeding import Run
from exporter.validation_report import Check
from graph_passes.ops import DOMAIN, OPS


def portable_bodies(run: Run) -> Iterator[Check]:
    """Where kernels stand for bodies nothing that is fed would show a wrong one: they are held against Cierzo's own."""
    session, manifest = run.session, run.session.manifest
    if not session.kernels or session.engine_name is not None:
        return
    graph = onnx.load(session.bundle.file(manifest.graph.file), load_external_data=False)
    name, wrong = "portable bodies", _other_bodies(graph)
    if wrong and manifest.cierzo_version != version("cierzo"):
        yield Check(name, None, f"those of Cierzo {manifest.cierzo_version} are not this version's")
        return
    what = "they are this version's, as the kernels are that ran in their place"
    yield Check(name, not wrong, f"the body of {', '.join(wrong[:3])} is not what Cierzo writes" if wrong else what)


def _other_bodies(model: onnx.ModelProto) -> list[str]:
    """Names of the functions in the file that are not those that the graph's nodes need."""
    present = {(body.domain, body.name): body for body in model.functions}
    due: dict[tuple[str, str], onnx.FunctionProto] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type in OPS:
            op = OPS[node.op_type]
            given = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            values = {name: given[name] for name in op.attributes if name in given}
            attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
            due |= {(body.domain, body.name): ir.to_proto(body) for body in op.functions(attributes)}
    return [
        name
        for (domain, name), body in sorted(due.items())
        if (domain, name) not in present or _bytes(present[domain, name]) != _bytes(body)
    ]


def _bytes(body: onnx.FunctionProto) -> bytes:
    content: bytes = body.SerializeToString(deterministic=True)
    return content
