"""What the design of engines for ONNX Runtime's CUDA provider rests on, asked of the real provider on a stand-in.

Numbers are not computed there; which kernels a node is run by, and what a captured step copies and waits for, is real.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import pytest

from tests.support.cuda_graphs import (
    BFLOAT16,
    BOOL,
    FLOAT,
    FLOAT16,
    INT32,
    INT64,
    Value,
    causal_attention,
    nodes_of_engines,
    one_node,
    ring_decode,
    windowed_prefill,
)
from tests.support.onnxruntime_gpu import CPU, CUDA, Observed, place, run_python, run_step, run_steps

NARROW = {BFLOAT16: "bfloat16", FLOAT16: "float16"}
narrow = pytest.mark.parametrize("dtype", NARROW, ids=NARROW.values())
FLASH = re.compile(r"flash_fwd_(?:splitkv_)?kernel<.*>, (true|false), (true|false), (?:(?:true|false)(?:, )?)+>\(")
"""Its first two flags after the traits: whether it is causal, whether it has a window."""


def flash(observed: Observed) -> list[tuple[bool, bool]]:
    """Whether causal and whether with a window, of each launch of FlashAttention."""
    found = [FLASH.search(name) for name in observed.launches]
    return [(match[1] == "true", match[2] == "true") for match in found if match is not None]


def stage(observed: Observed, *kinds: str) -> list[str]:
    return [event.what for event in observed.during_capture if event.kind in kinds]


@narrow
@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_over_a_ring_is_flash_attention_in_a_cuda_graph(dtype: int, rows: int) -> None:
    observed = run_step(ring_decode(dtype, B=rows, cuda_graph=True, runs=3))
    assert observed.error is None
    assert observed.captured
    assert observed.assigned == {CUDA: {"Attention": 1, "TensorScatter": 2}}
    assert flash(observed) == [(False, False)] * 3, "two runs as they are, and the capture"
    assert any("splitkv_combine" in name for name in observed.launches), "few rows are spread over the multiprocessors"
    assert not [name for name in observed.launches if re.search("Transpose|Ungroup|Concat|Softmax", name)]
    assert observed.copies == ()
    assert stage(observed, "sync", "allocate", "free", "copy", "violation") == []
    later = [[event.kind for event in events] for events in observed.running[1:]]
    assert later == [["graph", "sync"]] * 2


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0"])
def test_other_gpus_run_it_by_the_same_kernels(capability: str) -> None:
    observed = run_step(ring_decode(BFLOAT16, cuda_graph=True), compute_capability=capability)
    assert observed.captured
    assert flash(observed) == [(False, False)] * 3


@narrow
def test_many_tokens_without_a_window_are_flash_attention(dtype: int) -> None:
    shapes = [(2, 64, 1), (512, 1024, 3), (5, 64, 3)]
    for observed in run_steps([causal_attention(dtype, T=tokens, L=slots, B=rows) for tokens, slots, rows in shapes]):
        assert observed.error is None
        assert flash(observed) == [(True, False)]
        assert observed.copies == ()


@narrow
def test_a_mask_is_not(dtype: int) -> None:
    """So a window cannot be told by a mask."""
    observed = run_step(causal_attention(dtype, T=5, L=64, masked=True))
    assert observed.error is None
    assert flash(observed) == []
    assert any("Ungroup" in name for name in observed.launches), "it repeats keys and values for every head"


@narrow
def test_many_tokens_with_a_window_are_flash_attention_over_pages(dtype: int) -> None:
    shapes = [(head_dim, window) for head_dim in (16, 64, 80, 128, 256) for window in (8, 300)]
    for observed in run_steps([windowed_prefill(dtype, window=window, D=head_dim) for head_dim, window in shapes]):
        assert observed.error is None
        assert flash(observed) == [(False, True)]
        assert observed.assigned == {CUDA: {"Gather": 2, "PagedAttention": 1}}
        assert observed.copies == ()


def test_a_window_of_a_real_model_too() -> None:
    observed = run_step(windowed_prefill(BFLOAT16, window=4096, B=1, T=512, H=32, G=8, D=128, L=4608))
    assert flash(observed) == [(False, True)]
    assert observed.copies == ()


def test_the_kernel_sees_as_many_keys_as_the_window_has() -> None:
    """FlashAttention takes how far back a query sees beside itself: i - j <= W - 1, which is i - j < W."""
    windows = (8, 9, 12)
    seen = []
    for observed in run_steps([windowed_prefill(BFLOAT16, window=w) for w in windows], arguments="flash_fwd_splitkv"):
        (shown,) = (event.what for event in observed.running[0] if event.kind == "argument")
        seen.append(np.frombuffer(bytes.fromhex(shown), np.int32))
    candidates = [
        at for at in range(len(seen[0])) if [int(numbers[at]) for numbers in seen] == [window - 1 for window in windows]
    ]
    assert len(candidates) == 1, "window_size_left"
    assert all(numbers[candidates[0] + 1] == 0 for numbers in seen), "window_size_right: causal"


def test_pages_are_written_in_place_or_not_at_all() -> None:
    observed = run_step(windowed_prefill(BFLOAT16, window=8, in_place=False))
    assert observed.error is not None
    assert "key_cache and key_cache_out must be the same buffer" in observed.error


def test_bounds_tell_how_many_blocks_of_queries_a_row_takes() -> None:
    """Without them a row gets as many as all rows together. Too small ones are believed: queries are left out."""
    steps = [windowed_prefill(BFLOAT16, window=8, B=3, T=128, bounds=bounds) for bounds in (True, False)]
    steps.append(replace(steps[0], values={**steps[0].values, "attention_bounds": np.array([64, 200], np.int32)}))
    grids = []
    for observed in run_steps(steps):
        assert observed.error is None
        assert observed.copies == ()
        grids += [event.grid for event in observed.running[0] if FLASH.search(event.what)]
    assert [blocks for blocks, _, _ in grids] == [2, 6, 1]


def test_a_reshape_between_the_rings_and_their_scratch_memory_copies_it() -> None:
    observed = run_step(windowed_prefill(BFLOAT16, window=8, reshaped=True))
    assert observed.error is None
    assert [event.what for event in observed.copies] == ["DtoD", "DtoD"]


@narrow
def test_the_nodes_of_engines_run_on_the_device_in_cuda_graphs(dtype: int) -> None:
    steps = nodes_of_engines(dtype)
    for name, observed in zip(steps, run_steps(list(steps.values())), strict=True):
        assert observed.error is None, name
        assert [sum(ops.values()) for ops in observed.assigned.values()] == [1], name
        assert observed.captured, name
        assert observed.violations == (), name
        assert stage(observed, "launch", "blas"), name
        assert stage(observed, "copy", "sync", "allocate") == [], name


def test_positions_and_choices_are_computed_on_the_device() -> None:
    steps = {
        f"{op} {dtype}": one_node(op, [("x", dtype, [4]), ("y", dtype, [4])], [("z", result, [4])], cuda_graph=True)
        for dtype in (INT32, INT64)
        for op, result in (
            *((op, dtype) for op in ("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max")),
            ("Less", BOOL),
        )
    }
    steps["Where"] = one_node(
        "Where", [("c", BOOL, [4]), ("x", INT64, [4]), ("y", INT64, [4])], [("z", INT64, [4])], cuda_graph=True
    )
    chosen: list[Value] = [("x", FLOAT, [3, 8]), ("i", INT64, [3, 2]), ("u", FLOAT, [3, 2])]
    steps["ScatterElements"] = one_node("ScatterElements", chosen, [("y", FLOAT, [3, 8])], axis=1, cuda_graph=True)
    for name, observed in zip(steps, run_steps(list(steps.values())), strict=True):
        assert observed.error is None, name
        assert observed.captured, name
        assert list(observed.assigned) == [CUDA], name


def test_what_waits_for_the_device_cannot_be_captured() -> None:
    step = one_node("NonZero", [("x", FLOAT, [4])], [("y", INT64, [1, 0])], cuda_graph=True)
    observed = run_step(step)
    assert observed.error is not None
    assert not observed.captured
    assert observed.violations[0] == "cudaMemcpyAsync of pageable memory during capture"


def test_a_node_without_a_kernel_for_the_device_is_refused_unless_the_cpu_may_run_it() -> None:
    step = one_node("Det", [("x", FLOAT, [3, 3])], [("y", FLOAT, [])])
    observed = run_step(step)
    assert observed.error is not None
    assert "fallback to CPU EP has been explicitly disabled" in observed.error
    placement = place(step.graph)
    assert placement.assigned == {CPU: {"Det": 1}}


def test_fused_nodes_and_copies_are_among_those_that_are_executed() -> None:
    graph = (
        '<ir_version: 11, opset_import: ["" : 24]>'
        "step (float[3, 3] x) => (float y) { s = Sigmoid(x)\n m = Mul(x, s)\n d = Det(m)\n y = Sigmoid(d) }"
    )
    placement = place(onnx.parser.parse_model(graph).SerializeToString())
    assert placement.assigned == {CPU: {"Det": 1}, CUDA: {"Mul": 1, "Sigmoid": 2}}
    assert placement.executed == {"QuickGelu": 1, "MemcpyToHost": 1, "Det": 1, "MemcpyFromHost": 1, "Sigmoid": 1}


SESSIONS = """
import onnxruntime as ort
graph, answer = bytes.fromhex(job), []
for fallback in ({}, {"enable_fallback": 0}):
    for refusing in "01":
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", refusing)
        try:
            session = ort.InferenceSession(graph, options, providers=["CUDAExecutionProvider"], **fallback)
            answer.append(session.get_providers()[0])
        except Exception as error:
            answer.append(str(error))
