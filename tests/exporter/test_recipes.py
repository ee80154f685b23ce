"""Recipes: what the nodes in front of a parameter compute, and that tools read the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.bundle_graph import BundleTensor
from exporter.recipe import Recipe, StoredPiece, with_equal_experts
from exporter.recipes import PARAMETER, bind_weights, first_readers, graft, parameters, referenced, value_of
from exporter.weights import WEIGHTS_FILE, plan_file, write_weights
from graph_passes.lower.formats import TYPES
from graph_passes.unbound import UnboundWeight
from reference.checkpoint import SINGLE_FILE, Checkpoint, open_checkpoint
from reference.weights import WeightSource, bind, load_parameter
from runtime.errors import TraceError
from tests.support.bundles import checkpoint
from tests.support.checkpoints import make_checkpoint
from tests.support.native import as_native

CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    # name: whether in Mistral's own layout, checkpoint
    "float32": (False, {}),
    "bfloat16, tied": (False, {"dtype": "bfloat16", "tie": True}),
    "float16, shards": (False, {"dtype": "float16", "shards": 3}),
    "an expert per tensor": (False, {"architecture": "mixtral", "dtype": "bfloat16"}),
    "stacked experts": (False, {"architecture": "mixtral", "expert_layout": "stacked"}),
    "native": (True, {}),
    "native, bfloat16": (True, {"dtype": "bfloat16"}),
    "native experts": (True, {"architecture": "mixtral", "dtype": "float16"}),
}


def opened_case(name: str, folder: Path) -> Checkpoint:
    native, settings = CASES[name]
    source = checkpoint(**settings)
    return open_checkpoint(as_native(source, folder / "native") if native else source)


def graph_with(shapes: dict[str, tuple[int, ...]], recipes: Sequence[Recipe]) -> ir.Model:
    """A model that gives out each of its unbound weights, widened to float32, under the name `NAME.out`.

    A weight has the type that its recipe gives, as lowering leaves it.
    """
    types = {recipe.parameter: TYPES[recipe.dtype] for recipe in recipes}
    nodes, values = [], []
    for name, shape in shapes.items():
        dtype = types.get(name, ir.DataType.FLOAT)
        weight = UnboundWeight(name, dtype, ir.Shape(shape))
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=weight)
        out = ir.Value(name=f"{name}.out", type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
        cast = [ir.AttrInt64("to", ir.DataType.FLOAT)]
        nodes.append(ir.Node("", "Cast", [value], cast, outputs=[out], name=f"read {name}"))
        values.append(value)
    graph = ir.Graph(
        [], [node.outputs[0] for node in nodes], nodes=nodes, opset_imports={"": 24}, name="weights",
        initializers=values,
    )  # fmt: skip
    return ir.Model(graph, ir_version=11)


def computed(model: ir.Model, folder: Path) -> dict[str, Any]:
    """What ONNX Runtime makes of every parameter of `graph_with`."""
    (folder / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {name.removesuffix(".out"): value for name, value in zip(names, session.run(names, {}), strict=True)}


def in_folder(model: ir.Model, folder: Path) -> None:
    """Let the graph's own tensors find their files."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            old = value.const_value
            value.const_value = BundleTensor(
                old.location, old.offset, old.length, old.dtype, shape=old.shape, name=old.name, base_dir=folder
            )


def check(opened: Checkpoint, model: ir.Model, folder: Path) -> None:
    sources = bind(opened)
    engine = computed(model, folder)
    in_folder(model, folder)
    held = parameters(model)
    assert held.keys() >= sources.keys()
    for name, source in sources.items():
        expected = load_parameter(opened, source, torch.float32).numpy()
        assert np.array_equal(engine[name], expected), name
        made = value_of(held[name])
        assert np.array_equal(made.astype(np.float32), expected), name
        assert held[name].dtype == ir.DataType.from_numpy(made.dtype), name


