"""Graphs of one operator of Cierzo each, in the types and sizes that a test wants."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.ops.quantized_matmul import blocks, zero_bytes
from tests.support.ort_lowering import small

TYPES = {"float": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}

_STORED = """g ({rows}[B,T,24] x, float[10,24] v) => ({rows}[B,T,10] y) {{
    w = Cast <to = {stored}> (v)
    y = cierzo.StoredMatMul (x, w)
}}"""

_GATED = """g ({type}[B,T,40] gate, {type}[B,T,40] up) => ({type}[B,T,40] y) {{
    wide_gate = Cast <to = 1> (gate)
    wide_up = Cast <to = 1> (up)
    gated = cierzo.GatedActivation <activation = "{activation}"> (wide_gate, wide_up)
    narrow = Cast <to = {number}> (gated)
    y = Identity (narrow)
}}"""

_DENSE = """g ({x}[N,{C}] x, float[N,{E}] logits, {w}[{E},{I},{C}] gate, {w}[{E},{I},{C}] up, {w}[{E},{C},{I}] down)
    => ({x}[N,{C}] y)
{{
    weight, expert = cierzo.MoEGate <top_k = {K}> (logits)
    y = cierzo.MixtureOfExperts <activation = "{activation}"> (x, weight, expert, gate, up, down)
}}"""


def stored(rows: str = "float", weight: str = "float") -> ir.Model:
    """A StoredMatMul of 24 numbers to 10."""
    return small(_STORED.format(rows=rows, stored=int(TYPES[weight])))


def quantized(rows: str, scale: str, K: int, N: int, bits: int, size: int, zero: bool = False) -> ir.Model:
    """A QuantizedMatMul."""
    B, Z = blocks(K, size), zero_bytes(K, size, bits)
    zeros = f", uint8[{N},{Z}] z" if zero else ""
    return small(
        f"""g ({rows}[B,T,{K}] x, uint8[{N},{B},{size * bits // 8}] w, {scale}[{N},{B}] s{zeros})
            => ({rows}[B,T,{N}] y)
        {{
            y = cierzo.QuantizedMatMul <K = {K}, N = {N}, bits = {bits}, block_size = {size}> (x, w, s{", z" * zero})
        }}"""
    )


def gated(kind: str = "float16", activation: str = "silu", old: str = "", new: str = "") -> ir.Model:
    """A GatedActivation between casts, with a part of its text replaced."""
    text = _GATED.format(type=kind, activation=activation, number=int(TYPES[kind]))
    assert old in text
    return small(text.replace(old, new) if old else text)


def dense(
    E: int = 6, K: int = 2, C: int = 16, I: int = 24, x: str = "float", w: str = "float", activation: str = "silu"
) -> ir.Model:
    """A MoEGate and a MixtureOfExperts."""
    return small(_DENSE.format(E=E, K=K, C=C, I=I, x=x, w=w, activation=activation))


def quantized_experts(
    bits: int = 4, size: int = 32, zero: bool = False, C: int = 64, I: int = 128, x: str = "float"
) -> ir.Model:
    """A MoEGate and a QuantizedMixtureOfExperts of 3 experts; scales have the type of the rows."""

    def matrix(name: str, rows: int, columns: int) -> tuple[str, str]:
        B = blocks(columns, size)
        Z = zero_bytes(columns, size, bits)
        return (
            f"uint8[3,{rows},{B},{size * bits // 8}] {name}, {x}[3,{rows},{B}] s{name}",
            f"uint8[3,{rows},{Z}] z{name}",
        )

    matrices = [matrix(*each) for each in (("gate", I, C), ("up", I, C), ("down", C, I))]
    zeros = [zero_point for _, zero_point in matrices] if zero else []
    named = "gate, sgate, up, sup, down, sdown" + ", zgate, zup, zdown" * zero
    read = ", ".join([each for each, _ in matrices] + zeros)
    return small(
        f"""g ({x}[N,{C}] x, float[N,3] logits, {read}) => ({x}[N,{C}] y) {{
            weight, expert = cierzo.MoEGate <top_k = 2> (logits)
            y = cierzo.QuantizedMixtureOfExperts <activation = "silu", bits = {bits}, block_size = {size},
                hidden = {C}, intermediate = {I}, num_experts = 3, zero_points = {int(zero)}>
                (x, weight, expert, {named})
        }}"""
    )