assert "CUDAExecutionProvider" in ort.get_available_providers(), "which says nothing of the machine"
"""
"""Sessions that may and may not fall back, in both places where that is said: four answers."""


def test_without_cudas_libraries_a_session_is_silently_one_of_the_cpu() -> None:
    """Unless nodes may not fall back to it; and which library is missing is in the log alone."""
    ran = run_python(SESSIONS, sigmoid().hex(), stand_in=False)
    assert "libcublasLt.so.13: cannot open shared object file" in ran.output
    assert ran.answer[0] == ran.answer[2] == CPU
    assert "fallback to CPU EP has been explicitly disabled" in ran.answer[1]
    assert ran.answer[1] == ran.answer[3]


def test_without_a_device_the_reason_is_raised_if_python_may_not_fall_back() -> None:
    """Python's part of ONNX Runtime tries again on the CPU, and where nodes may not fall back, that misleads."""
    ran = run_python(SESSIONS, sigmoid().hex(), compute_capability=None)
    assert "Falling back to ['CPUExecutionProvider'] and retrying" in ran.output
    assert ran.answer[0] == CPU
    assert "Conflicting session configuration" in ran.answer[1]
    assert all("CUDA failure 100: no CUDA-capable device is detected" in said for said in ran.answer[2:])


def sigmoid() -> bytes:
    graph = one_node("Sigmoid", [("x", FLOAT, [4])], [("y", FLOAT, [4])]).graph
    assert isinstance(graph, bytes)
    return graph
