"""What engines round on purpose, done to the reference: by hand, and through a whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reference.checkpoint import Checkpoint, open_checkpoint
from reference.model import ContextLayer
from reference.oracle import Oracle
from reference.rounding import Rounding, round_blocks, round_float8, round_half, round_vectors, unrounded
from reference.watched import WatchedOracle
from reference.weights import LM_HEAD
from tests.support.bundles import checkpoint

ROW = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def by_hand(row: np.ndarray, block: int) -> np.ndarray:
    """Each block as its scale times whole numbers, element by element."""
    rounded = np.zeros_like(row)
    for first in range(0, len(row), block):
        part = row[first : first + block]
        scale = np.float32(np.abs(part).max() / np.float32(127))
        for index, value in enumerate(part):
            whole = np.float32(round(float(value / scale))) if scale else np.float32(0)
            rounded[first + index] = whole * scale
    return rounded


@pytest.mark.parametrize("block", [4, 16, 5, 64])
def test_blocks_are_rounded_to_whole_numbers_of_their_own_scale(block: int) -> None:
    """The last block may be a part of one, and a block of zeros stays what it is."""
    rng = np.random.default_rng(block)
    rows = rng.standard_normal((3, 2, 22)).astype(np.float32)
    rows[1, :, :block] = 0
    got = round_blocks(torch.from_numpy(rows), block).numpy()
    want = np.array([[by_hand(row, block) for row in pair] for pair in rows])
    np.testing.assert_array_equal(got, want)
    scale = np.abs(rows).max() / 127
    assert 0 < np.abs(got - rows).max() <= scale / 2 * 1.0001


def test_ties_go_to_the_even_number() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert round_blocks(x, 6).tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]]


def test_rounding_twice_is_rounding_once() -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    for rounded in (round_half, round_vectors):
        once = rounded(x)
        assert torch.allclose(rounded(once), once, rtol=1e-6, atol=0)
        assert not torch.equal(once, x)
    assert torch.equal(round_vectors(x), round_blocks(x, 7))
    assert round_half(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("blocks", "kv", "kind"),
    [
        ({}, "float32", "float32"),
        ({}, "float16", "float16"),
        ({}, "int8", "int8"),
        ({LM_HEAD: 32}, "float32", "int8"),
        ({LM_HEAD: 32}, "float16", "int8"),
    ],
)
def test_the_coarsest_type_names_the_budget(blocks: dict[str, int], kv: str, kind: str) -> None:
    assert Rounding(blocks, kv).kind == kind


def test_only_named_parameters_are_rounded_for() -> None:
    rounding = Rounding({"a": 4})
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    assert rounding.of("b") is unrounded
    assert torch.equal(rounding.of("a")(x), round_blocks(x, 4))


@pytest.fixture(scope="module", params=["mistral", "mixtral"])
def opened(request: pytest.FixtureRequest) -> Checkpoint:
    return open_checkpoint(checkpoint(architecture=request.param))


def test_a_layer_rounds_what_it_stores_and_what_it_multiplies(opened: Checkpoint) -> None:
    """Where each hook sits, told by what the layer's modules are given."""
    layer = ContextLayer(opened.config, 0, dtype=torch.float32)
    names = ("moe.gate_proj", "moe.down_proj") if layer.is_moe else ("mlp.gate_proj.weight", "mlp.down_proj.weight")
    blocks = {"layers.0.self_attn.o_proj.weight": 8} | {f"layers.0.{name}": 16 for name in names}
    Rounding(blocks, "int8").apply(layer, "layers.0.")
    assert layer.self_attn.round_kv is round_vectors
    seen: dict[str, torch.Tensor] = {}
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.update(o_proj=inputs[0]))
    x = torch.randn(3, layer.self_attn.o_proj.in_features, generator=torch.Generator().manual_seed(2))
    layer.self_attn.o_proj(x)
    assert torch.equal(seen["o_proj"], round_blocks(x, 8))
    if layer.is_moe:
        assert torch.equal(layer.moe.round_input(x), round_blocks(x, 16))
        assert torch.equal(layer.moe.round_gated(x), round_blocks(x, 16))
    else:
        layer.mlp.up_proj.register_forward_pre_hook(lambda _, inputs: seen.update(up_proj=inputs[0]))
        layer.mlp.up_proj(x)
        assert torch.equal(seen["up_proj"], x)


def test_eight_bits_hold_448_at_most() -> None:
    x = torch.tensor([0.0, 1.0625, 1.1, 2.0**-9, 2.0**-10, 448.0, 464.0, -464.0, 464.1, -1e4, torch.inf, torch.nan])
    nan = torch.nan
    expected = torch.tensor([0.0, 1.0, 1.125, 2.0**-9, 0.0, 448.0, 448.0, -448.0, nan, nan, nan, nan])
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(round_float8(x.to(dtype)), expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rounding", [Rounding(kv="float16"), Rounding(kv="int8"), Rounding({LM_HEAD: 16})])
def test_the_whole_model_moves_by_rounding_and_by_no_more(opened: Checkpoint, rounding: Rounding) -> None:
    oracle = Oracle(opened)
    (truth,) = oracle.logits([ROW], torch.float64)
    (rounded,) = oracle.logits([ROW], torch.float32, rounding=rounding)
    moved = float((rounded - truth).abs().max() / truth.abs().max())
    assert 1e-5 < moved < (0.02 if rounding.kv == "float16" else 0.2)
    assert torch.equal(oracle.logits([ROW], torch.float32)[0], Oracle(opened).logits([ROW], torch.float32)[0])


def test_the_watched_reference_rounds_as_the_reference_does(opened: Checkpoint) -> None:
    rounding = Rounding({LM_HEAD: 16, "layers.1.self_attn.q_proj.weight": 8}, "int8")
    *_, last = WatchedOracle(opened).stages(ROW, torch.float32, rounding)
    assert torch.equal(last["lm_head"], Oracle(opened).logits([ROW], torch.float32, rounding=rounding)[0])


def test_parameters_can_be_replaced(opened: Checkpoint) -> None:
    oracle = Oracle(opened, {LM_HEAD: lambda dtype: torch.zeros(opened.config.vocab_size, opened.config.hidden_size)})
    assert not oracle.logits([ROW], torch.float32)[0].any()
    *_, last = WatchedOracle(opened, {"norm.weight": lambda dtype: torch.zeros(opened.config.hidden_size)}).stages(
        ROW, torch.float32
    )
    assert not last["lm_head"].any()
