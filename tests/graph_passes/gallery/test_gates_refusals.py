"""What looks like a mixture's gate and is not: refused, in words a person understands."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph_passes.driver import apply
from graph_passes.fuse import moe_gate
from tests.graph_passes.gallery.gates import FLAT, ROWS, E, Gate, K, Shape, share
from tests.graph_passes.gallery.tracing import trace
from tests.support.graphs import serialised

REFUSED: dict[str, tuple[Gate, str, dict[str, Shape]]] = {}
"""Name to program, the reason as a regular expression, and the program's inputs."""


def refused(name: str, reason: str, **inputs: Shape) -> Callable[[Gate], Gate]:
    """Adds a program that must not be fused."""

    def add(program: Gate) -> Gate:
        assert name not in REFUSED
        REFUSED[name] = (program, reason, {"logits": FLAT} | inputs)
        return program

    return add


# Other weights.


@refused("no renormalisation", "weights are not renormalised: they are shares among all experts")
def not_renormalised(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return best, expert


@refused("divided by the sum over all", "weights are not renormalised: they are shares among all experts")
def over_all(x: Tensor) -> tuple[Tensor, Tensor]:
    probability = x.softmax(-1)
    best, expert = torch.topk(probability, K)
    return best / probability.sum(-1, keepdim=True), expert


@refused("a scaling factor for renormalisation", "weights are not renormalised: they are shares among all experts")
def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return best * 2.5, expert


@refused("sigmoid routing", "not the softmax over the best 3 of '.*', which comes from Sigmoid")
def sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.sigmoid(), K)
    return share(best), expert


@refused("sigmoid of the best", "Sigmoid changes the weights after TopK")
def sigmoid_of_best(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x, K)
    return best.sigmoid(), expert


@refused("a temperature for the weights alone", r"not the softmax over the best 3 of 'logits' \(off by")
def warm_weights(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x, K)
    return (best * 1.01).softmax(-1), expert


@refused("squared probabilities", r"not the softmax over the best 3 of 'logits' \(off by")
def squared(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return share(best * best), expert


@refused("normalised to length one", "ReduceL2 changes the weights after TopK")
def length_one(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return F.normalize(best, p=2.0, dim=-1), expert


@refused("1e-3 added to the sum", r"not the softmax over the best 3 of 'logits' \(off by")
def coarse_guard(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return best / (best.sum(-1, keepdim=True) + 1e-3), expert


@refused("1e-6 added to the sum", "looks like MoEGate .* computes something else")
def fine_guard(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return best / (best.sum(-1, keepdim=True) + 1e-6), expert


@refused("1e-12 added to a sum of exponentials", r"not the softmax over the best 3 of 'logits' \(off by")
def guard_of_powers(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.exp(), K)
    return best / (best.sum(-1, keepdim=True) + 1e-12), expert


@refused("clipped logits", "Clip changes the weights after TopK")
def clipped(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x, K)
    return best.clamp(-50.0, 50.0).softmax(-1), expert


@refused("the others marked by zero", r"not the softmax .* \(not a number for some logits\)")
def marked_by_zero(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x, K)
    chosen = torch.zeros_like(x).scatter(1, expert, best)
    return chosen.masked_fill(chosen == 0, -torch.inf).softmax(-1).gather(1, expert), expert


@refused("one weight treated in a way of its own", "Equal is no part of a gate")
def single_weight(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x, K)
    weight = best.softmax(-1)
    return torch.where(weight == 0.7, 0.0, weight), expert


@refused("logits rounded to half precision", "which comes from Cast and was rounded to FLOAT16")
def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.half().softmax(-1, dtype=torch.float32), K)
    return share(best), expert


@refused("raw probabilities read too", "the unnormalised probabilities are read elsewhere too")
def raw_read(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return share(best), expert + best.log().long()


# Other experts.


@refused("the smallest", "TopK takes the smallest scores, not the largest")
def smallest(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K, largest=False)
    return share(best), expert


@refused(
    "noise for the choice alone", "'add', which comes from Add, but the weights are made of more .'logits'.", noise=FLAT
)
def noisy(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    expert = torch.topk(x + noise, K).indices
    return x.gather(1, expert).softmax(-1), expert


@refused("bias-corrected choice", "chosen by '.*', which comes from Add, but the weights are made of more", bias=(E,))
def corrected(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    probability = x.sigmoid()
    expert = torch.topk(probability + bias, K, sorted=False).indices
    return share(probability.gather(1, expert)), expert


@refused("bias-corrected choice, softmax", "comes from Add, but the weights are made of more .'logits'.", bias=(E,))
def corrected_softmax(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    probability = x.softmax(-1)
    expert = torch.topk(probability + bias, K).indices
    return share(probability.gather(1, expert)), expert


@refused("group-limited routing", "not the softmax over the best 3 of 'masked_fill', which comes from Where")
def group_limited(x: Tensor) -> tuple[Tensor, Tensor]:
    probability = x.softmax(-1)
    groups = probability.view(-1, 4, 2).amax(-1)
    allowed = torch.zeros_like(groups).scatter(1, torch.topk(groups, 2).indices, 1.0)
    allowed = allowed[:, :, None].expand(-1, 4, 2).reshape(-1, E)
    best, expert = torch.topk(probability.masked_fill(allowed == 0, 0.0), K)
    return share(best), expert


@refused("ties to the higher expert", "among experts with equal logits it does not take the lowest number first")
def higher_first(x: Tensor) -> tuple[Tensor, Tensor]:
    expert = E - 1 - torch.topk(x.flip(-1), K).indices
    return x.gather(1, expert).softmax(-1), expert


@refused("in any order", "does not choose the experts with the largest logits, best first")
def unsorted(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x, K, sorted=False)
    return best.softmax(-1), expert


@refused("softmax over the tokens", "does not choose the experts with the largest logits, best first")
def softmax_of_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(0), K)
    return share(best), expert


@refused("top-k over the first axis", "the TopK does not run over the last axis", logits=(E, "N"))
def first_axis(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(0), K, dim=0)
    return share(best.T), expert.T


@refused("as many experts as there are rows", "the number of experts per token is not a constant", rows=("B", 2))
def variable(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), min(rows.shape[0], E))
    return share(best), expert


@refused("[B, T, E] never flattened", r"weights and experts are \[B, T, 3\] and are never made \[N, K\]", logits=ROWS)
def never_flattened(x: Tensor) -> tuple[Tensor, Tensor]:
    best, expert = torch.topk(x.softmax(-1), K)
    return share(best), expert


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, record_property: Callable[[str, object], None]) -> None:
    record_property("spelling", ("MoE gating", "refused"))
    program, reason, shapes = REFUSED[name]
    model = trace(program, shapes, ["weight", "expert"])
    before = serialised(model)
    fused, records = apply(model, moe_gate.RULE)
    assert fused == []
    assert records
    assert any(re.search(reason, record.reason) for record in records), [str(record) for record in records]
    assert all(record.source for record in records)
    assert serialised(model) == before


class Squashed(nn.Module):
    """A program whose lines the tracer notes."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best, expert = torch.topk(x, K)
        squashed = torch.tanh(best)
        return squashed.softmax(-1), expert


def test_names_the_node_where_it_broke_and_the_line_that_made_it() -> None:
    model = trace(Squashed(), {"x": FLAT}, ["weight", "expert"])
    _, (record,) = apply(model, moe_gate.RULE)
    assert record.distance == 1
    assert record.source == "squashed = torch.tanh(best)"
    assert "1 nodes on, Tanh changes the weights after TopK" in str(record)
