"""QuantizedMixtureOfExperts: MixtureOfExperts with matrices of 4-bit or 8-bit numbers, as QuantizedMatMul has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_passes.ops.activations import activation_body
from graph_passes.ops.base import Arrays, Attributes, PluginOp, Shapes
from graph_passes.ops.quantized_matmul import MICROSOFT, blocks, product, zero_bytes

_MATRICES = ("gate", "up", "down")


def _body(attributes: Attributes) -> str:
    """Every expert on every token, one after the other, and chosen away where its weight is zero.

    Numbers of one expert are cut out of the stack by a constant index, which a runtime does once, when it loads.
    """
    experts = int(attributes["num_experts"])
    lines = [
        f"""
    axis_1 = Constant <value_ints = [1]> ()
    tokens = Shape <start = 0, end = 1> (x_NC)
    experts = Constant <value_ints = [{experts}]> ()
    tokens_experts = Concat <axis = 0> (tokens, experts)
    zero_raw = Constant <value_float = 0.0> ()
    zero = CastLike (zero_raw, x_NC)
    nothing_NE = Expand (zero, tokens_experts)
    weight_NE = ScatterElements <axis = 1> (nothing_NE, expert_NK, weight_NK)
    """
    ]
    for e in range(experts):
        lines.append(f"    number_{e} = Constant <value_int = {e}> ()")
        for name in _MATRICES:
            stacks = {"packed": f"{name}_ERBb", "scale": f"{name}_scale_ERB"}
            if attributes["zero_points"]:
                stacks["zero"] = f"{name}_zero_ERZ"
            lines += [
                f"    {name}_{part}_{e} = Gather <axis = 0> ({stack}, number_{e})" for part, stack in stacks.items()
            ]
        lines += [_product(name, e, "x_NC", "hidden", "intermediate", attributes) for name in ("gate", "up")]
        lines.append(activation_body(str(attributes["activation"]), f"gate_{e}", f"active_{e}", f"_{e}"))
        lines.append(f"    gated_{e} = Mul (active_{e}, up_{e})")
        lines.append(_product("down", e, f"gated_{e}", "intermediate", "hidden", attributes))
        before = f"sum_{e - 1}" if e else "zero"
        after = "y_NC" if e == experts - 1 else f"sum_{e}"
        lines.append(
            f"""
    index_{e} = Constant <value_ints = [{e}]> ()
    weight_{e} = Gather <axis = 1> (weight_NE, index_{e})
    weighted_{e} = Mul (down_{e}, weight_{e})
    unchosen_{e} = Equal (weight_{e}, zero)
    chosen_{e} = Where (unchosen_{e}, zero, weighted_{e})
    {after} = Add ({before}, chosen_{e})
    """
        )
    return "\n".join(lines)


def _product(name: str, expert: int, source: str, K: str, N: str, attributes: Attributes) -> str:
    zero = f"{name}_zero_{expert}" if attributes["zero_points"] else ""
    text = product(source, f"{name}_packed_{expert}", f"{name}_scale_{expert}", zero, f"{name}_{expert}", K, N)
    return text.replace(", )", ")")


def _examples(rng: np.random.Generator, attributes: Attributes, shapes: Shapes) -> Iterator[Arrays]:
    """One token and five, each with experts of its own; all numbers and zero points there are."""
    E, C, I, bits, size = (
        int(attributes[name]) for name in ("num_experts", "hidden", "intermediate", "bits", "block_size")
    )
    K = min(2, E)
    for N in (1, 5):
        x = rng.standard_normal((N, C), dtype=np.float32)
        weight = rng.random((N, K), dtype=np.float32)
        expert = np.stack([rng.permutation(E)[:K] for _ in range(N)]).astype(np.int64)
        matrices: list[npt.NDArray[Any]] = []
        zeros: list[npt.NDArray[Any]] = []
        for rows, columns in ((I, C), (I, C), (C, I)):
            B = blocks(columns, size)
            matrices.append(rng.integers(0, 256, (E, rows, B, size * bits // 8), dtype=np.uint8))
            matrices.append(rng.random((E, rows, B), dtype=np.float32) / 16)
            zeros.append(rng.integers(0, 256, (E, rows, zero_bytes(columns, size, bits)), dtype=np.uint8))
        yield x, weight, expert, *matrices, *(zeros if attributes["zero_points"] else ())


QUANTIZED_MIXTURE_OF_EXPERTS = PluginOp(
    name="QuantizedMixtureOfExperts",
    inputs=(
        *("x_NC", "weight_NK", "expert_NK"),
        *("gate_ERBb", "gate_scale_ERB", "up_ERBb", "up_scale_ERB", "down_ERBb", "down_scale_ERB"),
        *("gate_zero_ERZ", "up_zero_ERZ", "down_zero_ERZ"),
    ),
    outputs=("y_NC",),
    attributes={
        "activation": "string",
        **dict.fromkeys(("bits", "block_size", "hidden", "intermediate", "num_experts", "zero_points"), "int"),
    },
    body=_body,
    examples=_examples,
    imports=MICROSOFT,
    optional=3,
)
"""x [N, C], weight [N, K], expert int64 [N, K]; gate and up uint8 [E, I, B, b], down uint8 [E, C, B, b], each with
scales [E, R, B] and, with zero_points = 1, zero points [E, R, Z]; to y [N, C] as MixtureOfExperts gives it."""
