"""What looks like the experts of a mixture and is not, or cannot be read: refused, in words a person understands."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from graph_passes.driver import apply
from graph_passes.fuse import moe
from tests.graph_passes.gallery.experts import (
    SINGLE,
    STACKS,
    C,
    E,
    I,
    Program,
    gathered,
    mixtral,
    routed_graph,
    scattered,
    units,
)
from tests.support.graphs import serialised

REFUSED: dict[str, tuple[Program, str]] = {}
"""Name to program and the reason, as a regular expression."""


def refused(name: str, reason: str) -> Callable[[Program], Program]:
    """Adds a program that must not be fused."""

    def add(program: Program) -> Program:
        assert name not in REFUSED
        REFUSED[name] = (program, reason)
        return program

    return add


# What is another function.


@refused("a shared expert among the others", "'.*' is added among the experts .a shared expert.")
def shared(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    weight_NE, out = scattered(x, w, e), torch.tanh(x)
    for i in range(E):
        out = out + (F.silu(x @ g[i].T) * (x @ u[i].T)) @ d[i].T * weight_NE[:, i, None]
    return out


@refused("a bias before the activation", "not the same function of every element")
def biased_gate(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    gate = x @ g.mT + torch.linspace(-1, 1, I)
    return (((F.silu(gate) * (x @ u.mT)) @ d.mT) * scattered(x, w, e).mT[:, :, None]).sum(0)


@refused("tokens beyond an expert's capacity dropped", "CumSum has no place among the experts .*capacity")
def dropped(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    weight_NE = scattered(x, w, e)
    place = torch.cumsum((weight_NE > 0).long(), 0)
    return (units(x, g, u, d) * (weight_NE * (place <= 3)).mT[:, :, None]).sum(0)


@refused("weights below a threshold dropped", "Greater changes '.*', which is no product with the matrices")
def threshold(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return gathered(x, torch.where(w > 0.05, w, 0.0), e, g, u, d)


@refused("weights cut off at zero", "Relu changes '.*', which is no product with the matrices")
def cut_off(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return gathered(x, F.relu(w), e, g, u, d, F.relu)


@refused("an activation that is not known", "the activation is none that is known; the nearest, ")
def unknown_activation(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return gathered(x, w, e, g, u, d, F.elu)


@refused("softmax for an activation", "Softmax has no place among the experts .it is no function of single elements")
def softmax_activation(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return gathered(x, w, e, g, u, d, lambda gate: torch.softmax(gate, -1))


@refused("two activations", "the experts have several activations: relu, silu")
def two_activations(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    out, weight_NE = torch.zeros_like(x), scattered(x, w, e)
    for i in range(E):
        act = F.relu if i == E - 1 else F.silu
        out = out + (act(x @ g[i].T) * (x @ u[i].T)) @ d[i].T * weight_NE[:, i, None]
    return out


@refused("gate and up of different inputs", "the experts read '.*' and '.*', but must all read the same tokens")
def different_inputs(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    h = F.silu(x @ g.mT) * (torch.softmax(x, -1) @ u.mT)
    return ((h @ d.mT) * scattered(x, w, e).mT[:, :, None]).sum(0)


@refused("weights applied twice", "the router's weights are applied twice")
def weights_twice(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    weight_EN1 = scattered(x, w, e).mT[:, :, None]
    h = F.silu(x @ g.mT) * (x @ u.mT) * weight_EN1
    return ((h @ d.mT) * weight_EN1).sum(0)


@refused("weights before the activation", "looks like MixtureOfExperts .* but computes something else")
def weights_inside(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    weight_EN1 = scattered(x, w, e).mT[:, :, None]
    return ((F.silu((x @ g.mT) * weight_EN1) * (x @ u.mT)) @ d.mT).sum(0)


@refused("weights added at duplicate experts", "computes something else")
def duplicates(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    weight_NE = torch.zeros(x.shape[0], E).scatter_add(1, e * (e == 2), w)
    return (units(x, g, u, d) * weight_NE.mT[:, :, None]).sum(0)


@refused("the mean over the choices", "ReduceMean has no place among the experts")
def mean(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    h = F.silu(torch.einsum("nc,nkic->nki", x, g[e])) * torch.einsum("nc,nkic->nki", x, u[e])
    return (torch.einsum("nki,nkci->nkc", h, d[e]) * w[..., None]).mean(1)


PLACES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dropped behind the 64th token": lambda w, n: torch.where((n < 64)[:, None], w, 0.0),
    "masked behind the 64th token": lambda w, n: w * (n < 64)[:, None].float(),
    "those of the 64th token from there on": lambda w, n: w[torch.clamp(n, max=63)],
    "those of the first token behind the 64th": lambda w, n: w[torch.where(n < 64, n, 0)],
    "larger from 64 tokens on": lambda w, n: w * torch.clamp(torch.ones(n.shape[0]).sum() / 64, min=1.0),
}
"""What is done to weights [N, E] by the number of each token [N]: nothing, in a proof with a dozen tokens."""


def placed(change: Callable[[Tensor, Tensor], Tensor]) -> Program:
    def program(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
        weight_NE = change(scattered(x, w, e), torch.arange(x.shape[0]))
        return (units(x, g, u, d) * weight_NE.mT[:, :, None]).sum(0)

    return program


for _name, _change in PLACES.items():
    REFUSED[f"weights {_name}"] = (placed(_change), "depends on its place, or on the number of tokens")


@refused("weights of zero made one", "computes something else")
def zero_made_one(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return gathered(x, torch.where(w == 0, 1.0, w), e, g, u, d)


@refused("no gate", "an expert has three matrices, gate, up and down, but here are 2 stacks")
def ungated(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return ((F.silu(x @ g.mT) @ d.mT) * scattered(x, w, e).mT[:, :, None]).sum(0)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("MoE experts", "refused"))
    program, reason = REFUSED[name]
    model = routed_graph(program, STACKS)
    before = serialised(model)
    fused, refusals = apply(model, moe.RULE)
    assert fused == []
    assert serialised(model) == before
    assert any(re.search(reason, record.reason) for record in refusals), [str(record) for record in refusals]
    assert any(record.source for record in refusals)


def reasons(program: Callable[..., Tensor], extra: Mapping[str, tuple[int, ...]]) -> str:
    """Why the experts are refused."""
    fused, refusals = apply(routed_graph(program, extra), moe.RULE)
    assert fused == []
    return "; ".join(record.reason for record in refusals)


def loop_of_single(x: Tensor, w: Tensor, e: Tensor, *single: Tensor) -> Tensor:
    """Each expert with matrices of its own, as three Linear layers have them."""
    weight_NE, out = scattered(x, w, e), torch.zeros_like(x)
    for i in range(E):
        gate, up, down = single[i::E]
        out = out + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) * weight_NE[:, i, None]
    return out


def test_matrices_of_single_experts_must_be_stacked(record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("MoE experts", "refused"))
    reason = reasons(loop_of_single, SINGLE)
    assert re.search(
        r"each expert has matrices of its own \('\w+_\d' and 11 more\).*keep the experts' matrices in", reason
    )


def test_gate_and_up_in_one_weight_must_be_split(record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("MoE experts", "refused"))

    def whole(x: Tensor, w: Tensor, e: Tensor, joined: Tensor, d: Tensor) -> Tensor:
        weights = {"gate_up_proj": joined, "down_proj": d}
        out: Tensor = torch.func.functional_call(MixtralExperts(mixtral()), weights, (x, e, w))
        return out

    reason = reasons(whole, {"gate_up": (E, 2 * I, C), "down": (E, C, I)})
    assert re.search(
        r"gate and up lie in one weight .*'gate_up' \[4, 20, 12\].*make it a Concat of two weights", reason
    )


@pytest.mark.parametrize("place", ["gate", "down"])
def test_experts_with_biases_are_refused(place: str, record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("MoE experts", "refused"))

    def biased(x: Tensor, w: Tensor, e: Tensor, g: Tensor, u: Tensor, d: Tensor, bias: Tensor) -> Tensor:
        gate = torch.einsum("nc,nkic->nki", x, g[e]) + (bias[e] if place == "gate" else 0)
        out = torch.einsum("nki,nkci->nkc", F.silu(gate) * torch.einsum("nc,nkic->nki", x, u[e]), d[e])
        return ((out + bias[e] if place == "down" else out) * w[:, :, None]).sum(1)

    reason = reasons(biased, {**STACKS, "bias": (E, I if place == "gate" else C)})
    assert re.search(r"the experts have a bias, 'bias' \[4, 1[02]\], and MixtureOfExperts has none", reason)
