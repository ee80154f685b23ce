"""Deliberate faults in matches and function bodies: what the proof is for.

Each stands for a mistake that somebody has made in this field, or could: a window that counts the current token twice,
heads grouped round robin, the wrong half turned, a slot modulo the wrong size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from graph_passes.driver_types import Match, Rule
from graph_passes.fuse import gated_activation, gqa, moe, moe_gate, rolling_kv, rope, sliding_window
from tests.graph_passes.texts import ATTENTION, EXPERTS, GATE, GATE_TOP_K_FIRST, RING, ROPE, SWIGLU
from tests.support.graphs import mutate

Change = Callable[[Match], Match]


@dataclass(frozen=True, slots=True)
class Place:
    """A graph in which the last of the rules fires, the others before it. weights: see `unbind`."""

    text: str
    rules: tuple[Rule, ...]
    weights: tuple[str, ...] = ()


PLACES = {
    "rope": Place(ROPE, (rope.RULE,)),
    "ring": Place(RING, (rolling_kv.RULE,)),
    "attention": Place(ATTENTION, (gqa.RULE,)),
    "window": Place(ATTENTION, (gqa.RULE, sliding_window.RULE)),
    "window 1": Place(mutate(ATTENTION, ("<value_int = 5>", "<value_int = 1>")), (gqa.RULE, sliding_window.RULE)),
    "no window": Place(mutate(ATTENTION, ("And (seen, near)", "Identity (seen)")), (gqa.RULE, sliding_window.RULE)),
    "gate": Place(GATE, (moe_gate.RULE,)),
    "gate, top-k first": Place(GATE_TOP_K_FIRST, (moe_gate.RULE,)),
    "experts": Place(EXPERTS, (moe.RULE,)),
    "swiglu": Place(SWIGLU, (gated_activation.RULE,)),
}


def attributes(**changed: int | float | str) -> Change:
    """The match with other attributes."""
    return lambda match: replace(match, attributes={**match.attributes, **changed})


def scaled(factor: float) -> Change:
    """The match with its scale times `factor`."""
    return lambda match: replace(
        match, attributes={**match.attributes, "scale": float(match.attributes["scale"]) * factor}
    )


def inputs(*order: int) -> Change:
    """The match with its inputs in another order, or one of them twice."""
    return lambda match: replace(match, inputs=tuple(match.inputs[index] for index in order))


def body(*replacements: tuple[str, str]) -> Change:
    """The op with another function body, as if the one in the file were wrong."""

    def change(match: Match) -> Match:
        def faulty(given: Mapping[str, int | float | str]) -> str:
            return mutate(match.op.body(given), *replacements)

        return replace(match, op=replace(match.op, body=faulty))

    return change


def ahead(name: str, statements: str) -> tuple[str, str]:
    """A replacement that puts `statements` before the one that makes `name`."""
    return f"{name} =", f"{statements}\n    {name} ="


TILED = """
    key_BHSD = Concat <axis = 1> (key_BGSD, key_BGSD)
    value_BHSD = Concat <axis = 1> (value_BGSD, value_BGSD)
    attended_BHTD = """
NEXT = """one = Constant <value_ints = [1]> ()
    later = Add (expert_NK, one)
    next = Mod (later, experts)
    weight_NE = S"""
ROTATION = "(x_BHTD, cos_BTd, sin_BTd)"
TOP_K = "TopK <axis = -1> (probability_NE, top_k_1)"

FAULTS: dict[str, tuple[str, Change]] = {
    # -- rotary embedding
    "interleaved halves": ("rope", attributes(interleaved=1)),
    "cosine and sine exchanged": ("rope", inputs(0, 2, 1)),
    "turned backwards": (
        "rope",
        body(ahead("rotated_BHTD", "back = Neg (sin_BTd)"), (ROTATION, "(x_BHTD, cos_BTd, back)")),
    ),
    "halves swapped": (
        "rope",
        body(
            ahead(
                "rotated_BHTD",
                "low, high = Split <axis = 3, num_outputs = 2> (x_BHTD) swapped = Concat <axis = 3> (high, low)",
            ),
            (ROTATION, "(swapped, cos_BTd, sin_BTd)"),
        ),
    ),
    "cosine off by a thousandth": (
        "rope",
        body(
            ahead("rotated_BHTD", "f = Constant <value_float = 1.001> () longer = Mul (cos_BTd, f)"),
            (ROTATION, "(x_BHTD, longer, sin_BTd)"),
        ),
    ),
    # -- ring write
    "start and count exchanged": ("ring", inputs(0, 1, 3, 2)),
    "positions run backwards": ("ring", body(("Add (start_B1, offset_T)", "Sub (start_B1, offset_T)"))),
    "position off by one": (
        "ring",
        body(("Add (start_B1, offset_T)", "Add (start_B1, late_T)"), ahead("start_B1", "late_T = Add (offset_T, one)")),
    ),
    "slot modulo one slot fewer": (
        "ring",
        body(
            ("Mod (position_BT, slots_1)", "Mod (position_BT, fewer)"), ahead("start_B1", "fewer = Sub (slots_1, one)")
        ),
    ),
    "slot modulo a constant": (
        "ring",
        body(
            ("Mod (position_BT, slots_1)", "Mod (position_BT, seven)"),
            ahead("start_B1", "seven = Constant <value_int = 7> ()"),
        ),
    ),
    "padding is written": ("ring", body(("Where (valid_B1T1, new_BGTD, held_BGTD)", "Identity (new_BGTD)"))),
    "one padding token is written": ("ring", body(("Less (offset_T, count_B1)", "LessOrEqual (offset_T, count_B1)"))),
    "new and held exchanged": (
        "ring",
        body(("(valid_B1T1, new_BGTD, held_BGTD)", "(valid_B1T1, held_BGTD, new_BGTD)")),
    ),
    # -- attention with a mask
    "scale a thousandth larger": ("attention", scaled(1.001)),
    "scale left away": ("attention", attributes(scale=1.0)),
    "scale of another head dim": ("attention", scaled(0.5**0.5)),
    "key and value exchanged": ("attention", inputs(0, 2, 1, 3)),
    "heads grouped round robin": (
        "attention",
        body(("attended_BHTD = ", TILED), ("key_BGSD, value_BGSD, visible", "key_BHSD, value_BHSD, visible")),
    ),
    "no mask": ("attention", body((", visible_B1TS)", ")"))),
    "mask upside down": (
        "attention",
        body(ahead("attended_BHTD", "hidden = Not (visible_B1TS)"), (", visible_B1TS)", ", hidden)")),
    ),
    "soft-capped scores": ("attention", body(("<scale", "<softcap = 50.0, scale"))),
    # -- attention over a ring
    "window one wider": ("window", attributes(window=6)),
    "window one narrower": ("window", attributes(window=4)),
    "window left away": ("window", attributes(window=0)),
    "window 2 for 1": ("window 1", attributes(window=2)),
    "full for window 1": ("window 1", attributes(window=0)),
    "window for full attention": ("no window", attributes(window=7)),
    "scale a thousandth smaller": ("window", scaled(0.999)),
    "key and value rings exchanged": ("window", inputs(0, 2, 1, 3, 4)),
    "start and count of attention exchanged": ("window", inputs(0, 1, 2, 4, 3)),
    "query position off by one": (
        "window",
        body(
            ("Add (start_B1, offset_T)", "Add (late_B1, offset_T)"),
            ahead("query_position_BT", "late_B1 = Add (start_B1, one)"),
        ),
    ),
    "last position off by one": ("window", body(("Sub (end_B1, one)", "Sub (end_B1, zero)"))),
    "slots count as positions": ("window", body(("Sub (last_B1, age_BS)", "Add (age_BS, zero)"))),
    "age modulo one slot more": (
        "window",
        body(("Mod (behind_BS, slots)", "Mod (behind_BS, more)"), ahead("behind_BS", "more = Add (slots, one)")),
    ),
    "empty slots are seen": ("window", body(("And (written, causal_inside)", "Identity (causal_inside)"))),
    "the future is seen": ("window", body(("And (causal, inside)", "Identity (inside)"))),
    "a token does not see itself": ("window", body(("causal = GreaterOrEqual", "causal = Greater"))),
    "the window's edge counts": ("window", body(("near = Less (", "near = LessOrEqual ("))),
    # -- MoE gate
    "one expert fewer": ("gate", attributes(top_k=1)),
    "one expert more": ("gate", attributes(top_k=3)),
    "not renormalised": ("gate", body(("Div (best_NK, total_N1)", "Identity (best_NK)"))),
    "renormalised by the largest": ("gate", body(("ReduceSum (best_NK, axis_1)", "ReduceMax (best_NK, axis_1)"))),
    "worst experts": ("gate", body(("TopK <axis = -1>", "TopK <axis = -1, largest = 0>"))),
    "ties go to the higher expert": (
        "gate",
        body(
            (
                f"best_NK, expert_NK = {TOP_K}",
                """start = Constant <value_ints = [-1]> () end = Constant <value_ints = [-99]> ()
                reversed_NE = Slice (probability_NE, start, end, axis_1, start)
                best_NK, place_NK = TopK <axis = -1> (reversed_NE, top_k_1)
                experts = Shape <start = 1> (logits_NE)
                last = Add (experts, start) expert_NK = Sub (last, place_NK)""",
            )
        ),
    ),
    "softmax sharpened": (
        "gate",
        body(
            ("Softmax <axis = -1> (logits_NE)", "Softmax <axis = -1> (hot_NE)"),
            ahead("probability_NE", "f = Constant <value_float = 1.01> () hot_NE = Mul (logits_NE, f)"),
        ),
    ),
    "one expert more, top-k first": ("gate, top-k first", attributes(top_k=3)),
    "not renormalised, top-k first": ("gate, top-k first", body(("Div (best_NK, total_N1)", "Identity (best_NK)"))),
    # -- experts
    **{
        f"{name} for silu": ("experts", attributes(activation=name))
        for name in ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh")
    },
    "gate and up exchanged": ("experts", inputs(0, 1, 2, 4, 3, 5)),
    "all tokens to the first choice of expert 0": (
        "experts",
        body(
            ("(nothing_NE, expert_NK, weight_like_x)", "(nothing_NE, first, weight_like_x)"),
            ahead("axis_0", "first = Sub (expert_NK, expert_NK)"),
        ),
    ),
    "the next expert": (
        "experts",
        body(
            ("(nothing_NE, expert_NK, weight_like_x)", "(nothing_NE, next, weight_like_x)"),
            ("weight_NE = S", NEXT),
        ),
    ),
    "weights left away": ("experts", body(("Mul (out_ENC, weight_EN1)", "Identity (out_ENC)"))),
    # -- gated activation
    "gate and up of the layer exchanged": ("swiglu", inputs(1, 0)),
    "gelu for silu in the layer": ("swiglu", attributes(activation="gelu")),
    "activation left away": ("swiglu", body(("Mul (active, up)", "Mul (gate, up)"))),
}
"""Name to the graph and the fault. Every one gives a node that runs, and other numbers than the region's."""

BLIND: dict[str, tuple[str, Change]] = {
    "one cosine for both": ("rope", inputs(0, 1, 1)),
    "count instead of start": ("ring", inputs(0, 1, 3, 3)),
    "start instead of count": ("ring", inputs(0, 1, 2, 2)),
    "key for value": ("attention", inputs(0, 1, 1, 3)),
    "count for start": ("window", inputs(0, 1, 2, 4, 4)),
    "gate for both": ("experts", inputs(0, 1, 2, 3, 3, 5)),
}
"""Faults that leave out a value which the graph reads: the proof has nothing to feed it with, and says so."""
