"""The quantization_config of llm-compressor and compressed-tensors: schemes for groups of modules.

Keys and defaults are those of QuantizationConfig, QuantizationScheme and QuantizationArgs in
https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from reference.config_reader import ConfigReader
from reference.module_patterns import read_patterns
from reference.quantization_config import (
    COMPRESSED,
    INT,
    PACK,
    PackedScheme,
    Quantization,
    SchemeGroup,
    check_known,
    group_size,
)

_FORMATS = (PACK, INT)
_MIXED = "mixed-precision"
_WAY_OUT = "Use the checkpoint from before it was quantised, or one with quantised weights alone (W4A16, W8A16)."
_ACTIVATIONS = "activations are quantised too then, and Cierzo computes with them as they are"

_Fixed = Mapping[str, tuple[tuple[object, ...], str]]
_FIXED: _Fixed = {
    "kv_cache_scheme": ((None,), "keys and values are quantised too then, by scales that Cierzo does not read"),
    "moe_sparsity_config": ((None,), "some experts are left out or replaced then"),
    "quantization_status": (
        (None, "compressed", "frozen"),
        "the weights are then still to be rounded while the model runs",
    ),
    "transform_config": ((None, {}), "activations are rotated then (Hadamard transforms)"),
}
_FIXED_OF_GROUP: _Fixed = {"input_activations": ((None,), _ACTIVATIONS), "output_activations": ((None,), _ACTIVATIONS)}
_FIXED_OF_WEIGHTS: _Fixed = {
    "block_structure": ((None,), "Cierzo reads scales per row or per group of columns only"),
    "dynamic": ((None, False), "weights have fixed scales"),
    "type": ((None, "int"), "Cierzo reads integers only"),
}
_REORDERED = {"group": True, "dynamic": True, "weight": False, "static": False}


def read_compressed(reader: ConfigReader) -> Quantization:
    """The whole object. Raises ConfigError for anything that is not understood exactly."""
    known = {"config_groups", "dequantize", "format", "global_compression_ratio", "ignore", "quant_method"}
    check_known(reader, known | {"run_compressed", "sparsity_config", "version"}, _FIXED, _WAY_OUT)
    sparsity = ConfigReader(reader.optional_mapping("sparsity_config"), f"{reader.prefix}sparsity_config.")
    if sparsity.mapping and sparsity.string("format") != "dense":
        sparsity.refuse("format", "the weights are then stored without their zeros", _WAY_OUT)
    layout = reader.string("format")
    if layout not in (*_FORMATS, _MIXED):
        reader.refuse("format", f"Cierzo reads {' and '.join(_FORMATS)} only", _WAY_OUT)
    entries = reader.optional_mapping("config_groups")
    if not entries:
        reader.refuse("config_groups", "there is no scheme in it", "Check the file against the published one.")
    groups = []
    for name in entries:
        inside = ConfigReader(entries, f"{reader.prefix}config_groups.").optional_mapping(name)
        groups.append(_group(ConfigReader(inside, f"{reader.prefix}config_groups.{name}."), layout))
    ignored = reader.optional_strings("ignore") or ()
    return Quantization(COMPRESSED, tuple(groups), read_patterns(reader, "ignore", ignored))


def _group(reader: ConfigReader, layout: str) -> SchemeGroup:
    check_known(reader, {"format", "targets", "weights"}, _FIXED_OF_GROUP, _WAY_OUT)
    targets = reader.optional_strings("targets")
    if not targets:
        reader.refuse("targets", "there must be one at least", "Check the file against the published one.")
    own = reader.string("format") if reader.mapping.get("format") is not None else layout
    if own not in _FORMATS or layout not in (own, _MIXED):
        reader.refuse("format", f"Cierzo reads {' and '.join(_FORMATS)} only, and one of them in a file", _WAY_OUT)
    weights = reader.optional_mapping("weights")
    if not weights:
        reader.refuse("weights", "there is no scheme for weights in it", "Check the file against the published one.")
    scheme = _weights(ConfigReader(weights, f"{reader.prefix}weights."), own)
    return SchemeGroup(scheme, read_patterns(reader, "targets", targets))


def _weights(reader: ConfigReader, layout: str) -> PackedScheme:
    known = {"actorder", "group_size", "num_bits", "observer", "observer_kwargs", "scale_dtype", "strategy"}
    check_known(reader, known | {"symmetric", "zp_dtype"}, _FIXED_OF_WEIGHTS, _WAY_OUT)
    bits = reader.integer("num_bits", 8)
    if bits not in (4, 8):
        reader.refuse("num_bits", "Cierzo reads integers of 4 or 8 bits only here", _WAY_OUT)
    size = group_size(reader) if reader.mapping.get("group_size") is not None else None
    inferred = "tensor" if reader.mapping.get("group_size") is None else "channel" if size is None else "group"
    strategy = reader.string("strategy") if reader.mapping.get("strategy") is not None else inferred
    if strategy not in ("channel", "group"):
        reader.refuse(
            "strategy", "Cierzo reads scales per row (channel) or per group of columns (group) only", _WAY_OUT
        )
    if (strategy == "group") != (size is not None):
        reader.refuse("group_size", f"strategy = {strategy!r} says something else", "Keep the right one of the two.")
    order = reader.mapping.get("actorder")
    if not (order is None or isinstance(order, bool) or (isinstance(order, str) and order in _REORDERED)):
        reader.refuse("actorder", f"Cierzo knows {', '.join(_REORDERED)} only", _WAY_OUT)
    return PackedScheme(
        layout=layout,
        bits=bits,
        group_size=size,
        symmetric=reader.boolean("symmetric", True),
        reordered=_REORDERED[order] if isinstance(order, str) else bool(order),
    )
