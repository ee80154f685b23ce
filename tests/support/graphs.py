"""Small graphs as ONNX text, run in plain ONNX Runtime, and read back as statements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from graph_passes.canonical import canonicalise
from graph_passes.unbound import UnboundWeight, is_unbound

Arrays = dict[str, npt.NDArray[Any]]

_HEADER = '<ir_version: 11, opset_import: ["" : 24]>\n'


def parse(text: str) -> ir.Model:
    """A graph `name (inputs) => (outputs) { statements }` as a model of opset 24."""
    return ir.from_onnx_text(_HEADER + text)


def unbind(model: ir.Model, *weights: str) -> ir.Model:
    """Make the graph inputs of these names weights without data, in place, as a tracer leaves its parameters."""
    for value in [value for value in model.graph.inputs if value.name in weights]:
        assert value.shape is not None
        model.graph.inputs.remove(value)
        value.const_value = UnboundWeight(str(value.name), ir.DataType.FLOAT, value.shape)
        model.graph.register_initializer(value)
    return model


def canonical(text: str, *weights: str) -> ir.Model:
    """The graph as the matchers see it. weights: inputs that are parameters, see `unbind`."""
    model = unbind(parse(text), *weights)
    canonicalise(model)
    return model


def mutate(text: str, *replacements: tuple[str, str]) -> str:
    """`text` with each old part, which must be there exactly once, replaced by the new one."""
    for old, new in replacements:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    return text


def serialised(model: ir.Model) -> str:
    """All that a model holds, weights without data by name and shape; equal texts are equal models."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if is_unbound(value):
            value.const_value = ir.tensor(np.zeros(0, np.float32), name=value.name)
    return str(ir.to_proto(copy))


def statements(model: ir.Model) -> list[str]:
    """The top-level nodes as `outputs = Op(inputs)`, plugin ops with their domain; constants by their value."""

    def shown(value: ir.Value | None) -> str:
        if value is None:
            return "_"
        if value.const_value is None or is_unbound(value):
            return str(value.name)
        return str(np.asarray(value.const_value.numpy()).tolist())

    return [
        f"{', '.join(str(v.name) for v in node.outputs)} = {node.domain + '.' if node.domain else ''}{node.op_type}"
        f"({', '.join(shown(v) for v in node.inputs)})"
        for node in model.graph
    ]


def op_types(model: ir.Model) -> list[str]:
    """Operator of each top-level node, in order."""
    return [node.op_type for node in model.graph]


def bind(model: ir.Model, seed: int = 0) -> ir.Model:
    """A copy whose weights without data have random values, the same for the same seed and names."""
    copy = model.clone()
    for name, value in copy.graph.initializers.items():
        if isinstance(value.const_value, UnboundWeight):
            shape = tuple(value.const_value.shape.numpy())
            rng = np.random.default_rng([seed, *name.encode()])
            # Norm weights about one; the others such that scores spread over a few units.
            data = 1 + 0.2 * rng.standard_normal(shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.5
            value.const_value = ir.tensor(data.astype(np.float32), name=name)
    return copy


def run(model: ir.Model, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Outputs by name from `onnxruntime.InferenceSession`, as any user of the file would run it."""
    proto = ir.to_proto(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in proto.graph.output]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def check(model: ir.Model) -> None:
    """Hold the model against ONNX's own checker, shapes included."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def assert_same_outputs(before: ir.Model, after: ir.Model, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
    """The same output names in the same order, and the same numbers up to a few float32 roundings."""
    old, new = run(before, feeds), run(after, feeds)
    assert list(old) == list(new)
    for name in old:
        assert old[name].dtype == new[name].dtype
        np.testing.assert_allclose(new[name], old[name], rtol=1e-5, atol=1e-5, err_msg=name)
