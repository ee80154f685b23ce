"""Deliberate faults in norms, in the whole of a layer's attention and in linear layers; see `faults`."""

from __future__ import annotations

from graph_passes.fuse import linear, rms_norm
from tests.graph_passes.faults import Change, Place, ahead, attributes, body, inputs, scaled
from tests.graph_passes.layer_texts import ROLLING, RULES
from tests.graph_passes.texts import LINEAR, NORM
from tests.support.graphs import mutate

LAYER_PLACES = {
    "norm": Place(NORM, (rms_norm.RULE,), ("weight",)),
    "layer": Place(ROLLING, RULES),
    "layer without window": Place(
        mutate(ROLLING, ("visible_a = And (seen_a, near_a)", "visible_a = Identity (seen_a)")), RULES
    ),
    "linear": Place(LINEAR, (linear.RULE,), ("weight",)),
}

LAYER_FAULTS: dict[str, tuple[str, Change]] = {
    # -- norm
    "epsilon of another model": ("norm", attributes(epsilon=1e-6)),
    "epsilon a thousandth larger": ("norm", attributes(epsilon=1.001e-5)),
    "epsilon outside the root": (
        "norm",
        body(("root = Sqrt (shifted)", "bare = Sqrt (mean) root = Add (bare, epsilon)")),
    ),
    "weight of the norm left away": ("norm", body(("Mul (normed, weight_C)", "Identity (normed)"))),
    "weight moved away from one": (
        "norm",
        body(ahead("y_C", "one = Sqrt (epsilon) more = Add (weight_C, one)"), ("(normed, weight_C)", "(normed, more)")),
    ),
    "mean over the tokens": ("norm", body(("<value_ints = [-1]>", "<value_ints = [-2]>"))),
    "mean over tokens and channels": ("norm", body(("<value_ints = [-1]>", "<value_ints = [-1, -2]>"))),
    "sum instead of mean": ("norm", body(("ReduceMean", "ReduceSum"))),
    "mean magnitude": ("norm", body(("Pow (x_C, two)", "Abs (x_C)"))),
    "no root": ("norm", body(("Sqrt (shifted)", "Identity (shifted)"))),
    "centred row": (
        "norm",
        body(
            ahead("square", "centre = ReduceMean <keepdims = 1> (x_C, last_axis) c = Sub (x_C, centre)"),
            ("Pow (x_C, two)", "Pow (c, two)"),
            ("Mul (x_C, inverse)", "Mul (c, inverse)"),
        ),
    ),
    # -- the whole of a layer's attention
    "neighbours turned in the layer": ("layer", attributes(interleaved=1)),
    "window of the layer one wider": ("layer", attributes(window=6)),
    "window of the layer one narrower": ("layer", attributes(window=4)),
    "window of the layer left away": ("layer", attributes(window=0)),
    "window for the layer without": ("layer without window", attributes(window=7)),
    "scale of the layer two thousandths larger": ("layer", scaled(1.002)),
    "cosine and sine of the layer exchanged": ("layer", inputs(0, 1, 2, 4, 3, 5, 6, 7, 8)),
    "key and value of the layer exchanged": ("layer", inputs(0, 2, 1, 3, 4, 5, 6, 7, 8)),
    "old rings of the layer exchanged": ("layer", inputs(0, 1, 2, 3, 4, 6, 5, 7, 8)),
    "start and count of the layer exchanged": ("layer", inputs(0, 1, 2, 3, 4, 5, 6, 8, 7)),
    "keys are not turned": ("layer", body(("CastLike (rotated_key,", "CastLike (key_BGTD,"))),
    "queries are not turned": (
        "layer",
        body(("        (rotated_query, held_key", "        (query_BHTD, held_key")),
    ),
    "values are turned too": (
        "layer",
        body(
            ahead(
                "stored_value",
                "turned = cierzo.RotaryEmbedding <interleaved: int = @interleaved> (value_BGTD, cos_BTd, sin_BTd)",
            ),
            ("CastLike (value_BGTD,", "CastLike (turned,"),
        ),
    ),
    "keys are turned backwards": (
        "layer",
        body(
            ahead("rotated_key", "back = Neg (sin_BTd)"),
            ("(key_like_cos, cos_BTd, sin_BTd)", "(key_like_cos, cos_BTd, back)"),
        ),
    ),
    "the old keys are attended to": ("layer", body(("CastLike (present_key_BGSD,", "CastLike (past_key_BGSD,"))),
    "the old values are attended to": ("layer", body(("CastLike (present_value_BGSD,", "CastLike (past_value_BGSD,"))),
    "values are attended to for keys": (
        "layer",
        body(("CastLike (present_key_BGSD,", "CastLike (present_value_BGSD,")),
    ),
    "values are stored as keys": ("layer", body(("CastLike (rotated_key,", "CastLike (value_BGTD,"))),
    "padding of the layer is written": (
        "layer",
        body(
            ahead("present_key_BGSD", "length = Shape <start = 1, end = 2> (key_BTGD) all = Max (length, count_B)"),
            ("(past_key_BGSD, marked_key, start_B, count_B)", "(past_key_BGSD, marked_key, start_B, all)"),
        ),
    ),
    "keys rounded to bfloat16": (
        "layer",
        body(
            ahead("stored_key", "narrow = Cast <to = 16> (rotated_key) rounded = CastLike (narrow, rotated_key)"),
            ("CastLike (rotated_key,", "CastLike (rounded,"),
        ),
    ),
    # -- linear
    "weight rounded to bfloat16": (
        "linear",
        body(
            ahead("weight", "narrow = Cast <to = 16> (weight_NK) wide = Cast <to = 1> (narrow)"),
            ("CastLike (weight_NK,", "CastLike (wide,"),
        ),
    ),
    "product a thousandth larger": (
        "linear",
        body(
            ahead("y_N", "f = Constant <value_float = 1.001> () f_like = CastLike (f, x_K) more = Mul (x_K, f_like)"),
            ("MatMul (x_K, ", "MatMul (more, "),
        ),
    ),
    "rows of the weight in another order": (
        "linear",
        body(
            ahead(
                "weight",
                "start = Constant <value_ints = [-1]> () end = Constant <value_ints = [-99]> () "
                "axis = Constant <value_ints = [0]> () turned = Slice (weight_NK, start, end, axis, start)",
            ),
            ("CastLike (weight_NK,", "CastLike (turned,"),
        ),
    ),
}

LAYER_BLIND: dict[str, tuple[str, Change]] = {
    "key for the value of the layer": ("layer", inputs(0, 1, 1, 3, 4, 5, 6, 7, 8)),
    "cosine for the sine of the layer": ("layer", inputs(0, 1, 2, 3, 3, 5, 6, 7, 8)),
    "one ring for both": ("layer", inputs(0, 1, 2, 3, 4, 5, 5, 7, 8)),
    "start for the count of the layer": ("layer", inputs(0, 1, 2, 3, 4, 5, 6, 7, 7)),
}
