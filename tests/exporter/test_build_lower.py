"""The graph that an engine is built from: no weight in it, each described by an expression; and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

import exporter.build.lower
from exporter.build.lower import lower_for_engine
from exporter.bundle_graph import load_graph
from exporter.compile import export
from exporter.recipes import parameters, value_of
from graph_passes.lower.arithmetic import lower_arithmetic
from graph_passes.lower.bodies import refresh_bodies
from graph_passes.lower.packed_attention import pack_attention
from graph_passes.lower.products import merge_products
from runtime.bundle import read_bundle
from runtime.engine_info import INPUT, REFIT
from runtime.errors import BackendError, BundleError, FusionError
from runtime.weight_expression import pieces
from tests.support.bundles import Exported, checkpoint, exported, shared_traces
from tests.support.checkpoints import make_checkpoint
from tests.support.lowered import lowered_session
from tests.support.native import as_native
from tests.support.parity import Judge, random_rows

MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"dtype": "bfloat16"},
    "mixtral": {"architecture": "mixtral", "dtype": "bfloat16"},
    "tied": {"architecture": "qwen2", "dtype": "float16", "tie": True},
}


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_inputs_and_expressions_make_them(model: str) -> None:
    case = exported(**MODELS[model])
    bundle = read_bundle(case.bundle)
    graph = lower_for_engine(bundle, "float32", "float32")
    proto = onnx.load_from_string(graph.onnx)
    large = [t.name for t in proto.graph.initializer if int(np.prod(t.dims)) > 64]
    assert not large
    manifest = bundle.manifest
    own = {manifest.graph.input_ids, manifest.graph.start_positions, manifest.graph.token_counts}
    own |= {manifest.graph.logit_positions}
    own |= {name for layer in manifest.kv.layers for name in (layer.past_key, layer.past_value)}
    assert {value.name for value in proto.graph.input} - own == {weight.name for weight in graph.weights}
    assert {weight.role for weight in graph.weights} == {INPUT}
    stored = parameters(load_graph(bundle))
    whole = {name: value_of(value).astype(np.float32) for name, value in stored.items()}
    assert (
        sum(int(np.prod(weight.shape)) for weight in graph.weights)
        >= sum(
            array.size
            for name, array in whole.items()
            if name != "rotary.inverse_frequency_d" and array.dtype.kind == "f"
        )
        - 64 * 16
    )
    for weight in graph.weights:
        data = np.concatenate(list(pieces(weight.expression, bundle.file, graph.orders)))
        parts = list(_parts(weight.name))
        want = np.concatenate([whole[name].reshape(-1) for name in parts])
        if weight.dtype == "F32":
            np.testing.assert_array_equal(data.view(np.float32), want)
        else:
            assert data.size == want.size * 2


def _parts(name: str) -> Iterator[str]:
    head, _, last = name.rpartition(".")
    if "+" not in name:
        yield name.removesuffix(".f32")
        return
    before, _, joined = head.rpartition(".")
    for part in joined.split("+"):
        yield f"{before}.{part}.{last}"


def test_rows_in_another_order(tmp_path: Path) -> None:
    """The pairs of a native checkpoint lie side by side, where the graph wants halves."""
    twin = checkpoint(dtype="bfloat16")
    with shared_traces():
        bundle = export(as_native(twin, tmp_path / "native"), tmp_path / "bundle", chunk=4, prove=False)
    graph = lower_for_engine(read_bundle(bundle), "float16", "float16")
    assert {len(order) for order in graph.orders.values()} == {16, 32}
    case = Exported(twin, bundle)
    judge = Judge(case, arithmetic="float16")
    judge.hold(lowered_session(case, "float16"), random_rows([19, 7], judge.vocab_size, seed=3), seed=4)


def test_int4_weights_are_filled_into_every_plan_and_int8_is_read_by_all() -> None:
    for kind, dtype, role in (("int4", "I4", REFIT), ("int8", "I8", INPUT)):
        case = exported(dtype="bfloat16", options={"weights": kind, "keep": ("lm_head",), "block_size": 16})
        graph = lower_for_engine(read_bundle(case.bundle), "float16", "float16")
        packed = [weight for weight in graph.weights if weight.dtype == dtype]
        assert len(packed) == 2 * 4
        assert {weight.role for weight in packed} == {role}
        scales = [weight for weight in graph.weights if weight.name.endswith(".scale")]
        assert {(weight.dtype, weight.role) for weight in scales} == {("F16", role)}


@pytest.mark.parametrize("model", [("mistral", "silu"), ("mixtral", "silu"), ("mixtral", "relu")], ids=str)
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_quantised_graphs_past_the_window(model: tuple[str, str], kind: str) -> None:
    options = {"weights": kind, "block_size": 16}
    architecture, activation = model
    case = exported(dtype="bfloat16", architecture=architecture, activation=activation, options=options)
    judge = Judge(case, arithmetic="float16")
    judge.hold(lowered_session(case, "float16"), random_rows([19, 7, 5], judge.vocab_size, seed=3), seed=4)


def test_refusals() -> None:
    plain = read_bundle(exported(dtype="bfloat16").bundle)
    with pytest.raises(BackendError, match="computes in float32, bfloat16, float16"):
        lower_for_engine(plain, "float64", "float32")
    int4 = read_bundle(exported(dtype="bfloat16", options={"weights": "int4", "block_size": 16}).bundle)
    with pytest.raises(BackendError, match=r"float16 scales.*not in bfloat16"):
        lower_for_engine(int4, "bfloat16", "bfloat16")
    int8_rings = read_bundle(exported(dtype="bfloat16", options={"kv": "int8"}).bundle)
    with pytest.raises(BackendError, match=r"int8 KV buffers.*--kv float16"):
        lower_for_engine(int8_rings, "float16", "float16")
    options = {"weights": "int4", "block_size": 16, "zero_points": True, "keep": ("attention", "lm_head")}
    for architecture in ("mistral", "mixtral"):
        points = read_bundle(exported(architecture=architecture, dtype="bfloat16", options=options).bundle)
        with pytest.raises(FusionError, match="zero points"):
            lower_for_engine(points, "float16", "float16")


def test_weights_outside_the_bundle_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(exported(dtype="bfloat16").bundle)
    model = load_graph(bundle)
    for value in model.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                "../other", tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=str(tensor.name)
            )
    monkeypatch.setattr(exporter.build.lower, "load_graph", lambda _: model)
    with pytest.raises(BundleError, match=r"from '../other', which is no file of the bundle"):
        lower_for_engine(bundle, "float32", "float32")


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "ministral3"])
def test_attention_reads_narrow_heads_wide_angles_and_rings_of_their_own_type(architecture: str) -> None:
    """Also behind a bias, and where queries are scaled; a body would take other types as well, a plugin does not."""
    case = exported(architecture=architecture, dtype="bfloat16")
    proto = onnx.load_from_string(lower_for_engine(read_bundle(case.bundle), "float16", "bfloat16").onnx)
    onnx.checker.check_model(proto, full_check=True)
    graph = proto.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    narrow, wide, ring = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    attention = [node for node in graph.node if "RollingAttention" in node.op_type]
    assert len(attention) == 2
    for node in attention:
        heads = [narrow] * (len(node.input) - 6)
        assert [types[name] for name in node.input[:-2]] == [*heads, wide, wide, ring, ring]
        assert [types[name] for name in node.output] == [narrow, ring, ring]


def test_experts_are_read_in_the_arithmetic_and_the_router_is_wide() -> None:
    graph = lower_for_engine(read_bundle(exported(**MODELS["mixtral"]).bundle), "float16", "float16")
    types = {weight.name.split(".moe.")[1]: weight.dtype for weight in graph.weights if ".moe." in weight.name}
    assert types == {"router.weight": "F32", "gate_proj": "F16", "up_proj": "F16", "down_proj": "F16"}


def test_products_of_other_bits_stay_apart() -> None:
    options = {"weights": "int4", "block_size": 16, "keep": ("*.k_proj.weight=int8", "lm_head")}
    graph = lower_for_engine(read_bundle(exported(dtype="bfloat16", options=options).bundle), "float16", "float16")
    first = [weight for weight in graph.weights if weight.name.startswith("layers.0.self_attn.")]
    assert {(weight.name.split(".")[3], weight.dtype) for weight in first if weight.name.endswith(".packed")} == {
        ("q_proj+v_proj", "I4"), ("k_proj", "I8"), ("o_proj", "I4"),
    }  # fmt: skip


def test_weights_that_the_arithmetic_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "large", dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = -1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with shared_traces():
        bundle = read_bundle(export(source, tmp_path / "bundle", chunk=4, prove=False))
    with pytest.raises(BundleError, match=r"number -9.*infinite in float16.*--arithmetic"):
        lower_for_engine(bundle, "float16", "float16")
    assert lower_for_engine(bundle, "bfloat16", "bfloat16").weights


def merged(**settings: Any) -> ir.Model:
    model = load_graph(read_bundle(exported(**settings).bundle))
    lower_arithmetic(model, "float32", "float32")
    merge_products(model)
    return model


def attention(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if "RollingAttention" in node.op_type]


def test_attention_reads_the_product_whole() -> None:
    model = merged(dtype="bfloat16")
    assert pack_attention(model) == 2
    assert attention(model) == ["PackedRollingAttention"] * 2


def test_attention_behind_a_bias_stays() -> None:
    model = merged(architecture="qwen2", dtype="float16", tie=True)
    assert pack_attention(model) == 0
    assert attention(model) == ["RollingAttention"] * 2


def _another_reader(model: ir.Model, node: ir.Node) -> None:
    part = _reshape(node, 0).inputs[0]
    assert part is not None
    extra = ir.Node("", "Identity", [part], outputs=[ir.Value(name="extra", type=part.type, shape=part.shape)])
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])


def _key_and_value_changed_places(model: ir.Model, node: ir.Node) -> None:
    key, value = node.inputs[1], node.inputs[2]
    node.replace_input_with(1, value)
    node.replace_input_with(2, key)


def _heads_spelled_out(model: ir.Model, node: ir.Node) -> None:
    shape = _reshape(node, 0).inputs[1]
    assert shape is not None
    maker = shape.producer()
    assert maker is not None
    tensor = ir.tensor(np.array([4], np.int64), name="four")
    four = ir.Value(name="four", type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]), const_value=tensor)
    model.graph.register_initializer(four)
    maker.replace_input_with(2, four)


def _query_turned_before(model: ir.Model, node: ir.Node) -> None:
    query = node.inputs[0]
    assert query is not None
    turned = ir.Node("", "Neg", [query], outputs=[ir.Value(name="turned", type=query.type, shape=query.shape)])
    model.graph.insert_before(node, turned)
    node.replace_input_with(0, turned.outputs[0])


def _reshape(node: ir.Node, index: int) -> ir.Node:
    value = node.inputs[index]
    assert value is not None
    made = value.producer()
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("change", "others"),
    [
        (_another_reader, 1),
        (_key_and_value_changed_places, 1),
        (_heads_spelled_out, 0),  # one shape serves all layers
        (_query_turned_before, 1),
    ],
)
def test_attention_that_does_not_read_one_product_in_order_stays(
    change: Callable[[ir.Model, ir.Node], None], others: int
) -> None:
    model = merged(dtype="bfloat16")
    change(model, next(node for node in model.graph if node.op_type == "RollingAttention"))
    assert pack_attention(model) == others
    assert attention(model)[0] == "RollingAttention"


def test_a_bundle_with_the_bodies_of_an_earlier_version_gets_those_of_this_one() -> None:
    model = load_graph(read_bundle(exported(dtype="bfloat16").bundle))
    old = next(function for function in model.functions.values() if function.name == "RollingAttention")
    for node in old:
        node.doc_string = "as it was"
    before = len(model.functions)
    refresh_bodies(model)
    assert len(model.functions) == before
    new = model.functions[old.identifier()]
    assert all(node.doc_string is None for node in new)


def test_a_node_of_another_version_is_refused() -> None:
    for change in ("op", "attribute"):
        model = load_graph(read_bundle(exported(dtype="bfloat16").bundle))
        node = next(node for node in model.graph if node.op_type == "RollingAttention")
        if change == "op":
            node.op_type = "RollingAttentionOfTomorrow"
        else:
            node.attributes.pop("rounds")
        with pytest.raises(FusionError, match=r"does not know RollingAttention.*Export the checkpoint again"):
            refresh_bodies(model)
