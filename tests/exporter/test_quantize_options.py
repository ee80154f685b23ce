"""What may be asked for in quantised weights, and which parameters it reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.quantize.decide import Decisions, decide
from exporter.quantize.options import Keep, QuantizeOptions, read_options
from reference.checkpoint import open_checkpoint
from reference.quantized_layout import QuantizedFormat
from reference.weights import bind, load_parameter
from runtime.errors import ExportError
from tests.support.bundles import checkpoint
from tests.support.quantized_checkpoints import Kind, make_quantized

INT4, INT8 = QuantizedFormat(4, 32, False, "F16"), QuantizedFormat(8, 32, False, "F16")


ASKED = ("block_size", "zero_points", "scales", "quantizer")


def decided(
    weights: str = "int4", folder: Path | None = None, keep: list[str] | None = None, **options: Any
) -> Decisions:
    asked = {name: options.pop(name) for name in ASKED if name in options}
    opened = open_checkpoint(folder or checkpoint(dtype="bfloat16", **options))
    return decide(opened, bind(opened), read_options(weights, keep=keep or [], **asked))


def quantized(decisions: Decisions) -> dict[str, int]:
    """Bits of the quantised parameters."""
    return {name: d.bits for name, d in decisions.by_parameter.items() if isinstance(d, QuantizedFormat)}


def test_defaults() -> None:
    assert read_options("int4") == QuantizeOptions(4)
    assert QuantizeOptions(4).format() == INT4
    assert QuantizeOptions(4).search
    assert read_options("stored") is read_options("fp32") is None


def test_everything_that_can_be_asked() -> None:
    options = read_options(
        "int8",
        block_size=128,
        zero_points=True,
        scales="float32",
        quantizer="rtn",
        keep=["lm_head", "first", "lm_head"],
    )
    assert options is not None
    assert options.format() == QuantizedFormat(8, 128, True, "F32")
    assert not options.search
    assert options.keep == (Keep("lm_head", None), Keep("first", None))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("stored", {"block_size": 32}, "block_size only mean.*int8, int4"),
    ("fp32", {"keep": ["lm_head"], "scales": "float16"}, "scales and keep only"),
    ("fp32", {"zero_points": False}, "zero_points only"),
    ("int4", {"block_size": 48}, "block_size is 48, but must be one of 16, 32"),
    ("int4", {"block_size": True}, "block_size is"),
    ("int4", {"block_size": "32"}, "block_size is"),
    ("int4", {"zero_points": 1}, "zero_points is 1"),
    ("int4", {"scales": "bfloat16"}, "scales is .*float16, float32"),
    ("int4", {"quantizer": "gptq"}, "quantizer is .*search, rtn"),
    ("int4", {"keep": "lm_head"}, "collection of names"),
    ("int4", {"keep": ["lm_head=int2"]}, "lm_head=int2.*NAME=int8"),
    ("int4", {"keep": ["=int8"]}, "must be a name"),
    ("int4", {"keep": ["lm_head="]}, "must be a name"),
    ("int4", {"keep": [3]}, "must be a name"),
    ("int8", {"keep": ["lm_head=int8"]}, "int8 anyway"),
]


@pytest.mark.parametrize("weights, options, message", REFUSED)
def test_what_makes_no_sense_is_refused(weights: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        read_options(weights, **options)


def test_embedding_norms_and_biases_stay() -> None:
    decisions = decided(architecture="qwen2", window=None)
    kept = [name for name, decision in decisions.by_parameter.items() if decision == "BF16"]
    assert [name for name in kept if not name.endswith(("norm.weight", ".bias"))] == ["embed_tokens.weight"]
    assert all(isinstance(d, QuantizedFormat) for n, d in decisions.by_parameter.items() if n.endswith("_proj.weight"))
    assert decisions.by_parameter["lm_head.weight"] == INT4
    assert decisions.kept == {"embed_tokens.weight": "BF16"}
    assert (decisions.main, decisions.method) == (INT4, "search")


def test_routers_stay_and_experts_do_not() -> None:
    decisions = decided("int8", architecture="mixtral", quantizer="rtn")
    assert decisions.by_parameter["layers.1.moe.router.weight"] == "BF16"
    assert decisions.by_parameter["layers.1.moe.down_proj"] == INT8
    assert set(decisions.kept) == {"embed_tokens.weight", "layers.0.moe.router.weight", "layers.1.moe.router.weight"}
    assert decisions.method == "rtn"


def names(decisions: Decisions, bits: int) -> set[str]:
    return {name.removesuffix(".weight") for name, found in quantized(decisions).items() if found == bits}


ALL = names(decided(num_layers=3), 4)
PICKS = {
    "lm_head": {"lm_head"},
    "first": {name for name in ALL if name.startswith("layers.0.")},
    "last": {name for name in ALL if name.startswith("layers.2.")},
    "attention": {name for name in ALL if ".self_attn." in name},
    "mlp": {name for name in ALL if ".mlp." in name},
    "experts": {name for name in ALL if ".mlp." in name},
    "layers.1.*.[qk]_proj.weight": {"layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"},
    "embed": set(),
    "norm.weight": set(),
}


@pytest.mark.parametrize("name", PICKS)
def test_keep_names_parameters(name: str) -> None:
    assert names(decided(num_layers=3, keep=[name]), 4) == ALL - PICKS[name]
    if PICKS[name]:
        decisions = decided(num_layers=3, keep=[f"{name}=int8"])
        assert names(decisions, 8) == PICKS[name]
        assert names(decisions, 4) == ALL - PICKS[name]
        assert {n.removesuffix(".weight") for n, kind in decisions.kept.items() if kind == "int8"} == PICKS[name]


def test_the_most_precise_of_several_counts() -> None:
    for keep in (["attention=int8", "first"], ["first", "attention=int8"]):
        decisions = decided(num_layers=3, keep=keep)
        assert names(decisions, 8) == PICKS["attention"] - PICKS["first"]
        assert names(decisions, 4) == ALL - PICKS["attention"] - PICKS["first"]


def test_names_that_reach_nothing_are_refused() -> None:
    with pytest.raises(ExportError, match=r"keep names 'lm_heads'.*Names are lm_head, attention"):
        decided(keep=["lm_heads"])
    with pytest.raises(ExportError, match="keep names 'router'"):
        decided(keep=["router"])
    assert quantized(decided(architecture="mixtral", keep=["router"])) == quantized(decided(architecture="mixtral"))
    with pytest.raises(ExportError, match=r"keep has embed=int8, but embed_tokens.weight is never"):
        decided(keep=["embed=int8"])


def test_the_experts_of_a_layer_stay_together() -> None:
    with pytest.raises(ExportError, match=r"layers.1.moe.gate_proj, .*read together"):
        decided(architecture="mixtral", keep=["layers.1.moe.up_proj"])
    decisions = decided(architecture="mixtral", keep=["layers.1.moe.*=int8"])
    assert {n for n, bits in quantized(decisions).items() if bits == 8} == {
        f"layers.1.moe.{name}_proj" for name in ("gate", "up", "down")
    }


def test_a_tied_head_becomes_a_parameter_of_its_own() -> None:
    decisions = decided(tie=True)
    assert decisions.by_parameter["embed_tokens.weight"] == "BF16"
    assert decisions.by_parameter["lm_head.weight"] == INT4
    assert decisions.sources["lm_head.weight"].parameter == "lm_head.weight"
    assert "lm_head.weight" not in decided(tie=True, keep=["lm_head"]).by_parameter
    assert quantized(decided(tie=True, keep=["lm_head=int8"]))["lm_head.weight"] == 8


GPTQ = Kind("gptq", group=32)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quantized(tmp_path_factory.mktemp("gptq"), GPTQ).packed


def test_a_quantised_checkpoint_stays_as_it_is(packed: Path) -> None:
    opened = open_checkpoint(packed)
    decisions = decide(opened, bind(opened), None)
    assert decisions.main == QuantizedFormat(4, 32, True, "F16")
    assert decisions.method == "checkpoint"
    assert decisions.kept == {"embed_tokens.weight": "F32", "lm_head.weight": "F32"}


def test_the_rest_of_a_quantised_checkpoint_takes_its_format(packed: Path) -> None:
    decisions = decided("int4", packed)
    assert decisions.by_parameter["lm_head.weight"] == decisions.main == QuantizedFormat(4, 32, True, "F16")
    assert decisions.method == "search"
    kept = decided("int4", packed, ["lm_head"])
    assert (kept.by_parameter["lm_head.weight"], kept.method) == ("F32", "checkpoint")


@pytest.mark.parametrize(
    "weights, options",
    [
        ("int8", {}),
        ("int4", {"block_size": 16}),
        ("int4", {"zero_points": False}),
        ("int4", {"scales": "float32"}),
    ],
)
def test_a_second_rounding_is_refused(packed: Path, weights: str, options: dict[str, Any]) -> None:
    with pytest.raises(
        ExportError, match=r"quantised already.*4 bits in blocks of 32 with zero points.*weights stored"
    ):
        decided(weights, packed, **options)


def test_what_is_quantised_cannot_be_kept_more_precise(packed: Path) -> None:
    with pytest.raises(ExportError, match=r"keep has attention=int8.*nothing more precise"):
        decided("int4", packed, ["attention=int8"])


def test_sources_load_as_the_checkpoint_says() -> None:
    opened = open_checkpoint(checkpoint(dtype="bfloat16", tie=True))
    decisions = decide(opened, bind(opened), read_options("int4"))
    head = load_parameter(opened, decisions.sources["lm_head.weight"], torch.float32)
    assert torch.equal(head, load_parameter(opened, bind(opened)["embed_tokens.weight"], torch.float32))
