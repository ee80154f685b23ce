"""The `quantization_config` of a Hugging Face config.json: in which packed layout a checkpoint's matrices lie.

Three families of weight-only integers are read, of which the tensors are in `reference.packed_layouts`:

    gptq                  AutoGPTQ, GPTQModel, optimum: `checkpoint_format` "gptq" or "gptq_v2"
    awq                   AutoAWQ, GPTQModel: `version` "gemm"
    compressed-tensors    llm-compressor: `format` "pack-quantized" or "int-quantized", activations left alone

Which matrices are packed is said by the tensors themselves, since a packed one has other names than a plain one. The
config says how to take their numbers. So the lists of modules that were left out are not needed for GPTQ and AWQ; for
compressed-tensors they are part of choosing a module's scheme.

Every other method, and every key that is not known, is refused, as in all of config.json.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from reference.config_reader import ConfigReader
from reference.module_patterns import Pattern

KEY = "quantization_config"
PREFIX = f"{KEY}."
GPTQ, GPTQ_V2, AWQ, PACK, INT = "gptq", "gptq_v2", "awq", "pack-quantized", "int-quantized"
PACKED_LAYOUTS = (GPTQ, GPTQ_V2, AWQ, PACK, INT)
COMPRESSED = "compressed-tensors"

PLAIN = "Use the checkpoint from before it was quantised: `cierzo export --weights int4` quantises it anew."

_HOW_IT_WAS_MADE = frozenset(
    {"act_group_aware", "batch_size", "block_name_to_quantize", "block_size", "cache_block_outputs", "damp_percent"}
    | {"damp_auto_increment", "dataset", "hyb_act", "lm_head", "meta", "model_file_base_name", "model_name_or_path"}
    | {"model_seqlen", "modules_in_block_to_quantize", "modules_to_not_convert", "module_name_preceding_first_block"}
    | {"mse", "pad_token_id", "static_groups", "tokenizer", "true_sequential"}
)
_HOW_IT_RUNS = frozenset(
    {"disable_exllama", "do_fuse", "exllama_config", "fuse_max_seq_len", "max_input_length", "modules_to_fuse"}
    | {"use_cuda_fp16", "use_exllama"}
)
_FIXED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "adapter": ((None, {}), "an adapter would have to be added to the weights"),
    "is_marlin_format": ((None, False), "the tensors are then in Marlin's own order"),
    "pack_dtype": ((None, "int32"), "Cierzo reads words of 32 bits only"),
    "rotation": ((None,), "the weights are then rotated, and activations would have to be as well"),
}


@dataclass(frozen=True, slots=True)
class PackedScheme:
    """How the numbers of one packed matrix [N, K] are to be taken.

    layout: one of PACKED_LAYOUTS. bits: 4 or 8. group_size: columns that share a scale; None where a whole row does.
    symmetric: every zero point is the middle, 8 or 128. reordered: the file says for each column which group it is in.
    """

    layout: str
    bits: int
    group_size: int | None
    symmetric: bool
    reordered: bool


@dataclass(frozen=True, slots=True)
class SchemeGroup:
    """A scheme and the modules that it is for. targets: None for every packed module."""

    scheme: PackedScheme
    targets: tuple[Pattern, ...] | None

    def matches(self, module: str) -> bool:
        """Whether it is for the linear layer `module`, named as in the files."""
        return self.targets is None or any(target.matches(module) for target in self.targets)


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a checkpoint's quantization_config says. method: its quant_method. ignored: modules that are left plain."""

    method: str
    groups: tuple[SchemeGroup, ...]
    ignored: tuple[Pattern, ...] = ()

    def schemes_of(self, module: str) -> tuple[PackedScheme, ...]:
        """The schemes that are for `module`: one, if the config is consistent about it."""
        if any(pattern.matches(module) for pattern in self.ignored):
            return ()
        return tuple(dict.fromkeys(group.scheme for group in self.groups if group.matches(module)))

    def __str__(self) -> str:
        schemes = dict.fromkeys(group.scheme for group in self.groups)
        return f"{self.method}: " + ", ".join(
            f"{scheme.bits} bits, {'symmetric' if scheme.symmetric else 'with zero points'}, "
            + (f"groups of {scheme.group_size}" if scheme.group_size is not None else "a scale per row")
            + (f" ({scheme.layout})" if scheme.layout != self.method else "")
            for scheme in schemes
        )


