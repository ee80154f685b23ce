"""Which parameters of a checkpoint come from packed matrices, found by its config and by the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from reference.checkpoint import HUGGING_FACE, Checkpoint, some
from reference.packed_layouts import SCALE_DTYPES, PackedMatrix, packed_modules
from reference.packed_source import PackedSource, packed_source
from reference.parameters import EMBEDDING
from reference.quantization_config import GPTQ, GPTQ_V2, PACKED_LAYOUTS, PackedScheme
from reference.weight_maps import weight_map
from reference.weight_source import WeightSource
from runtime.errors import CheckpointError

Source = WeightSource | PackedSource

_WEIGHT = ".weight"


def sources_of(checkpoint: Checkpoint) -> dict[str, Source]:
    """The source of every parameter, packed ones included. Whether its tensors are there is `bind`'s matter.

    Raises CheckpointError when config and tensors disagree about what is packed, and how.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    if config.quantization is None:
        return dict(weight_map(config, tensors, checkpoint.layout))
    layouts = {group.scheme.layout for group in config.quantization.groups}
    modules = packed_modules(layouts, tensors)
    if not modules:
        raise CheckpointError(
            f"{checkpoint.config_file} has a quantization_config ({config.quantization}), but no tensor of "
            f"{checkpoint.path} is packed in that way. Copy the config.json that was published with these weights, or "
            "take quantization_config out if they are the plain ones."
        )
    # With their plain names, the packed matrices have the places that plain ones would have.
    plain = weight_map(config, [*tensors, *(module + _WEIGHT for module in modules)], HUGGING_FACE)
    return {name: _source(checkpoint, source, modules) for name, source in plain.items()}


def _source(checkpoint: Checkpoint, plain: WeightSource, modules: Collection[str]) -> Source:
    matrices = {}
    for piece in plain.pieces:
        module = piece.tensor.removesuffix(_WEIGHT)
        if module in modules and piece.tensor not in matrices and len(piece.tensor_shape) == 2:
            matrices[piece.tensor] = PackedMatrix(module, _scheme(checkpoint, module), *piece.tensor_shape)
    if not matrices:
        return plain
    if plain.parameter == EMBEDDING:
        raise CheckpointError(
            f"{checkpoint.path} holds its embedding quantised ({next(iter(matrices))}), and Cierzo looks tokens up in "
            "a plain one. Use a checkpoint that leaves the embedding as it was."
        )
    return packed_source(plain, matrices, checkpoint.tensors)


def _scheme(checkpoint: Checkpoint, module: str) -> PackedScheme:
    assert checkpoint.config.quantization is not None
    schemes = checkpoint.config.quantization.schemes_of(module)
    if len(schemes) != 1:
        what = "in no way" if not schemes else f"in {len(schemes)} ways"
        raise CheckpointError(
            f"{checkpoint.path} holds the layer {module} quantised, and the quantization_config of its "
            f"{checkpoint.config_file.name} says {what} how (targets, ignore). Copy the config.json that was published "
            "with these weights."
        )
    return schemes[0]


def matrices_of(sources: Mapping[str, Source]) -> dict[str, PackedMatrix]:
    """Every packed matrix once, by its module."""
    packed = [source for source in sources.values() if isinstance(source, PackedSource)]
    return {piece.matrix.module: piece.matrix for source in packed for piece in source.pieces}


def is_zero_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Whether `name` is a bias of zeros beside a packed matrix; AutoGPTQ gave one to every layer for a while."""
    module, dot, kind = name.rpartition(".")
    quantization = checkpoint.config.quantization
    if quantization is None or (dot, kind) != (".", "bias") or f"{module}.qweight" not in checkpoint.tensors:
        return False
    floating = checkpoint.tensors[name].dtype in SCALE_DTYPES
    if quantization.groups[0].scheme.layout not in (GPTQ, GPTQ_V2) or not floating:
        return False
    return not bool(checkpoint.read(name).count_nonzero())


def looks_packed(checkpoint: Checkpoint) -> str:
    """What to say of a checkpoint whose tensors are packed and whose config does not mention it; else nothing."""
    if checkpoint.config.quantization is not None:
        return ""
    modules = sorted(packed_modules(set(PACKED_LAYOUTS), checkpoint.tensors))
    if not modules:
        return ""
    return (
        f" It holds packed weights ({some(modules, 2)}), but {checkpoint.config_file.name} has no quantization_config: "
        "older files have its content in quantize_config.json or quant_config.json, from where it can be copied, with "
        "a quant_method."
    )
