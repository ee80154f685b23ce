"""Lowered attention computes what Cierzo's own operators do: both graphs, on ONNX Runtime's CPU provider.

All buffers hold rubbish at first, past and present rings are one buffer, and all layers have one scratch memory, as on
a GPU. PagedAttention, which has no kernel here, is a function written from its documentation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from safetensors.torch import load_file, save_file

from exporter.compile import export
from graph_passes.lower.ort import attention
from runtime import Session
from runtime.engine_info import DECODE, PREFILL
from tests.graph_passes.lower.ort.attention_cases import Change, attention_nodes, case_of, set_attribute
from tests.support.bundles import Exported, exported, shared_traces
from tests.support.checkpoints import make_checkpoint
from tests.support.parity import Judge, Rows, boundary_lengths, feed, largest_error, random_rows, uneven_feeds
from tests.support.step_graphs import StepEngine

WINDOW, CHUNK = 5, 4

MODELS: dict[str, dict[str, Any]] = {
    "window": {"dtype": "bfloat16"},
    "a chunk as long as the window": {"dtype": "bfloat16", "chunk": WINDOW},
    "a chunk longer than the window": {"dtype": "bfloat16", "chunk": 9},
    "a window of one": {"dtype": "bfloat16", "window": 1},
    "no window": {"dtype": "bfloat16", "window": None, "context": 40},
    "windows by layer": {"architecture": "ministral", "layer_windows": (5, None, 5), "num_layers": 3, "context": 40},
    "heads wider than the hidden states": {"dtype": "float16", "head_dim": 24, "num_heads": 6, "num_kv_heads": 2},
    "mixture of experts": {"architecture": "mixtral", "dtype": "bfloat16"},
    "queries scaled by their positions": {"architecture": "ministral3", "dtype": "bfloat16"},
    "norms between projection and attention": {"architecture": "qwen3", "dtype": "bfloat16"},
    "biases, tied": {"architecture": "qwen2", "dtype": "float16", "tie": True},
}


def bundle(**settings: Any) -> Exported:
    return exported(**{"chunk": CHUNK, "window": WINDOW, **settings})


def stepped(session: Session) -> list[str]:
    """Which graph ran in each step."""
    engine = session._engine
    assert isinstance(engine, StepEngine)
    return engine.steps


@pytest.mark.parametrize("arithmetic", ["float32", "float16"])
@pytest.mark.parametrize("model", MODELS)
def test_lengths_around_the_window_in_uneven_pieces(model: str, arithmetic: str) -> None:
    """Rows of different lengths, which idle now and then, in steps of many tokens and of one, past the window."""
    exported_model = bundle(**MODELS[model])
    session, judge = case_of(exported_model, arithmetic).after(), Judge(exported_model, arithmetic=arithmetic)
    rows = random_rows(boundary_lengths(WINDOW, CHUNK)[-4:], judge.vocab_size, seed=6)
    for seed in (2, 3):
        judge.hold(session, rows, seed=seed)
    assert {PREFILL, DECODE} == set(stepped(session))


@pytest.mark.parametrize("length", boundary_lengths(WINDOW, CHUNK))
def test_each_length_at_once_and_token_by_token(length: int) -> None:
    """Before against after, in float32: a prompt in whole chunks, and one decoded from its first token."""
    model = bundle(dtype="bfloat16")
    case, judge = case_of(model, "float32"), Judge(model)
    rows = random_rows([length], judge.vocab_size, seed=length)
    whole, single = [rows], [[[token]] for token in rows[0]]
    allowed = judge.truth_and_budget(rows)[1].allowed
    before, after = case.before(), case.after()
    for feeds in (whole, single):
        assert largest_error(feed(before, feeds), feed(after, feeds)) <= allowed
    assert stepped(after).count(DECODE) >= length


def cut(rows: Rows, counts: list[list[int]]) -> list[Rows]:
    """The rows cut into feeds: counts[i][b] tokens of row b in feed i."""
    ends = np.cumsum(counts, axis=0)
    assert ends[-1].tolist() == [len(row) for row in rows]
    return [
        [row[end - count : end] for row, end, count in zip(rows, feed_ends, feed_counts, strict=True)]
        for feed_ends, feed_counts in zip(ends.tolist(), counts, strict=True)
    ]


@pytest.mark.parametrize("window", [WINDOW, None])
def test_rows_idle_in_steps_of_one_token_and_of_many(window: int | None) -> None:
    """What an idle row writes is overwritten or out of sight, with the ring empty, full, and wrapped several times."""
    model = bundle(dtype="bfloat16", window=window, context=40)
    counts = [[1, 4], [1, 0], [0, 1], [3, 0], [0, 4], [1, 1], [0, 1], [0, 1], [4, 0], [1, 0], [2, 4], [0, 3], [0, 3]]
    judge = Judge(model)
    rows = random_rows(np.sum(counts, axis=0).tolist(), judge.vocab_size, seed=8)
    truth, allowed = judge.truth_and_budget(rows)
    session = case_of(model, "float32").after()
    assert largest_error(truth, feed(session, cut(rows, counts))) <= allowed.allowed
    assert {DECODE, PREFILL} == set(stepped(session))


def test_full_attention_up_to_the_last_position_of_the_context() -> None:
    """A row at the end of its context is padded beyond it, where the buffer has slots for that."""
    model = bundle(dtype="bfloat16", window=None, context=12)
    counts = [[4, 4], [4, 1], [3, 0], [1, 4], [0, 3]]
    judge = Judge(model)
    rows = random_rows([12, 12], judge.vocab_size, seed=9)
    truth, allowed = judge.truth_and_budget(rows)
    assert largest_error(truth, feed(case_of(model, "float32").after(), cut(rows, counts))) <= allowed.allowed


def windows_of_two_lengths(model: onnx.ModelProto) -> None:
    set_attribute(attention_nodes(model)[1], "window", 3)


def interleaved(model: onnx.ModelProto) -> None:
    for node in attention_nodes(model):
        set_attribute(node, "interleaved", 1)


@pytest.mark.parametrize("change", [windows_of_two_lengths, interleaved])
def test_what_no_checkpoint_here_has(change: Any) -> None:
    """Before against after; the changed model has no oracle, so the budget is that of the model it was made from."""
    model = bundle(dtype="bfloat16", num_layers=3)
    case, judge = case_of(model, "float32", change), Judge(model)
    rows = random_rows(boundary_lengths(WINDOW, CHUNK)[-4:], judge.vocab_size, seed=4)
    allowed = judge.truth_and_budget(rows)[1].allowed
    feeds = uneven_feeds(rows, seed=5)
    before = feed(case.before(), feeds)
    assert largest_error(before, feed(case.after(), feeds)) <= allowed
    assert largest_error(before, feed(case_of(model, "float32").before(), feeds)) > allowed  # it was changed


def test_a_window_of_more_than_a_page() -> None:
    model = bundle(dtype="bfloat16", window=300, chunk=64, max_position_embeddings=1024)
    judge = Judge(model)
    rows = random_rows([300, 641], judge.vocab_size, seed=3)
    truth, allowed = judge.truth_and_budget(rows)
    counts = [[290, 299], [10, 1], [0, 1], [0, 340]]
    assert largest_error(truth, feed(case_of(model, "float32").after(), cut(rows, counts))) <= allowed.allowed


LARGE = 7
"""The token whose key or value is beyond float16."""


@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_what_float16_cannot_hold_shows(tmp_path: Path, projection: str) -> None:
    """One row of `projection` lies along the embedding of LARGE, so that no other token comes near 65,504."""
    source = make_checkpoint(tmp_path / "large", window=WINDOW)
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"][LARGE]
    norm = tensors["model.layers.0.input_layernorm.weight"]
    tensors[f"model.layers.0.self_attn.{projection}.weight"][0] = 2e4 * embedding / embedding.norm() / norm
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with shared_traces():
        large = Exported(source, export(source, tmp_path / "bundle", chunk=CHUNK, prove=False))
    texts = [[3, LARGE, 4, 5], [LARGE, 9, 8, 2], [1, 2, LARGE, 9], [4, 3, 2, 1]]
    expected = np.zeros((4, 4, 64), np.bool_)
    expected[0, 1:] = expected[1] = expected[2, 2:] = True
    session = case_of(large, "float16").after()
    whole = session.forward(texts)
    assert np.isnan(whole[expected]).all()
    assert np.isfinite(whole[3]).all()
    session.reset()
    single = np.concatenate([session.forward([[text[index]] for text in texts]) for index in range(4)], axis=1)
    np.testing.assert_array_equal(np.isnan(single), expected)
    assert np.isfinite(case_of(large, "float32").after().forward(texts)).all()


def off_by(name: str, amount: int) -> Change:
    """A fault: whoever reads the integer `name` reads so much more."""

    def change(model: onnx.ModelProto) -> None:
        makers = [index for index, node in enumerate(model.graph.node) if name in node.output]
        for index in makers:
            for node in model.graph.node:
                node.input[:] = [f"{name}.wrong" if value == name else value for value in node.input]
            model.graph.initializer.append(onnx.helper.make_tensor("amount", onnx.TensorProto.INT64, [], [amount]))
            wrong = onnx.helper.make_node("Add", [name, "amount"], [f"{name}.wrong"])
            model.graph.node.insert(index + 1, wrong)

    return change


@pytest.mark.parametrize("window", [WINDOW, None])
def test_every_number_that_attention_is_given_counts(window: int | None) -> None:
    """Whichever is off by one, it shows: the comparisons above would not pass by themselves."""
    model = bundle(dtype="bfloat16", window=window, context=40)
    case, judge = case_of(model, "float32"), Judge(model)
    rows = random_rows(boundary_lengths(WINDOW, CHUNK)[-4:], judge.vocab_size, seed=6)
    truth, allowed = judge.truth_and_budget(rows)
    names = {
        value.name
        for step in (PREFILL, DECODE)
        for node in case.lowered(step)[0].graph
        for value in node.outputs
        if str(value.name).startswith("attention.") and value.dtype == ir.DataType.INT64 and node.op_type != "Shape"
    }
    assert len(names) >= (20 if window else 2)
    feeds = [[row[:1] for row in rows], [row[1:2] for row in rows], *uneven_feeds([row[2:] for row in rows], seed=2)]
    assert largest_error(truth, feed(case.after(), feeds)) <= allowed.allowed

    def shows(name: str, amount: int) -> bool:
        try:
            logits = feed(case.after(off_by(name, amount)), feeds)
        except (Fail, RuntimeError):  # an index beyond its tensor
            return True
        return not largest_error(truth, logits) <= allowed.allowed

    # A position too many in a ring is the one that the next token overwrites and does not see.
    assert {name for name in sorted(map(str, names)) if not (shows(name, 1) or shows(name, -1))} == set()


def test_layers_that_share_memory_keep_their_order() -> None:
    """Without what `done` makes, ONNX Runtime gathers one layer's ring before another's is written."""
    model = bundle(dtype="bfloat16", num_layers=3)
    judge = Judge(model)
    rows = random_rows(boundary_lengths(WINDOW, CHUNK)[-4:], judge.vocab_size, seed=6)
    truth, allowed = judge.truth_and_budget(rows)
    with mock.patch.object(attention, "done", return_value=None):
        session = case_of(model, "float32").after()
    assert not largest_error(truth, feed(session, uneven_feeds(rows, seed=2))) <= allowed.allowed
