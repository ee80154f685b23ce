"""The second front end beside its numbers: names, scopes, forms, what it records, and what it refuses.

tests/parity/test_frontends.py has the numbers.
"""

from __future__ import annotations

import ast
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from click.testing import CliRunner

import exporter.frontends.transformers_model
from exporter import export
from exporter.cli import cli
from exporter.frontends import open_frontend, without_ignored
from exporter.frontends.transformers_graph import flatten_products, our_name
from exporter.frontends.transformers_model import make_template
from exporter.plan import ExportPlan, make_plan
from exporter.trace import INVERSE_FREQUENCIES
from graph_passes.graph import constant
from graph_passes.unbound import UnboundWeight, is_unbound
from reference.checkpoint import open_checkpoint
from reference.rope import inverse_frequencies
from reference.weights import parameter_shapes
from runtime.errors import ConfigError, ExportError, TraceError
from tests.support.bundles import checkpoint, shared_traces, trace_once
from tests.support.checkpoints import make_checkpoint
from tests.support.graphs import Arrays, bind, op_types, parse, run
from tests.support.twins import make_twin, shrunk
from tests.support.twins import published as of_published

LINEAR: dict[str, Any] = {"rope": {"rope_type": "linear", "factor": 2.0}, "head_dim": 12, "tie": True}


