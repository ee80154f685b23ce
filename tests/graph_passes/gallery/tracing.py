"""Turns a small piece of PyTorch, spelled in some way, into the canonical graph that the matchers see.

Shapes: B rows, T tokens, S slots, N tokens of all rows; open extents are named by these letters.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from graph_passes.canonical import canonicalise

OPSET = 24
_SIZES = {"B": 3, "T": 5, "S": 11, "N": 13}
"""Example sizes of the open extents: at least two, and all different."""


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def trace(
    program: Callable[..., Any] | nn.Module,
    inputs: Mapping[str, tuple[str | int, ...]],
    outputs: list[str],
    integers: tuple[str, ...] = (),
) -> ir.Model:
    """The canonical graph of `program`, called with one tensor for each entry of `inputs`.

    inputs: name to shape; letters are open extents. integers: the names of int64 inputs; the others are float32.
    """
    module = program if isinstance(program, nn.Module) else _Function(program)
    dims = {letter: Dim(letter, min=1, max=2**20) for shape in inputs.values() for letter in shape if letter in _SIZES}
    examples, dynamic = [], []
    for name, shape in inputs.items():
        sizes = [_SIZES[extent] if isinstance(extent, str) else extent for extent in shape]
        examples.append(torch.ones(sizes, dtype=torch.int64) if name in integers else torch.randn(sizes))
        dynamic.append({axis: dims[extent] for axis, extent in enumerate(shape) if isinstance(extent, str)})
    shapes: Any = tuple(dynamic) if isinstance(program, nn.Module) else (tuple(dynamic),)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(module, tuple(examples), dynamic_shapes=shapes, strict=False)
            onnx_program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=list(inputs),
                output_names=outputs,
            )
    finally:
        logger.setLevel(level)
    assert onnx_program is not None
    model: ir.Model = onnx_program.model
    _name_dims(model, inputs)
    canonicalise(model)
    return model


def _name_dims(model: ir.Model, inputs: Mapping[str, tuple[str | int, ...]]) -> None:
    """Give the tracer's symbols the letters of the inputs' shapes."""
    renamed: dict[str, str] = {}
    for value in model.graph.inputs:
        for extent, letter in zip(value.shape or (), inputs[str(value.name)], strict=True):
            if isinstance(letter, str):
                assert isinstance(extent, ir.SymbolicDim), f"{value.name}: {letter} was fixed"
                renamed[str(extent.value)] = letter
    for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(extent, renamed) for extent in value.shape])


def _renamed(extent: int | ir.SymbolicDim, renamed: Mapping[str, str]) -> int | str | None:
    if isinstance(extent, int) or extent.value is None:
        return extent if isinstance(extent, int) else None
    return re.sub(r"\w+", lambda match: renamed.get(match.group(), match.group()), str(extent.value))
