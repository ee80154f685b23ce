"""Every deliberate fault is caught by the proof, by far and whatever the random numbers are.

A fault counts as killed when region and node differ by at least ten times what rounding is allowed, for each of several
seeds: what is caught once in a while, or just so, would be caught by luck. The rate is printed below the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir
import pytest

from graph_passes.driver import apply
from graph_passes.driver_types import Match
from graph_passes.graph import Refusal
from graph_passes.prove import TOLERANCES, measure
from runtime.errors import ProofError
from tests.graph_passes import faults
from tests.graph_passes.faults import Place
from tests.graph_passes.layer_faults import LAYER_BLIND, LAYER_FAULTS, LAYER_PLACES
from tests.graph_passes.texts import fuse
from tests.support.graphs import canonical, serialised

PLACES = faults.PLACES | LAYER_PLACES
FAULTS = faults.FAULTS | LAYER_FAULTS
BLIND = faults.BLIND | LAYER_BLIND

SEEDS = range(5)
BY_FAR = 10.0


def before_last(place: Place) -> ir.Model:
    """The graph of a place before its last rule."""
    earlier = place.rules[:-1]
    return fuse(place.text, *earlier, weights=place.weights)[0] if earlier else canonical(place.text, *place.weights)


def matched(name: str) -> tuple[ir.Model, Match]:
    """The graph of a place before its last rule, and the one match that the rule finds there."""
    place = PLACES[name]
    model = before_last(place)
    rule, found = place.rules[-1], []
    for anchor in model.graph:
        if (anchor.domain, anchor.op_type) in rule.anchors:
            try:
                found.append(rule.match(model, anchor))
            except Refusal:
                continue
    (match,) = found
    return model, match


@pytest.mark.parametrize("name", PLACES)
def test_a_right_match_holds_for_every_seed(name: str) -> None:
    model, match = matched(name)
    for seed in SEEDS:
        assert measure(model, match, seed=seed).holds


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proof_kills(fault: str, record_property: Callable[[str, object], None]) -> None:
    name, change = FAULTS[fault]
    model, match = matched(name)
    proofs = [measure(model, change(match), seed=seed) for seed in SEEDS]
    margin = min(proof.error / TOLERANCES[proof.precision] for proof in proofs)
    record_property("mutation", (fault, margin))
    assert margin >= BY_FAR, f"{fault}: {[(proof.error, proof.precision) for proof in proofs]}"


@pytest.mark.parametrize("fault", BLIND)
def test_a_fault_that_overlooks_a_value_has_no_proof(
    fault: str, record_property: Callable[[str, object], None]
) -> None:
    name, change = BLIND[fault]
    model, match = matched(name)
    with pytest.raises(Refusal, match="the region also needs the data of"):
        measure(model, change(match))
    record_property("mutation", (fault, float("inf")))


@pytest.mark.parametrize("fault", [*FAULTS, *BLIND])
def test_the_driver_leaves_the_graph_alone(fault: str) -> None:
    name, change = (FAULTS | BLIND)[fault]
    place = PLACES[name]
    model = before_last(place)
    untouched, rule = serialised(model), place.rules[-1]
    faulty = replace(rule, match=lambda model, anchor: change(rule.match(model, anchor)))
    with pytest.raises(ProofError, match=f"{rule.name} in the model"):
        apply(model, faulty)
    assert serialised(model) == untouched
    assert apply(model, rule)[0]
