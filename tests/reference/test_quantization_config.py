"""quantization_config as the tools write it, and every refusal of one."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import transformers

from reference.config import ModelConfig
from reference.quantization_config import PackedScheme, Quantization
from tests.support.config_json import refusal, small
from tests.support.quantized_checkpoints import Kind, quantization_config

COMPRESSED = quantization_config(Kind("pack-quantized", group=128, symmetric=True))
GPTQ = quantization_config(Kind("gptq", group=128, symmetric=True))
AWQ = quantization_config(Kind("awq", group=128))


def read(entries: dict[str, Any]) -> Quantization:
    found = ModelConfig.from_hf(small(quantization_config=entries)).quantization
    assert found is not None
    return found


def changed(entries: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with other values; "a.b" is a path, and a value of KeyError takes the key out."""
    made = copy.deepcopy(entries)
    for path, value in changes.items():
        *outer, last = path.split(".")
        place = made
        for part in outer:
            place = place[part]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value
    return made


WEIGHTS = "config_groups.group_0.weights."


@pytest.mark.parametrize(
    "entries,scheme",
    [
        (GPTQ, PackedScheme("gptq", 4, 128, True, False)),
        (changed(GPTQ, {"bits": 8, "group_size": -1}), PackedScheme("gptq", 8, None, True, False)),
        (changed(GPTQ, {"sym": False, "desc_act": True}), PackedScheme("gptq", 4, 128, False, True)),
        (changed(GPTQ, {"checkpoint_format": "gptq_v2"}), PackedScheme("gptq_v2", 4, 128, True, False)),
        (changed(GPTQ, {"checkpoint_format": KeyError, "format": "GPTQ"}), PackedScheme("gptq", 4, 128, True, False)),
        (changed(GPTQ, {"dynamic": {"-:lm_head": {}}}), PackedScheme("gptq", 4, 128, True, False)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, PackedScheme("gptq", 4, 64, True, False)),
        (AWQ, PackedScheme("awq", 4, 128, False, False)),
        (changed(AWQ, {"version": "GEMM", "group_size": -1}), PackedScheme("awq", 4, None, False, False)),
        (changed(AWQ, {"version": KeyError, "format": "gemm", "sym": True}), PackedScheme("awq", 4, 128, False, False)),
        (COMPRESSED, PackedScheme("pack-quantized", 4, 128, True, False)),
        (changed(COMPRESSED, {WEIGHTS + "actorder": "group"}), PackedScheme("pack-quantized", 4, 128, True, True)),
        (changed(COMPRESSED, {WEIGHTS + "actorder": "static"}), PackedScheme("pack-quantized", 4, 128, True, False)),
        (changed(COMPRESSED, {WEIGHTS + "actorder": True}), PackedScheme("pack-quantized", 4, 128, True, True)),
        (
            changed(
                COMPRESSED, {WEIGHTS + "strategy": KeyError, WEIGHTS + "group_size": -1, "format": "int-quantized"}
            ),
            PackedScheme("int-quantized", 4, None, True, False),
        ),
        (
            changed(COMPRESSED, {WEIGHTS + "num_bits": KeyError, WEIGHTS + "symmetric": False}),
            PackedScheme("pack-quantized", 8, 128, False, False),
        ),
        (
            changed(COMPRESSED, {"format": "mixed-precision", "config_groups.group_0.format": "int-quantized"}),
            PackedScheme("int-quantized", 4, 128, True, False),
        ),
        (
            changed(COMPRESSED, {"sparsity_config": {"format": "dense", "ignore": []}, "transform_config": {}}),
            PackedScheme("pack-quantized", 4, 128, True, False),
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_what_the_tools_write_is_read(entries: dict[str, Any], scheme: PackedScheme) -> None:
    assert [group.scheme for group in read(entries).groups] == [scheme]


OF_TRANSFORMERS = [
    transformers.GPTQConfig(bits=4),
    transformers.GPTQConfig(bits=8, group_size=-1, sym=False),
    transformers.GPTQConfig(bits=4, format="gptq_v2", desc_act=True),
    transformers.AwqConfig(group_size=64),
]


@pytest.mark.parametrize("config", OF_TRANSFORMERS, ids=lambda config: type(config).__name__)
def test_what_transformers_writes_is_read(config: Any) -> None:
    (group,) = read(json.loads(json.dumps(config.to_dict()))).groups
    scheme = group.scheme
    assert (scheme.bits, scheme.group_size or -1) == (config.bits, config.group_size)
    if config.quant_method == "gptq":
        assert scheme == PackedScheme(config.format, config.bits, scheme.group_size, config.sym, config.desc_act)


def test_null_is_no_quantisation() -> None:
    assert ModelConfig.from_hf(small(quantization_config=None)) == ModelConfig.from_hf(small())


def test_it_says_itself_in_a_few_words() -> None:
    assert str(read(GPTQ)) == "gptq: 4 bits, symmetric, groups of 128"
    entries = changed(COMPRESSED, {WEIGHTS + "strategy": "channel", WEIGHTS + "group_size": None})
    assert str(read(entries)) == "compressed-tensors: 4 bits, symmetric, a scale per row (pack-quantized)"


def test_modules_of_a_scheme() -> None:
    """Names, classes and expressions; what is ignored has no scheme, and two groups may each have their own modules."""
    entries = changed(COMPRESSED, {"ignore": ["lm_head", "re:.*block_sparse_moe.gate$", "re:model.layers.3.*"]})
    entries["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.(q|k)_proj", "model.layers.1.mlp.up_proj"]
    wide = changed(entries["config_groups"]["group_0"], {"weights.num_bits": 8, "targets": ["re:.*down_proj$"]})
    entries["config_groups"]["group_1"] = wide
    found = read(entries)

    def bits(module: str) -> list[int]:
        return [scheme.bits for scheme in found.schemes_of(module)]

    assert bits("model.layers.0.self_attn.q_proj") == bits("model.layers.1.mlp.up_proj") == [4]
    assert bits("model.layers.0.mlp.down_proj") == [8]
    for module in ("self_attn.v_proj", "mlp.gate_proj"):
        assert bits(f"model.layers.0.{module}") == []
    assert bits("lm_head") == bits("model.layers.3.self_attn.q_proj") == []
    every = changed(COMPRESSED, {"config_groups.group_0.targets": ["Linear"]})
    assert len(read(every).schemes_of("model.layers.0.self_attn.v_proj")) == 1
    assert read(every).schemes_of("model.layers.0.block_sparse_moe.gate") == ()


REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (GPTQ, {"quant_method": KeyError}, "names no quant_method, so the tensors may be packed in a quantised layout"),
    (
        GPTQ,
        {"quant_method": "bitsandbytes"},
        'quant_method = "bitsandbytes", but Cierzo reads gptq, awq and compressed',
    ),
    (GPTQ, {"quant_method": "fp8"}, "cierzo export --weights int4"),
    (GPTQ, {"quant_method": "hqq"}, "integers of 4 or 8 bits"),
    (GPTQ, {"quant_method": 4}, "a string belongs there"),
    (GPTQ, {"bits": 3}, "quantization_config.bits = 3, but Cierzo reads integers of 4 or 8 bits only here"),
    (GPTQ, {"bits": 2}, "4 or 8 bits"),
    (GPTQ, {"bits": KeyError}, "has no quantization_config.bits"),
    (GPTQ, {"group_size": KeyError}, "has no quantization_config.group_size"),
    (GPTQ, {"group_size": 0}, "must be -1 or at least 1"),
    (GPTQ, {"group_size": -2}, "at least -1"),
    (GPTQ, {"sym": 1}, "true or false"),
    (GPTQ, {"checkpoint_format": "marlin"}, 'checkpoint_format = "marlin", but of these layouts Cierzo reads gptq and'),
    (GPTQ, {"format": "gptq_v2"}, "format says something else"),
    (GPTQ, {"method": "qqq"}, "method says something else"),
    (GPTQ, {"is_marlin_format": True}, "Marlin's own order"),
    (GPTQ, {"pack_dtype": "int64"}, "words of 32 bits"),
    (GPTQ, {"dynamic": {"+:.*down_proj": {"bits": 8}}}, "gives some modules another quantisation"),
    (GPTQ, {"adapter": {"rank": 8}}, "an adapter would have to be added"),
    (GPTQ, {"rotation": "hadamard"}, "the weights are then rotated"),
    (GPTQ, {"quux": 1}, "quantization_config.quux = 1, but Cierzo does not know what that means for packed weights"),
    (AWQ, {"bits": 8}, "integers of 4 bits only"),
    (AWQ, {"version": "gemv"}, 'version = "gemv", but of these layouts Cierzo reads gemm only'),
    (AWQ, {"version": "marlin"}, "reads gemm only"),
    (AWQ, {"backend": "llm-awq"}, "another order than that of gemm"),
    (AWQ, {"zero_point": False}, "always has zero points"),
    (AWQ, {"desc_act": True}, "no order of columns"),
    (AWQ, {"quux": 1}, "does not know"),
    (COMPRESSED, {"format": "float-quantized"}, "reads pack-quantized and int-quantized only"),
    (COMPRESSED, {"format": "marlin-24"}, "reads pack-quantized and int-quantized only"),
    (COMPRESSED, {"format": KeyError}, "has no quantization_config.format"),
    (COMPRESSED, {"format": "mixed-precision"}, "group_0.format = null"),
    (COMPRESSED, {"config_groups.group_0.format": "int-quantized"}, "one of them in a file"),
    (COMPRESSED, {"kv_cache_scheme": {"num_bits": 8}}, "keys and values are quantised too"),
    (COMPRESSED, {"quantization_status": "calibration"}, "still to be rounded"),
    (COMPRESSED, {"transform_config": {"config_groups": {}}}, "activations are rotated"),
    (COMPRESSED, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "stored without their zeros"),
    (COMPRESSED, {"moe_sparsity_config": {"method": "prune"}}, "experts are left out or replaced"),
    (COMPRESSED, {"config_groups": {}}, "no scheme in it"),
    (COMPRESSED, {"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 = "),
    (COMPRESSED, {"config_groups.group_0.targets": []}, "there must be one at least"),
    (COMPRESSED, {"config_groups.group_0.weights": None}, "no scheme for weights"),
    (COMPRESSED, {"config_groups.group_0.input_activations": {"num_bits": 8}}, "activations are quantised too"),
    (COMPRESSED, {"config_groups.group_0.output_activations": {"num_bits": 8}}, "activations are quantised too"),
    (COMPRESSED, {"config_groups.group_0.quux": 1}, "config_groups.group_0.quux = 1"),
    (COMPRESSED, {WEIGHTS + "num_bits": 3}, "4 or 8 bits"),
    (COMPRESSED, {WEIGHTS + "type": "float"}, "Cierzo reads integers only"),
    (COMPRESSED, {WEIGHTS + "strategy": "tensor", WEIGHTS + "group_size": None}, "per row (channel) or per group"),
    (COMPRESSED, {WEIGHTS + "strategy": "block", WEIGHTS + "block_structure": [128, 128]}, "per row or per group"),
    (COMPRESSED, {WEIGHTS + "strategy": KeyError, WEIGHTS + "group_size": KeyError}, "strategy = null"),
    (COMPRESSED, {WEIGHTS + "strategy": "channel"}, "says something else"),
    (COMPRESSED, {WEIGHTS + "group_size": None}, "says something else"),
    (COMPRESSED, {WEIGHTS + "dynamic": True}, "weights have fixed scales"),
    (COMPRESSED, {WEIGHTS + "actorder": "random"}, "Cierzo knows group, dynamic, weight, static only"),
    (COMPRESSED, {WEIGHTS + "quux": 1}, "weights.quux = 1"),
    (COMPRESSED, {"ignore": ["re:(a+)+$"]}, '(a+)+$" can match in too many ways'),
    (COMPRESSED, {"ignore": ["re:a*a*a*a*a*$"]}, "too many ways"),
    (COMPRESSED, {"ignore": ["re:" + ".?" * 30 + "z"]}, "too many ways"),
    (COMPRESSED, {"ignore": ["re:" + "(.|.)" * 30 + "z"]}, "too many ways"),
    (COMPRESSED, {"config_groups.group_0.targets": ["re:(q|k"]}, "is no regular expression"),
    (COMPRESSED, {"ignore": "lm_head"}, "a list of strings"),
    (COMPRESSED, {"quux": 1}, "quantization_config.quux = 1"),
]


@pytest.mark.parametrize("entries,changes,words", REFUSALS, ids=lambda value: "" if isinstance(value, dict) else None)
def test_refusals(entries: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    message = refusal(small(quantization_config=changed(entries, changes)))
    assert words in message
    assert "quantization_config" in message


def test_it_cannot_be_ignored() -> None:
    message = refusal(small(quantization_config=GPTQ), ignore_keys=["quantization_config"])
    assert "quantization_config decides what the model computes" in message
