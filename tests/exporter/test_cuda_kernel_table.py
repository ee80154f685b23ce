"""The table of the CUDA provider's kernels says what the real provider does, node by node and type by type."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from exporter.build.cuda_provider import CUDA, KERNELS, MICROSOFT
from tests.support.cuda_graphs import INT32, INT64
from tests.support.onnxruntime_gpu import Placement, place_all

Op = tuple[str, str]
EXPERTS = {"k": 2, "activation_type": "swiglu", "swiglu_fusion": 2, "normalize_routing_weights": 1}


UNARY = "Abs Neg Not Floor IsNaN IsInf Cos Sin Exp Erf Sqrt Tanh Sigmoid Relu Softplus Gelu Reciprocal Log"
BINARY = "Add Sub Mul Div Max Min Equal Less LessOrEqual Greater GreaterOrEqual And Or Pow"
_LIKE = {("Where", 2): 1, ("Slice", 2): 1, ("Slice", 3): 1, ("Slice", 4): 1}
"""The input that another one, of which the table does not speak, is like, where that is not input 0."""


@dataclass(frozen=True, slots=True)
class Example:
    """Inputs of a node by their dims, None where it has none; types: of those that the table does not speak of and
    that are not like input 0. constants: inputs that the kernel takes as initializers alone."""

    inputs: Sequence[Sequence[int] | None]
    types: Mapping[int, int] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: Sequence[int] = ()
    outputs: int = 1


def examples() -> dict[Op, Example]:
    """One for each op of the table."""
    one, two = Example([[4, 8]]), Example([[4, 8], [4, 8]])
    found: dict[Op, Example] = {}
    for op in UNARY.split():
        found["", op] = one
    found |= {("", op): one for op in ("Identity", "Transpose", "Shape")}
    for op in BINARY.split():
        found["", op] = two
    attended = [[1, 3, 32], [1, 6, 16], [1, 6, 16], None, None, None, [1]]
    routed, heads = [[3, 64], [3, 4]], {"num_heads": 4, "kv_num_heads": 2}
    paged = [[6, 64], [6, 32], [6, 32], [2, 256, 2, 16], [2, 256, 2, 16], [3], [2], [2, 1], *[None] * 8, [2]]
    int8 = {1: INT64}
    return found | {
        ("", "MatMul"): Example([[4, 8], [8, 4]]),
        ("", "Gemm"): Example([[4, 8], [8, 4]]),
        ("", "Mod"): Example([[4, 8], [4, 8]], attributes={"fmod": 1}),
        ("", "Where"): Example([[4], [4], [4]]),
        ("", "Cast"): Example([[4]], attributes={"to": INT32}),
        ("", "Concat"): Example([[4], [4]], attributes={"axis": 0}),
        ("", "Gather"): Example([[4, 8], [3]]),
        ("", "GatherElements"): Example([[4, 8], [2, 8]]),
        ("", "GatherND"): Example([[4, 8], [3, 1]]),
        ("", "ScatterElements"): Example([[4, 8], [2, 8], [2, 8]]),
        ("", "TensorScatter"): Example([[1, 6, 4], [1, 2, 4], [1]], {2: INT64}, {"axis": 1, "mode": "circular"}),
        ("", "Reshape"): Example([[4, 8], [2]], int8),
        ("", "Expand"): Example([[4, 8], [3]], int8),
        ("", "Squeeze"): Example([[4, 1], [1]], int8),
        ("", "Unsqueeze"): Example([[4, 8], [1]], int8),
        ("", "Split"): Example([[4, 8], [2]], int8, outputs=2),
        ("", "ConstantOfShape"): Example([[2]]),
        ("", "Slice"): Example([[4, 8], [1], [1], [1], [1]]),
        ("", "Range"): Example([[], [], []]),
        ("", "CumSum"): Example([[4, 8], []]),
        ("", "TopK"): Example([[4, 8], [1]], int8, outputs=2),
        ("", "RMSNormalization"): Example([[4, 8], [8]]),
        ("", "SimplifiedLayerNormalization"): Example([[4, 8], [8]]),
        ("", "RotaryEmbedding"): Example([[2, 3, 32], [2, 3, 4], [2, 3, 4]], attributes={"num_heads": 4}),
        ("", "Attention"): Example(attended, {6: INT64}, {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1}),
        (MICROSOFT, "QuickGelu"): one,
        (MICROSOFT, "ScaledSiLU"): one,
        (MICROSOFT, "FusedMatMul"): Example([[4, 8], [4, 8]], attributes={"transB": 1}),
        (MICROSOFT, "SkipSimplifiedLayerNormalization"): Example([[4, 8], [4, 8], [8]]),
        (MICROSOFT, "MatMulNBits"): Example(
            [[3, 64], [8, 2, 16], [8, 2]], attributes={"K": 64, "N": 8, "bits": 4, "block_size": 32}
        ),
        (MICROSOFT, "MoE"): Example([*routed, [4, 256, 64], None, [4, 64, 128]], attributes=EXPERTS),
        (MICROSOFT, "QMoE"): Example(
            [*routed, [4, 256, 32], [4, 256, 2], None, [4, 64, 64], [4, 64, 4]],
            {5: onnx.TensorProto.UINT8},
            {**EXPERTS, "expert_weight_bits": 4, "block_size": 32, "weights_prepacked": 0},
            constants=(2, 3, 5, 6),
        ),
        (MICROSOFT, "PagedAttention"): Example(
            paged, {6: INT32, 7: INT32, 16: INT32}, {**heads, "local_window_size": 8}, outputs=3
        ),
    }


def types_of(op: Op, example: Example) -> Iterator[tuple[int, ...]]:
    """Types of all inputs, for each combination that the table allows, if floats of a node are all of one type."""
    listed = KERNELS[op].inputs
    indices = sorted(listed)
    for chosen in itertools.product(*(sorted(listed[index]) for index in indices)):
        if len({dtype for dtype in chosen if dtype.is_floating_point()}) <= 1:
            known = {**{index: int(dtype) for index, dtype in zip(indices, chosen, strict=True)}, **example.types}
            yield tuple(known.get(index, known[_LIKE.get((op[1], index), 0)]) for index in range(len(example.inputs)))


def graph_of(op: Op, example: Example, types: Sequence[int]) -> bytes:
    """The node, and before each of its inputs one that leaves its output on the device."""
    inputs, nodes, weights, read = [], [], [], []
    for index, (dims, dtype) in enumerate(zip(example.inputs, types, strict=True)):
        if dims is None:
            read.append("")
        elif index in example.constants:
            content = np.zeros(dims, helper.tensor_dtype_to_np_dtype(dtype)).tobytes()
            weights.append(helper.make_tensor(f"made{index}", dtype, dims, content, raw=True))
            read.append(f"made{index}")
        else:
            inputs.append(helper.make_tensor_value_info(f"in{index}", dtype, dims))
            nodes.append(helper.make_node("Identity", [f"in{index}"], [f"made{index}"]))
            read.append(f"made{index}")
    written = [f"out{index}" for index in range(example.outputs)]
    nodes.append(helper.make_node(op[1], read, written, domain=op[0], **example.attributes))
    outputs = [onnx.ValueInfoProto(name=name) for name in written]
    graph = helper.make_graph(nodes, "example", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(MICROSOFT, 1)]
    serialized: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return serialized


def wrong(op: Op, placement: Placement) -> str | None:
    """What is otherwise than the table says."""
    if placement.error is not None:
        return placement.error
    if (places := [place for place, ops in placement.assigned.items() if op[1] in ops]) != [CUDA]:
        return f"runs on {places}"
    moved = placement.executed.get("MemcpyToHost", 0)
    expected = len([index for index in KERNELS[op].host_inputs if index < len(examples()[op].inputs)])
    return None if moved == expected else f"wants {moved} inputs on the host, and not {expected}"


def test_there_is_an_example_of_every_op() -> None:
    assert set(examples()) == set(KERNELS)


def test_the_provider_has_the_kernels_of_the_table() -> None:
    cases = [(op, types) for op, example in examples().items() for types in types_of(op, example)]
    placements = place_all([graph_of(op, examples()[op], types) for op, types in cases], optimized=False)
    found = {
        f"{op[1]} {[ir.DataType(dtype).name for dtype in types]}": said
        for (op, types), placement in zip(cases, placements, strict=True)
        if (said := wrong(op, placement)) is not None
    }
    assert found == {}
    for op, kernel in KERNELS.items():
        for index, listed in kernel.inputs.items():
            if index < len(examples()[op].inputs):
                seen = {types[index] for of, types in cases if of == op}
                assert seen == {int(dtype) for dtype in listed}, f"{op} takes {listed} as input {index}"


def test_what_reads_a_shape_takes_it_from_the_host() -> None:
    """So that a shape, which the provider leaves there, is not copied back and forth."""
    graph = (
        '<ir_version: 11, opset_import: ["" : 24]>'
        "step (float[a, b] x, float[c] y) => (float[a, b] z) { s = Shape(x)\n z = Reshape(y, s) }"
    )
    placement = place_all([onnx.parser.parse_model(graph).SerializeToString()], optimized=False)[0]
    assert placement.executed == {"Shape": 1, "Reshape": 1}
    assert placement.assigned == {CUDA: {"Shape": 1, "Reshape": 1}}
    assert KERNELS["", "Shape"].host_outputs == {0}
    assert KERNELS["", "Reshape"].host_inputs == {1}
