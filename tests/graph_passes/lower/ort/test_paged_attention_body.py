"""The function that stands for com.microsoft.PagedAttention here, against loops over its documentation."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.support.graphs import Arrays, parse, run
from tests.support.paged_attention import with_paged_body

H, G, D, PAGE = 4, 2, 8, 4
SCALE = 0.3


def model(window: int) -> ir.Model:
    """Pages of four slots, seven of them, three for each row."""
    cache = f"float[7,{PAGE},{G},{D}]"
    inputs = f"float[N,{H * D}] q, float[N,{G * D}] k, float[N,{G * D}] v, {cache} keys, {cache} values"
    text = f"""g ({inputs}, int32[R] cumulative, int32[B] past, int32[B,P] table, int32[2] bounds)
        => (float[N,{H * D}] y, {cache} new_keys, {cache} new_values) {{
        y, new_keys, new_values = com.microsoft.PagedAttention
            <num_heads = {H}, kv_num_heads = {G}, local_window_size = {window}, scale = {SCALE}>
            (q, k, v, keys, values, cumulative, past, table, , , , , , , , , bounds)
    }}"""
    made = parse(text)
    made.opset_imports["com.microsoft"] = made.graph.opset_imports["com.microsoft"] = 1
    proto = with_paged_body(ir.to_proto(made))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def feeds() -> Arrays:
    """Rows of 3, 0 and 5 new tokens behind 6, 2 and none, on pages in no order."""
    rng = np.random.default_rng(1)
    return {
        "q": rng.standard_normal((8, H * D), dtype=np.float32),
        **{name: rng.standard_normal((8, G * D), dtype=np.float32) for name in "kv"},
        **{name: rng.standard_normal((7, PAGE, G, D), dtype=np.float32) for name in ("keys", "values")},
        "cumulative": np.array([0, 3, 3, 8], np.int32),
        "past": np.array([6, 2, 0], np.int32),
        "table": np.array([[5, 2, 6], [1, 0, 0], [3, 4, 0]], np.int32),
        "bounds": np.array([5, 9], np.int32),
    }


def by_loops(given: Arrays, window: int) -> Arrays:
    keys, values = given["keys"].copy(), given["values"].copy()
    attended = np.zeros((8, H, D), np.float64)

    def slot(row: int, position: int) -> tuple[int, int]:
        return int(given["table"][row, position // PAGE]), position % PAGE

    def at(cache: NDArray[np.float32], row: int, position: int, head: int) -> NDArray[np.float64]:
        found: NDArray[np.float64] = cache[slot(row, position)][head].astype(np.float64)
        return found

    for row, past in enumerate(given["past"].tolist()):
        first, end = given["cumulative"][row : row + 2].tolist()
        for token in range(first, end):
            position = past + token - first
            keys[slot(row, position)] = given["k"][token].reshape(G, D)
            values[slot(row, position)] = given["v"][token].reshape(G, D)
            seen = [p for p in range(position + 1) if window < 0 or position - p < window]
            for head in range(H):
                query, shared = given["q"][token].reshape(H, D)[head], head // (H // G)
                scores = np.array([SCALE * float(query @ at(keys, row, p, shared)) for p in seen])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                found = [weight * at(values, row, p, shared) for weight, p in zip(weights, seen, strict=True)]
                attended[token, head] = np.sum(found, axis=0)
    return {"y": attended.reshape(8, H * D), "new_keys": keys, "new_values": values}


@pytest.mark.parametrize("window", [-1, 1, 3, 100])
def test_ragged_rows_on_scattered_pages(window: int) -> None:
    given = feeds()
    got, want = run(model(window), given), by_loops(given, window)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)