def published(source: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return config


def plan_of(source: Path) -> ExportPlan:
    return make_plan(open_checkpoint(source).config, chunk=4, context=40)


def template_of(attention: str = "sdpa", **settings: Any) -> tuple[ExportPlan, ir.Model]:
    """The raw template of a checkpoint, traced once."""
    source = checkpoint(**settings)
    return plan_of(source), trace_once(
        plan_of(source), open_frontend("transformers", attention, open_checkpoint(source))
    )


def scopes_of(model: ir.Model) -> set[str]:
    texts = [node.metadata_props.get("pkg.torch.onnx.name_scopes") for node in model.graph]
    return {scope for text in texts if text for scope in ast.literal_eval(text)[:-1]}


NAMES = {
    "decoder": "",
    "decoder.model": "",
    "decoder.lm_head.weight": "lm_head.weight",
    "decoder.model.embed_tokens.weight": "embed_tokens.weight",
    "decoder.model.norm": "norm",
    "decoder.model.rotary_emb": "rotary",
    "decoder.model.rotary_emb.inv_freq": INVERSE_FREQUENCIES,
    "decoder.model.layers.10.self_attn.q_proj.weight": "layers.10.self_attn.q_proj.weight",
    "decoder.model.layers.0": "layers.0",
    "_empty_nn_module_stack_from_metadata_hook": "_empty_nn_module_stack_from_metadata_hook",
}


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_names_become_ours(name: str, experts: bool) -> None:
    assert our_name(name, experts=experts) == NAMES[name]


def test_names_of_feed_forward_layers_depend_on_what_they_are() -> None:
    dense = "layers.1.mlp.gate_proj.weight"
    assert our_name(f"decoder.model.{dense}", experts=False) == dense
    ours = {"mlp": "moe", "mlp.gate.weight": "moe.router.weight", "mlp.gate": "moe.router", "mlp.experts": "moe"}
    ours["mlp.experts.down_proj"] = "moe.down_proj"
    for theirs, name in ours.items():
        assert our_name(f"decoder.model.layers.1.{theirs}", experts=True) == f"layers.1.{name}"


@pytest.mark.parametrize(
    "settings",
    [LINEAR, {"architecture": "mixtral"}],
    ids=["dense, tied", "mixtral"],
)
def test_the_template_has_the_form_that_the_later_stages_know(settings: dict[str, Any]) -> None:
    plan, model = template_of(**settings)
    weights = {
        name: tuple(value.const_value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, UnboundWeight)
    }
    assert weights == parameter_shapes(plan.template)
    assert all(value.is_initializer() and value.name == name for name, value in model.graph.initializers.items())

    dims = {str(d) for node in model.graph for v in node.outputs for d in v.shape or () if not isinstance(d, int)}
    assert dims - {"2*B*T"} == {"B", "T", "B*T", "R", "B*R", "S0"}

    parents = {name.rpartition(".")[0] for name in weights if name.endswith(".weight")}
    assert parents <= scopes_of(model)
    known = (*parents, "layers.0", "lm_head", "rotary", "_empty")
    assert all(scope.startswith(known) for scope in scopes_of(model) - {""})

    turned = [n for n in model.graph if n.op_type == "MatMul" and any(map(is_unbound, by_transpose(n)))]
    assert turned == []
    products = [n for n in model.graph if n.op_type == "Gemm" and is_unbound(n.inputs[1])]
    assert len(products) == 5 + (1 if plan.config.moe else 3)


def by_transpose(node: ir.Node) -> list[ir.Value | None]:
    """What a product's operands are turned from; experts' stacks, which have three axes, are the matcher's matter."""
    makers = [value.producer() for value in node.inputs if value is not None and len(value.shape or ()) != 3]
    return [maker.inputs[0] for maker in makers if maker is not None and maker.op_type == "Transpose"]


def test_scopes_are_those_of_the_reference_and_of_what_is_a_module_in_transformers_only() -> None:
    plan, model = template_of(**LINEAR)
    by_reference = scopes_of(trace_once(plan))
    assert by_reference < scopes_of(model)
    assert scopes_of(model) - by_reference == {"layers.0.self_attn", "layers.0.mlp.act_fn"}


def test_frequencies_are_the_ones_of_transformers() -> None:
    plan, model = template_of(**LINEAR)
    config = transformers.MistralConfig.from_pretrained(checkpoint(**LINEAR))
    theirs = transformers.models.mistral.modeling_mistral.MistralRotaryEmbedding(config).inv_freq
    held = constant(model.graph.initializers[INVERSE_FREQUENCIES])
    assert held is not None
    assert held.tobytes() == theirs.numpy().tobytes()
    assert held.tobytes() == inverse_frequencies(plan.config.rope, 12).numpy().tobytes()


def test_both_generations_of_config_json_are_one_template() -> None:
    new, old = (checkpoint(**LINEAR, generation=generation) for generation in ("new", "old"))
    assert published(new).keys() != published(old).keys()
    given = published(old)
    templates = [make_template(plan_of(new), published(new), "eager"), make_template(plan_of(old), given, "eager")]
    assert given == published(old), "the classes of transformers write into what they are given"
    models: list[Any] = [template.model for template in templates]
    configs = [model.config.to_dict() for model in models]
    assert configs[1]["rope_parameters"].pop("type") == "linear"
    assert configs[0] == configs[1]
    assert configs[0]["rope_parameters"] == LINEAR["rope"] | {"rope_theta": 10_000.0}


def test_the_command_takes_both_options_and_records_them(tmp_path: Path) -> None:
    arguments = ["export", str(checkpoint(**LINEAR)), str(tmp_path / "bundle"), "--chunk", "4", "--json", "--no-prove"]
    with shared_traces():
        result = CliRunner().invoke(cli, [*arguments, "--frontend", "transformers", "--attention", "sdpa"])
    assert result.exit_code == 0, result.output
    provenance = json.loads((tmp_path / "bundle" / "manifest.json").read_text(encoding="utf-8"))["provenance"]
    assert provenance["options"].items() >= {"frontend": "transformers", "attention": "sdpa"}.items()
    assert provenance["versions"]["transformers"] == transformers.__version__


def test_what_transformers_thinks_of_a_config_is_not_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    """It says each sentence once in a process; another factor is another sentence."""
    source = checkpoint()
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        transformers.MistralConfig(max_position_embeddings=512, rope_parameters=rope | {"factor": 4.5})
        assert "4.5)" in caplog.text
        make_template(plan_of(source), published(source) | {"rope_parameters": rope | {"factor": 5.5}}, "sdpa")
        assert "5.5)" not in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


PRODUCT = """g (int64[B,T] input_ids, float[B,T,6] x) => (float[B,T,5] y, float[B,T,3] z) {
  wt = Transpose <perm = [1, 0]> (w)
  y = MatMul (x, wt)
  ut = Transpose <perm = [1, 0]> (u)
  flat = MatMul (x, ut)
  z = Identity (flat)
}"""


def with_weights(text: str) -> ir.Model:
    model = parse(text)
    inferred: dict[str, list[int | str]] = {"wt": [6, 5], "ut": [6, 3], "y": ["B", "T", 5], "flat": ["B", "T", 3]}
    for node in model.graph:
        for value in node.outputs:
            if str(value.name) in inferred:
                value.shape = ir.Shape(inferred[str(value.name)])
    for name, rows in (("w", 5), ("u", 3)):
        weight = UnboundWeight(name, ir.DataType.FLOAT, ir.Shape([rows, 6]))
        value = ir.Value(name=name, type=ir.TensorType(weight.dtype), shape=weight.shape, const_value=weight)
        for node in model.graph:
            for index, given in enumerate(node.inputs):
                if given is not None and given.name == name:
                    node.replace_input_with(index, value)
        model.graph.register_initializer(value)
    return model


def test_products_with_three_axes_become_gemms_and_stay_the_same_function() -> None:
    before, after = with_weights(PRODUCT), with_weights(PRODUCT)
    flatten_products(after)
    assert op_types(before).count("MatMul") == 2
    assert [op for op in op_types(after) if op in ("MatMul", "Gemm")] == ["Gemm", "Gemm"]
    x_BTC = np.random.default_rng(0).standard_normal((2, 3, 6), np.float32)
    feeds: Arrays = {"input_ids": np.zeros((2, 3), np.int64), "x": x_BTC}
    old, new = run(bind(before), feeds), run(bind(after), feeds)
    for name in ("y", "z"):
        assert old[name].shape == new[name].shape
        np.testing.assert_allclose(new[name], old[name], rtol=1e-6, atol=1e-6)


def test_a_product_of_another_shape_is_refused() -> None:
    model = with_weights(PRODUCT.replace("float[B,T,6] x", "float[T,B,6] x"))
    with pytest.raises(TraceError, match=r"w multiplies 'x' of shape \[T,B,6\], where \[B, T, C\] is expected"):
        flatten_products(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frontend": "jax"}, r"frontend = 'jax' is not one that this version has \(reference, transformers\)"),
        ({"frontend": "transformers", "attention": "flash"}, r"'flash' is not one .* traces \(sdpa, eager\)"),
        ({"attention": "eager"}, r"attention = 'eager' chooses between .* or choose the front end 'transformers'"),
        ({"frontend": "reference", "attention": "sdpa"}, "'reference' has one of its own"),
    ],
)
def test_contradicting_options_are_refused(tmp_path: Path, options: dict[str, str], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        export(checkpoint(), tmp_path / "bundle", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_way_to_install_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExportError, match=r"pip install 'cierzo\[transformers\]'"):
        export(checkpoint(), tmp_path / "bundle", frontend="transformers")
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_the_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint()
    classes = {"mistral": ("MistralConfig", "MistralForNothing")}
    monkeypatch.setattr(exporter.frontends.transformers_model, "MODEL_CLASSES", classes)
    with pytest.raises(ExportError, match=rf"transformers {transformers.__version__} has no MistralForNothing"):
        make_template(plan_of(source), published(source), "sdpa")
    monkeypatch.setattr(exporter.frontends.transformers_model, "MODEL_CLASSES", {})
    with pytest.raises(ExportError, match="this is mistral"):
        make_template(plan_of(source), published(source), "sdpa")


@pytest.mark.parametrize(
    ("architecture", "windows", "words"),
    [
        ("mistral", (5, None), r"windows 5, None .* MistralForCausalLM of transformers has one .* for all layers\."),
        ("mixtral", (5, 6), "MixtralForCausalLM"),
        ("ministral", (5, None, 6), "for all layers that slide"),
    ],
)
def test_windows_that_the_class_cannot_have_are_refused(
    architecture: str, windows: tuple[int | None, ...], words: str
) -> None:
    source = checkpoint(architecture=architecture)
    config = replace(open_checkpoint(source).config, layer_windows=windows, num_layers=len(windows))
    with pytest.raises(ExportError, match=words):
        make_template(make_plan(config), published(source), "sdpa")


def test_a_config_that_transformers_does_not_take_is_refused() -> None:
    """JSON's 1 is 1.0 for Cierzo; the package's own check of types is stricter."""
    source = checkpoint()
    with pytest.raises(ExportError, match=r"does not take this config.json: .* 'rms_norm_eps' expected float, got int"):
        make_template(plan_of(source), published(source) | {"rms_norm_eps": 1}, "sdpa")


def test_ignored_keys_do_not_reach_the_class(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", generation="old", rope=LINEAR["rope"])
    config = published(source)
    config["rope_scaling"] |= {"partial_rotary_factor": 0.5}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        open_checkpoint(source)
    ignored = ["rope_scaling.partial_rotary_factor"]
    opened = open_checkpoint(source, ignore_config_keys=ignored)
    ours = inverse_frequencies(opened.config.rope, 8)
    plan = make_plan(opened.config, chunk=4)
    theirs = make_template(plan, without_ignored(published(source), ignored), "sdpa").inverse_frequency_d
    assert torch.equal(theirs, ours)
    assert not torch.equal(make_template(plan, published(source), "sdpa").inverse_frequency_d, ours)


def test_other_architectures_are_refused_with_a_way_out() -> None:
    source = checkpoint(architecture="llama")
    with pytest.raises(
        ExportError, match=r"traces mistral, mixtral, ministral and this is llama\. Leave .*'reference'"
    ):
        make_template(plan_of(source), published(source), "sdpa")


def test_dynamic_rope_cannot_be_traced_from_transformers() -> None:
    source = checkpoint(rope={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ExportError, match=r"looks at the data .* Leave the front end at 'reference'"):
        make_template(plan_of(source), published(source), "eager")


def test_a_vision_tower_and_another_layout_are_refused(tmp_path: Path) -> None:
    folder = make_twin(tmp_path, shrunk(of_published("Pixtral-12B")))
    opened = open_checkpoint(folder, text_only=True)
    with pytest.raises(ExportError, match=r"llava is one with a vision tower around it\. Leave .*'reference'"):
        open_frontend("transformers", None, opened)
    native = replace(opened, layout="native", config_file=folder / "params.json")
    with pytest.raises(ExportError, match=r"Mistral's own layout \(params\.json\)\. Leave .*'reference'"):
        open_frontend("transformers", None, native)
