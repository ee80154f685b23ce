"""QuantizedMatMul's kernel against numpy, at every level of instructions, and beside its function body."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.ops.quantized_matmul import QUANTIZED_MATMUL
from tests.kernels import quantized_matmul_cases
from tests.kernels.quantized_matmul_cases import activations, matrix, product
from tests.support.kernels import Node, levels, run_cases

CASES = quantized_matmul_cases.cases()


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_products(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("level", levels()[:-1])
def test_products_at_a_lower_level(level: str) -> None:
    assert run_cases("quantized_matmul_cases", level).split()[0] == level


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rows", [1, 20])
def test_kernel_and_body_are_one_function(bits: int, zeros: bool, rows: int) -> None:
    """Both within what rounding the activations can do: half a step of each block times the weights it meets."""
    weight = matrix(48, 256, bits, 32, zeros, "float32")
    x = activations(rows, 256)
    functions = [ir.to_proto(f) for f in QUANTIZED_MATMUL.functions(weight.attributes)]
    inputs = {"x": x, **weight.inputs}
    body = Node("QuantizedMatMul", inputs, {"y": np.float32}, weight.attributes, native=False, functions=functions)
    kernel = Node("QuantizedMatMul", inputs, {"y": np.float32}, weight.attributes)
    step_MB = np.abs(x).reshape(rows, -1, 32).max(-1).astype(np.float64) / 127
    met_NB = np.abs(weight.dense_NK).reshape(48, -1, 32).sum(-1)
    allowed = 0.51 * step_MB @ met_NB.T
    exact = x.astype(np.float64) @ weight.dense_NK.T
    for node in (body, kernel):
        assert (np.abs(product(node, weight, x) - exact) <= allowed).all()
