"""Spellings of a mixture's experts: all that sum the chosen gated units, weighted, become one MixtureOfExperts node.

Each program takes tokens [N, 12], weights and expert numbers [N, 2] of a router over four experts, and their matrices
gate and up [4, 10, 12] and down [4, 12, 10]. What is another
function is refused, in words; see `test_experts_refusals`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from graph_passes.driver import apply
from graph_passes.fuse import moe, moe_gate
from tests.graph_passes.gallery.experts import (
    STACKS,
    C,
    E,
    I,
    K,
    Program,
    feeds,
    gathered,
    mixtral,
    routed,
    scattered,
    units,
)
from tests.graph_passes.gallery.tracing import trace
from tests.support.graphs import op_types, run

SPELLINGS: dict[str, tuple[Program, str]] = {}
"""Name to program and activation."""


def spelling(name: str, activation: str = "silu") -> Callable[[Program], Program]:
    """Adds a program to the gallery under `name`."""

    def add(program: Program) -> Program:
        assert name not in SPELLINGS
        SPELLINGS[name] = (program, activation)
        return program

    return add


# Every expert on every token.


@spelling("dense, scattered weights")
def dense(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return (units(x, g, u, d) * scattered(x, w, e).mT[:, :, None]).sum(0)


@spelling("dense, weights before the last product")
def dense_weights_before(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    h = F.silu(x @ g.mT) * (x @ u.mT) * scattered(x, w, e).mT.unsqueeze(-1)
    return (h @ d.transpose(1, 2)).sum(dim=0)


@spelling("dense by einsum, sum included")
def dense_einsum(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    h = torch.einsum("nc,eic->nei", x, u) * F.silu(torch.einsum("nc,eic->nei", x, g))
    return torch.einsum("nei,eci,ne->nc", h, d, scattered(x, w, e))


@spelling("dense, one_hot")
def dense_one_hot(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    weight_NE = (F.one_hot(e, E).to(x.dtype) * w[..., None]).sum(1)
    return torch.einsum("enc,ne->nc", units(x, g, u, d), weight_NE)


@spelling("dense, one_hot by matmul")
def dense_one_hot_matmul(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    weight_NE = (w[:, None] @ F.one_hot(e, E).float()).squeeze(1)
    return (weight_NE[:, None] @ units(x, g, u, d).transpose(0, 1)).squeeze(1)


@spelling("dense, scatter_add")
def dense_scatter_add(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    weight_NE = torch.zeros(x.shape[0], E).scatter_add(1, e, w)
    return (units(x, g, u, d) * weight_NE.T[:, :, None]).sum(0)


@spelling("dense, the chosen outputs taken from all")
def dense_taken(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    out_NEC = units(x, g, u, d).transpose(0, 1)
    return (out_NEC.gather(1, e[:, :, None].expand(-1, -1, C)) * w[:, :, None]).sum(1)


@spelling("dense, gelu spelled out", "gelu")
def dense_gelu(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    gate = x @ g.mT
    h = 0.5 * gate * (1 + torch.erf(gate * 2**-0.5)) * (x @ u.mT)
    return ((h @ d.mT) * scattered(x, w, e).mT[:, :, None]).sum(0)


@spelling("dense, gelu_tanh", "gelu_tanh")
def dense_gelu_tanh(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    h = F.gelu(x @ g.mT, approximate="tanh") * (x @ u.mT)
    return ((h @ d.mT) * scattered(x, w, e).mT[:, :, None]).sum(0)


@spelling("dense, gate and up in one product")
def dense_joined(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    both = x @ torch.cat([g, u], 1).mT
    h = F.silu(both[..., :I]) * both[..., I:]
    return ((h @ d.mT) * scattered(x, w, e).mT[:, :, None]).sum(0)


@spelling("dense, up before gate in one product")
def dense_joined_other(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    up, gate = (x @ torch.cat([u, g], 1).mT).chunk(2, -1)
    return (((F.silu(gate) * up) @ d.mT) * scattered(x, w, e).mT[:, :, None]).sum(0)


# Matrices gathered for each choice.


@spelling("gathered, einsum")
def gathered_einsum(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return gathered(x, w, e, g, u, d)


@spelling("gathered, matmul, relu squared", "relu2")
def gathered_matmul(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    column = x[:, None, :, None]
    h = F.relu(g[e] @ column).square() * (u[e] @ column)
    return ((d[e] @ h).squeeze(-1) * w.unsqueeze(-1)).sum(1)


@spelling("gathered, one choice after the other")
def gathered_choices(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for k in range(K):
        gate = torch.bmm(g[e[:, k]], x.unsqueeze(-1)).squeeze(-1)
        up = torch.bmm(u[e[:, k]], x.unsqueeze(-1)).squeeze(-1)
        out = out + torch.bmm(d[e[:, k]], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1) * w[:, k : k + 1]
    return out


@spelling("gathered, weights scaled")
def gathered_scaled(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return gathered(x, w * 2.5, e, g, u, d)


@spelling("MixtralExperts of transformers, batched_mm")
def transformers_experts(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    weights = {"gate_up_proj": torch.cat([g, u], 1), "down_proj": d}
    out: Tensor = torch.func.functional_call(MixtralExperts(mixtral()), weights, (x, e, w))
    return out


@spelling("MixtralExperts of transformers, another activation", "gelu_tanh")
def transformers_experts_gelu(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    weights = {"gate_up_proj": torch.cat([g, u], 1), "down_proj": d}
    out: Tensor = torch.func.functional_call(MixtralExperts(mixtral("gelu_pytorch_tanh")), weights, (x, e, w))
    return out


# A loop over the experts.


@spelling("loop, weights where the number is the expert's")
def loop_equal(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(E):
        weight = ((e == i) * w).sum(-1, keepdim=True)
        out = out + (F.silu(x @ g[i].T) * (x @ u[i].T)) @ d[i].T * weight
    return out


@spelling("loop, scattered weights, linear")
def loop_scattered(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    weight_NE, out = scattered(x, w, e), torch.zeros_like(x)
    for i, (a, b, c) in enumerate(zip(g, u, d, strict=True)):
        out += F.linear(F.silu(F.linear(x, a)) * F.linear(x, b), c) * weight_NE[:, i, None]
    return out


@spelling("loop, chosen by where, stacked and summed", "relu")
def loop_where(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    parts = []
    for i in range(E):
        weight = torch.where(e == i, w, 0.0).sum(1)
        parts.append((F.relu(x @ g[i].T) * (x @ u[i].T)) @ d[i].T * weight[:, None])
    return torch.stack(parts).sum(0)


# Matrices in other layouts.


@spelling("down stored as [E, I, C]")
def down_turned(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return gathered(x, w, e, g, u, d)


@spelling("all stored the other way round")
def all_turned(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return dense(x, w, e, g, u, d)


TURNED = {"down stored as [E, I, C]": ("down",), "all stored the other way round": ("gate", "up", "down")}
"""The programs that get these stacks with their last two axes exchanged."""


@functools.cache
def traced_once(name: str) -> ir.Model:
    """The graph of a spelling, made once; a test takes a copy."""
    return traced(SPELLINGS[name][0], TURNED.get(name, ()))


def traced(program: Program, turned: tuple[str, ...] = ()) -> ir.Model:
    """The canonical graph of the routed program, with its gate fused."""
    shapes = {name: (s[0], s[2], s[1]) if name in turned else s for name, s in STACKS.items()}

    def straight(x: Tensor, logits: Tensor, *stacks: Tensor) -> Tensor:
        again = [v.mT if name in turned else v for name, v in zip(STACKS, stacks, strict=True)]
        return routed(program)(x, logits, *again)

    model = trace(straight, {"x": ("N", C), "logits": ("N", E), **shapes}, ["y"])
    assert len(apply(model, moe_gate.RULE)[0]) == 1
    return model


def assert_same(model: ir.Model, program: Program, arrays: dict[str, np.ndarray], turned: tuple[str, ...]) -> None:
    """The fused graph computes what the eager program does."""
    want = routed(program)(*(torch.from_numpy(array) for array in arrays.values())).numpy()
    fed = {k: np.ascontiguousarray(v.transpose(0, 2, 1)) if k in turned else v for k, v in arrays.items()}
    got = run(model, fed)["y"]
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * float(np.abs(want).max()))


@pytest.mark.parametrize("name", SPELLINGS)
def test_fuses(name: str, record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("MoE experts", "fused"))
    (program, activation), turned = SPELLINGS[name], TURNED.get(name, ())
    model = traced_once(name).clone()
    fused, refusals = apply(model, moe.RULE)
    assert len(fused) == 1, [str(record) for record in refusals]
    assert refusals == []
    assert fused[0].attributes == {"activation": activation}
    assert fused[0].precision in ("float64", "float32")
    assert set(op_types(model)) <= {"MoEGate", "Mul", "MixtureOfExperts", "Transpose"}
    assert op_types(model).count("Transpose") == len(turned)
    for tokens in (1, 9):
        assert_same(model, program, feeds(tokens, tokens), turned)
    alike = feeds(5, 5)
    alike["logits"][:] = [0.0, 4.0, -1.0, 5.0]
    assert_same(model, program, alike, turned)


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_expert_that_overflows_harms_only_the_tokens_that_chose_it(name: str) -> None:
    """Dense programs multiply infinity by zero there; the op is held against the gathered form, which does not."""
    (_, activation), turned = SPELLINGS[name], TURNED.get(name, ())
    model = traced_once(name).clone()
    assert apply(model, moe.RULE)[0]
    arrays = feeds(6, 6)
    arrays["logits"][:, 2] = -9.0
    for stack in STACKS:
        arrays[stack][2] *= 1e25
    act: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda gate: F.relu(gate).square(),
    }
    scale = 2.5 if name == "gathered, weights scaled" else 1.0

    def chosen(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
        return gathered(x, w * scale, e, g, u, d, act[activation])

    assert_same(model, chosen, arrays, turned)


class Block(nn.Module):
    """The unmodified block of transformers from [B, T, C], its two parameters joined from ours."""

    def __init__(self) -> None:
        super().__init__()
        self.block = MixtralSparseMoeBlock(mixtral()).eval()

    def forward(self, x: Tensor, router: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
        joined = torch.cat([g, u], 1)
        weights = {"gate.weight": router, "experts.gate_up_proj": joined, "experts.down_proj": d}
        out: Tensor = torch.func.functional_call(self.block, weights, (x,))
        return out


def test_fuses_the_block_of_transformers(record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("MoE experts", "fused"))
    block = Block()
    model = trace(block, {"x": ("B", "T", C), "router": (E, C), **STACKS}, ["y"])
    for rule in (moe_gate.RULE, moe.RULE):
        fused, refusals = apply(model, rule)
        assert len(fused) == 1, [str(record) for record in refusals]
    assert {"MoEGate", "MixtureOfExperts"} <= set(op_types(model)) <= {
        "MoEGate", "MixtureOfExperts", "Reshape", "Transpose", "MatMul", "Gemm", "Shape", "Concat", "Squeeze", "Slice",
    }  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 3, C), "router": (E, C), **STACKS}
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    want = block(*(torch.from_numpy(array) for array in arrays.values())).numpy()
    np.testing.assert_allclose(run(model, arrays)["y"], want, rtol=1e-4, atol=1e-4)
