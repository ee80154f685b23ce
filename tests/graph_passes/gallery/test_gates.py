"""Spellings of a mixture's gate: all that make a softmax over the best experts' logits become one MoEGate node.

Each program takes logits [N, 8], or [B, T, 8], and gives weights [N, 3] and expert numbers [N, 3], best first. What is
another function is refused, in words; see `test_gates_refusals`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from graph_passes.driver import apply
from graph_passes.fuse import moe_gate
from tests.graph_passes.gallery.experts import mixtral
from tests.graph_passes.gallery.gates import FLAT, ROWS, E, Gate, K, Shape, share
from tests.graph_passes.gallery.tracing import trace
from tests.support.graphs import assert_same_outputs, op_types, run

Array = npt.NDArray[Any]

FUSED: dict[str, tuple[Gate, Shape]] = {}
"""Name to program and the shape of its logits."""

OUTSIDE: dict[str, tuple[Gate, set[str]]] = {}
"""Gates of other logits, or with more behind them: name to program and the operators that stay beside the node."""


def spelling(name: str, shape: Shape = FLAT) -> Callable[[Gate], Gate]:
    """Adds a gate."""
    return lambda program: FUSED.setdefault(name, (program, shape))[0]


def outside(name: str, *left: str) -> Callable[[Gate], Gate]:
    """Adds a gate beside which nodes stay."""
    return lambda program: OUTSIDE.setdefault(name, (program, set(left)))[0]


@spelling("softmax, top-k, division by the sum")
def softmax_first(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return share(best), expert


@spelling("top-k, softmax")
def top_k_first(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x, K)
    return best.softmax(-1), expert


@spelling("product with the reciprocal of the sum")
def reciprocal(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return best * best.sum(-1, keepdim=True).reciprocal(), expert


@spelling("divided in place")
def in_place(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(F.softmax(x.float(), dim=-1), K, dim=-1)
    best /= best.sum(dim=-1, keepdim=True)
    return best, expert


@spelling("softmax with a dtype, and back")
def with_dtype(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(F.softmax(x, dim=1, dtype=torch.float32), K)
    return share(best).to(x.dtype), expert


@spelling("a sort of all experts")
def sorted_all(x: Tensor) -> tuple[Tensor, Tensor]:
    value, order = torch.sort(x.softmax(-1), dim=-1, descending=True)
    return share(value[:, :K]), order[:, :K]


@spelling("top-k of all experts, then the first")
def top_all(x: Tensor) -> tuple[Tensor, Tensor]:
    value, order = torch.topk(x, E)
    return value[:, :K].softmax(-1), order[:, :K]


@spelling("softmax in pieces")
def in_pieces(x: Tensor) -> tuple[Tensor, Tensor]:
    power = torch.exp(x - x.amax(-1, keepdim=True))
    best, expert = torch.topk(power / power.sum(-1, keepdim=True), K)
    return share(best), expert


@spelling("log_softmax, top-k, exp, division")
def log_softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(F.log_softmax(x, -1), K)
    return share(best.exp()), expert


@spelling("exp less logsumexp of the best")
def logsumexp(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x, K)
    return torch.exp(best - best.logsumexp(-1, keepdim=True)), expert


@spelling("1e-20 added to the sum")
def guarded(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return best / (best.sum(-1, keepdim=True) + 1e-20), expert


@spelling("the sum kept above 1e-9")
def clamped(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return best / best.sum(-1, keepdim=True).clamp(min=1e-9), expert


@spelling("F.normalize")
def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return F.normalize(best, p=1.0, dim=-1), expert


@spelling("the others at minus infinity, softmax over all")
def masked(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x, K)
    return torch.full_like(x, -torch.inf).scatter(1, expert, best).softmax(-1).gather(1, expert), expert


@spelling("masked by zeros and ones, softmax over all")
def masked_by_ones(x: Tensor) -> tuple[Tensor, Tensor]:
    expert = torch.topk(x, K).indices
    chosen = torch.zeros_like(x).scatter(1, expert, 1.0)
    return x.masked_fill(chosen == 0, -torch.inf).softmax(-1).gather(1, expert), expert


@spelling("chosen by logits, probabilities gathered")
def gathered(x: Tensor) -> tuple[Tensor, Tensor]:
    expert = torch.topk(x, K).indices
    return share(x.softmax(-1).gather(-1, expert)), expert


@spelling("[B, T, E] flattened before", ROWS)
def flat_before(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.view(-1, E).softmax(-1), K)
    return share(best), expert


@spelling("[B, T, E] flattened after", ROWS)
def flat_after(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return share(best).reshape(-1, K), expert.reshape(-1, K)


@spelling("[B, T, E] flattened between", ROWS)
def flat_between(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x, K)
    return best.flatten(0, 1).softmax(-1), expert.flatten(0, 1)


@outside("a temperature", "Mul")
def temperature(x: Tensor) -> tuple[Tensor, Tensor]:
    return softmax_first(x * 1.01)


@outside("soft-capped logits", "Div", "Tanh", "Mul")
def capped(x: Tensor) -> tuple[Tensor, Tensor]:
    return top_k_first(torch.tanh(x / 30) * 30)


@outside("logits in the opposite order", "Slice", "Sub")
def turned(x: Tensor) -> tuple[Tensor, Tensor]:
    weight, expert = top_k_first(x.flip(-1))
    return weight, E - 1 - expert


@outside("a bias that chooses and weighs", "Add")
def biased(x: Tensor) -> tuple[Tensor, Tensor]:
    return softmax_first(x + torch.linspace(-1, 1, E))


@outside("a routed scaling factor", "Mul")
def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    weight, expert = softmax_first(x)
    return weight * 2.5, expert


@outside("a maximum over all tokens", "ReduceMax", "Sub")
def common_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(torch.exp(x - x.max()), K)
    return share(best), expert


def feeds() -> dict[str, Array]:
    """Logits [6, E] without equal ones: spread, nearly tied, and so far apart that most weights vanish."""
    rng = np.random.default_rng(0)
    near = 1 + 1e-5 * rng.permuted(np.tile(np.arange(E), (6, 1)), axis=1)
    normal = rng.standard_normal((6, E))
    kinds = {"spread": 3 * normal, "nearly tied": near, "extreme": 100 * normal}
    return {kind: logits.astype(np.float32) for kind, logits in kinds.items()}


def tied() -> Array:
    """Logits of few values: ties among the chosen, and across the border to the others."""
    rows = np.random.default_rng(0).integers(0, 3, (6, E)).astype(np.float32)
    rows[0] = 0
    return rows


def assert_same(got: dict[str, Array], weight: Array, expert: Array, note: str) -> None:
    """The same experts wherever a weight is left, and the same weights."""
    assert (got["expert"] == expert)[weight > 1e-30].all(), note
    np.testing.assert_allclose(got["weight"], weight, rtol=1e-5, atol=1e-6, err_msg=note)


def assert_as_eager(program: Gate, before: ir.Model, model: ir.Model, shape: Shape) -> None:
    """The fused graph against the eager program, and where logits are equal against the graph that it was."""
    for kind, logits in feeds().items():
        if program is common_maximum and kind == "extreme":
            continue  # it divides nothing by nothing there
        array = logits if shape == FLAT else logits.reshape(2, 3, E)
        weight, expert = program(torch.from_numpy(array))
        assert_same(run(model, {"logits": array}), weight.numpy(), expert.numpy(), kind)
    array = tied() if shape == FLAT else tied().reshape(2, 3, E)
    assert_same_outputs(before, model, {"logits": array})


@pytest.mark.parametrize("name", FUSED)
def test_fuses(name: str, record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("MoE gating", "fused"))
    program, shape = FUSED[name]
    model = trace(program, {"logits": shape}, ["weight", "expert"])
    before = model.clone()
    fused, refusals = apply(model, moe_gate.RULE)
    assert len(fused) == 1, [str(record) for record in refusals]
    assert fused[0].attributes == {"top_k": K}
    assert op_types(model).count("MoEGate") == 1
    assert set(op_types(model)) <= {"MoEGate", "Reshape", "Constant"}
    assert_as_eager(program, before, model, shape)
    logits = tied()
    expert = np.argsort(-logits, axis=-1, kind="stable")[:, :K]
    odds = np.exp(np.take_along_axis(logits, expert, -1))
    got = run(model, {"logits": logits if shape == FLAT else logits.reshape(2, 3, E)})
    assert_same(got, odds / odds.sum(-1, keepdims=True), expert, "tied")


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_no_part_of_the_gate_stays_outside(name: str, record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("MoE gating", "fused"))
    program, left = OUTSIDE[name]
    model = trace(program, {"logits": FLAT}, ["weight", "expert"])
    before = model.clone()
    fused, refusals = apply(model, moe_gate.RULE)
    assert len(fused) == 1, [str(record) for record in refusals]
    assert set(op_types(model)) == {"MoEGate", *left}
    assert_as_eager(program, before, model, FLAT)


def test_noise_on_the_logits_stays_outside(record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("MoE gating", "fused"))
    shapes = {"logits": FLAT, "noise": FLAT}
    model = trace(lambda x, noise: top_k_first(x + noise), shapes, ["weight", "expert"])
    assert len(apply(model, moe_gate.RULE)[0]) == 1
    assert op_types(model) == ["Add", "MoEGate"]
    spread, noise = feeds()["spread"], np.random.default_rng(1).standard_normal((6, E), dtype=np.float32)
    weight, expert = top_k_first(torch.from_numpy(spread + noise))
    assert_same(run(model, {"logits": spread, "noise": noise}), weight.numpy(), expert.numpy(), "noise")


def test_fuses_the_router_of_transformers(record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("MoE gating", "fused"))
    router = MixtralTopKRouter(mixtral())
    hidden, experts = router.weight.shape[1], router.weight.shape[0]
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    model = trace(router, {"x": ("B", "T", hidden)}, ["logits", "weight", "expert"])
    fused, refusals = apply(model, moe_gate.RULE)
    assert len(fused) == 1, [str(record) for record in refusals]
    assert fused[0].attributes == {"top_k": router.top_k}
    assert not {"TopK", "Softmax", "ReduceSum", "Div"} & set(op_types(model))
    assert 1 <= router.top_k < experts
    x = np.random.default_rng(0).standard_normal((2, 3, hidden), dtype=np.float32)
    with torch.no_grad():
        _, weight, expert = router(torch.from_numpy(x))
    assert_same(run(model, {"x": x}), weight.numpy(), expert.numpy(), "router")