def bound(opened: Checkpoint, folder: Path) -> ir.Model:
    """The graph of all parameters, reading the checkpoint's files, which are linked into `folder`."""
    sources = {name: source for name, source in bind(opened).items() if isinstance(source, WeightSource)}
    files = sorted({entry.file for entry in opened.tensors.values()})
    for file in files:
        (folder / file.name).hardlink_to(file)
    recipes = referenced(opened, sources, {file: file.name for file in files})
    model = graph_with({name: source.shape for name, source in sources.items()}, recipes)
    bind_weights(model, recipes)
    return model


@pytest.mark.parametrize("name", CASES)
def test_an_engine_and_numpy_make_the_parameters(tmp_path: Path, name: str) -> None:
    check(opened_case(name, tmp_path), bound(opened_case(name, tmp_path), tmp_path), tmp_path)


@pytest.mark.parametrize(
    "name,ops",
    [
        ("float32", {}),
        ("bfloat16, tied", {"Cast": 5}),  # two norms a layer, and the last one
        ("native", {"Gather": 4}),
        ("native, bfloat16", {"Gather": 4, "Cast": 5}),
        ("an expert per tensor", {"Concat": 6, "Cast": 5}),
        ("stacked experts", {"Concat": 4}),  # gate and up lie in one tensor, an expert at a time
    ],
)
def test_only_the_nodes_that_it_takes(tmp_path: Path, name: str, ops: dict[str, int]) -> None:
    model = bound(opened_case(name, tmp_path), tmp_path)
    made = [node for node in model.graph if PARAMETER in node.metadata_props]
    assert {node.op_type: sum(n.op_type == node.op_type for n in made) for node in made} == ops
    names = [str(value.name) for node in model.graph for value in node.outputs] + list(model.graph.initializers)
    assert len(names) == len(set(names))
    orders = [name for name in model.graph.initializers if name.startswith("half_split_order")]
    assert len(orders) == (2 if ops.get("Gather") else 0), "queries of all layers share one, and keys"


def test_a_recipe_stands_right_before_its_first_reader(tmp_path: Path) -> None:
    model = bound(opened_case("an expert per tensor", tmp_path), tmp_path)
    nodes = list(model.graph)
    for place, node in enumerate(nodes):
        if PARAMETER in node.metadata_props:
            after = nodes[place + 1]
            assert any(value in after.inputs for value in node.outputs)