def read_quantization(reader: ConfigReader) -> Quantization | None:
    """The quantization_config of a config.json; None where it is absent or null.

    Raises ConfigError for anything that is not understood exactly.
    """
    if reader.mapping.get(KEY) is None:
        return None
    inner = ConfigReader(reader.optional_mapping(KEY), reader.prefix + PREFIX)
    if "quant_method" not in inner.mapping:
        reader.refuse(
            KEY,
            "it names no quant_method, so the tensors may be packed in a quantised layout of any kind",
            "Copy the config.json that was published with the weights.",
        )
    method = inner.string("quant_method").lower()
    if method == GPTQ:
        return Quantization(method, (SchemeGroup(_gptq(inner), None),))
    if method == AWQ:
        return Quantization(method, (SchemeGroup(_awq(inner), None),))
    if method != COMPRESSED:
        methods = f"{GPTQ}, {AWQ} and {COMPRESSED}"
        inner.refuse("quant_method", f"Cierzo reads {methods} (integers of 4 or 8 bits) only", PLAIN)
    from reference.compressed_config import read_compressed  # which makes the objects that this module defines

    return read_compressed(inner)


def check_known(
    reader: ConfigReader,
    known: Collection[str],
    fixed: Mapping[str, tuple[tuple[object, ...], str]],
    way_out: str = PLAIN,
) -> None:
    """Raise ConfigError for the first key that is neither known nor fixed at a value that Cierzo computes with."""
    for key, value in reader.mapping.items():
        if key in fixed:
            allowed, cause = fixed[key]
            if not any(type(value) is type(one) and value == one for one in allowed):
                reader.refuse(key, cause, way_out)
        elif key not in known:
            reader.refuse(
                key,
                "Cierzo does not know what that means for packed weights, so the engine might compute something else",
                "If it is known to change nothing at inference, take it out of a copy of config.json.",
            )


def _bits(reader: ConfigReader, allowed: tuple[int, ...]) -> int:
    bits = reader.integer("bits")
    if bits not in allowed:
        reader.refuse("bits", f"Cierzo reads integers of {' or '.join(map(str, allowed))} bits only here", PLAIN)
    return bits


def group_size(reader: ConfigReader) -> int | None:
    """The columns of a group; None for -1, with which a row is one group."""
    size = reader.integer("group_size", least=-1)
    if size == 0:
        reader.refuse("group_size", "it must be -1 or at least 1", "Check the file against the published one.")
    return None if size == -1 else size


def _spelled(reader: ConfigReader, keys: tuple[str, ...], default: str, allowed: tuple[str, ...]) -> str:
    """The one value that several spellings of a key have, in lower case."""
    found = {key: reader.string(key).lower() for key in keys if reader.mapping.get(key) is not None}
    key = next(iter(found), keys[0])
    if len(set(found.values())) > 1:
        reader.refuse(key, f"{keys[-1] if key != keys[-1] else keys[0]} says something else", "Keep the right one.")
    value = found.get(key, default)
    if value not in allowed:
        reader.refuse(key, f"of these layouts Cierzo reads {' and '.join(allowed)} only", PLAIN)
    return value


def _gptq(reader: ConfigReader) -> PackedScheme:
    """Keys of AutoGPTQ's and GPTQModel's QuantizeConfig and of GPTQConfig in transformers, with their defaults."""
    consumed = {"bits", "checkpoint_format", "desc_act", "dynamic", "format", "group_size", "method", "quant_method"}
    check_known(reader, consumed | {"backend", "sym"} | _HOW_IT_WAS_MADE | _HOW_IT_RUNS, _FIXED)
    _spelled(reader, ("quant_method", "method"), GPTQ, (GPTQ,))
    rules = reader.optional_mapping("dynamic")
    if any(not rule.startswith("-:") for rule in rules):  # those with a minus leave modules out
        reader.refuse("dynamic", "it gives some modules another quantisation than the others", PLAIN)
    return PackedScheme(
        layout=_spelled(reader, ("checkpoint_format", "format"), GPTQ, (GPTQ, GPTQ_V2)),
        bits=_bits(reader, (4, 8)),
        group_size=group_size(reader),
        symmetric=reader.boolean("sym", True),
        reordered=reader.boolean("desc_act", False),
    )


def _awq(reader: ConfigReader) -> PackedScheme:
    """Keys of AutoAWQ's to_transformers_dict, of GPTQModel, and of AwqConfig in transformers, with their defaults."""
    consumed = {"bits", "checkpoint_format", "format", "group_size", "method", "quant_method", "version", "zero_point"}
    fixed = {
        **_FIXED,
        "backend": ((None, "auto", "autoawq", "gemm"), "the tensors may then be in another order than that of gemm"),
        "desc_act": ((None, False), "this layout has no order of columns"),
        "dynamic": ((None, {}), "it gives some modules another quantisation than the others"),
        "zero_point": ((None, True), "the gemm layout always has zero points"),
    }
    check_known(reader, consumed | {"sym"} | _HOW_IT_WAS_MADE | _HOW_IT_RUNS, fixed)
    _spelled(reader, ("quant_method", "method"), AWQ, (AWQ,))
    _spelled(reader, ("version", "format", "checkpoint_format"), "gemm", ("gemm",))
    return PackedScheme(AWQ, _bits(reader, (4,)), group_size(reader), symmetric=False, reordered=False)