def test_pieces_of_several_types(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", num_layers=1, architecture="mixtral", dtype="bfloat16")
    tensors = load_file(folder / SINGLE_FILE)
    for expert, dtype in ((1, torch.float16), (2, torch.float32)):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"
        tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    opened = open_checkpoint(folder)
    check(opened, bound(opened, tmp_path), tmp_path)


@pytest.mark.parametrize("kind", ["stored", "fp32"])
def test_a_file_of_the_bundles_own(tmp_path: Path, kind: str) -> None:
    opened = opened_case("native, bfloat16", tmp_path)
    sources = bind(opened)
    planned = plan_file(opened, sources, kind)
    write_weights(opened, sources, planned, tmp_path / WEIGHTS_FILE)
    recipes = planned.recipes()
    model = graph_with({name: source.shape for name, source in sources.items()}, recipes)
    bind_weights(model, recipes)
    assert sum(PARAMETER in node.metadata_props for node in model.graph) == (5 if kind == "stored" else 0)
    assert sum(recipe.folded_bytes for recipe in recipes) == (
        sum(4 * math.prod(source.shape) for source in sources.values()) if kind == "stored" else 0
    )
    check(opened, model, tmp_path)


def test_a_grafted_recipe_computes_the_same(tmp_path: Path) -> None:
    opened = opened_case("native experts", tmp_path)
    sources = bind(opened)
    original = bound(opened, tmp_path)
    held = parameters(original)
    files = {entry.file: entry.file.name for entry in opened.tensors.values()}
    recipes = referenced(opened, {n: s for n, s in sources.items() if isinstance(s, WeightSource)}, files)
    model = graph_with({name: source.shape for name, source in sources.items()}, recipes)
    readers = first_readers(model, list(model.graph.initializers.values()))
    for name, value in list(model.graph.initializers.items()):
        graft(model, value, held[name], readers[value])
    check(opened, model, tmp_path)


def test_bytes_of_folding() -> None:
    def recipe(shape: tuple[int, ...], pieces: int, dtype: str, pairs: int | None = None) -> Recipe:
        nbytes = int(np.prod(shape)) // pieces * (4 if dtype == "F32" else 2)
        return Recipe("p", shape, tuple(StoredPiece("f", 0, nbytes, dtype) for _ in range(pieces)), pairs)

    def sizes(recipe: Recipe) -> tuple[int, ...]:
        return recipe.folded_bytes, recipe.folding_bytes, recipe.made_bytes, recipe.making_bytes

    plain = recipe((6, 4), 1, "F32")
    assert (plain.is_plain, *sizes(plain)) == (True, 0, 0, 0, 0)
    stored = recipe((6, 4), 1, "BF16")  # only function bodies widen it
    assert (stored.is_plain, *sizes(stored)) == (True, 96, 96, 0, 0)
    norm = recipe((24,), 1, "BF16")
    assert (norm.is_plain, *sizes(norm)) == (False, 96, 96, 96, 96)
    assert sizes(recipe((6, 4), 1, "BF16", pairs=2)) == (96, 48 + 96, 48, 48)
    assert sizes(recipe((6, 4), 2, "BF16", pairs=2)) == (96, 48 + 48 + 96, 48, 48 + 48)
    assert sizes(recipe((6, 4, 2), 6, "BF16")) == (192, 96 + 192 + 192, 96, 96)
    turned = "they are multiplied with turned around"
    assert sizes(recipe((6, 4, 2), 1, "F32")) == (0, 192, 0, 0), turned


def test_experts_of_several_types_are_widened_together() -> None:
    def recipe(name: str, dtype: str, *shape: int) -> Recipe:
        return Recipe(name, shape, (StoredPiece("f", 0, 1, dtype),))

    router, gate = recipe("layers.0.moe.router.weight", "BF16", 4, 2), recipe("layers.0.moe.gate_proj", "BF16", 4, 3, 2)
    down, other = recipe("layers.0.moe.down_proj", "F32", 4, 2, 3), recipe("layers.1.moe.gate_proj", "F16", 4, 3, 2)
    equal = with_equal_experts([router, gate, down, other])
    assert [(r.dtype, r.is_plain) for r in equal] == [("BF16", True), ("F32", False), ("F32", True), ("F16", True)]


def test_graph_and_files_must_name_the_same_parameters(tmp_path: Path) -> None:
    opened = opened_case("bfloat16, tied", tmp_path)
    sources = {name: source for name, source in bind(opened).items() if isinstance(source, WeightSource)}
    recipes = referenced(opened, sources, {entry.file: "f" for entry in opened.tensors.values()})
    shapes = {name: source.shape for name, source in sources.items()}
    short = dict(shapes)
    del short["norm.weight"]
    with pytest.raises(TraceError, match=r"1 differ: \['norm\.weight'\]"):
        bind_weights(graph_with(short, recipes), recipes)
    with pytest.raises(TraceError, match=r"1 differ: \['odd'\]"):
        bind_weights(graph_with(shapes | {"odd": (3,)}, recipes), recipes)
    with pytest.raises(TraceError, match=r"norm\.weight is \[31\] in the graph and \[32\] in the files"):
        bind_weights(graph_with(shapes | {"norm.weight": (31,)}, recipes), recipes)
    with pytest.raises(TraceError, match=r"embed_tokens\.weight is FLOAT in the graph and BF16 in the files"):
        bind_weights(graph_with(shapes, ()), recipes)
    unread = graph_with(shapes, recipes)
    node = next(node for node in unread.graph if node.name == "read norm.weight")
    unread.graph.outputs.remove(node.outputs[0])
    unread.graph.remove(node, safe=True)
    with pytest.raises(TraceError, match=r"parameter norm\.weight and no node that reads it"):
        bind_weights(unread, recipes)
    cut = [Recipe(r.parameter, r.shape, (StoredPiece("f", 0, r.pieces[0].nbytes - 2, "BF16"),)) for r in recipes]
    with pytest.raises(TraceError, match=r"elements and has [\d,]+ bytes of BF16"):
        bind_weights(graph_with(shapes, cut), cut)
