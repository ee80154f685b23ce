"""The decisions of an export: defaults, capacities, kinds of layers, and contradictions refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from exporter.plan import ExportPlan, make_plan
from graph_passes.ops.moe import MIXTURE_OF_EXPERTS
from reference.config import ModelConfig, MoEConfig, RopeConfig
from runtime.errors import ExportError
from runtime.rolling_kv import required_capacity


def config(*windows: int | None, longest: int = 32768) -> ModelConfig:
    return ModelConfig(
        architecture="ministral",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=len(windows),
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        activation="silu",
        rope=RopeConfig(theta=10000.0),
        layer_windows=windows,
        moe=None,
        tie_word_embeddings=False,
        max_position_embeddings=longest,
        dtype="float32",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


@pytest.mark.parametrize(
    "windows,options,chunk,context",
    [
        ((4096,), {}, 256, None),  # Mistral 7B: far below the window
        ((128,), {}, 128, None),  # not above the window
        ((5,), {}, 16, None),  # but at least 16, for speed
        ((512, 100), {}, 100, None),  # the smallest window decides
        ((None,), {}, 256, 4096),  # 4096 positions unless asked for more
        ((None,), {"context": 9000}, 256, 9000),
        ((4096, None), {}, 256, 4096),
        ((None,), {"context": 12}, 12, 12),  # never above the context
        ((4, None), {"context": 8}, 8, 8),
        ((5,), {"chunk": 1}, 1, None),
        ((5,), {"chunk": 100}, 100, None),  # above the window is allowed, only not the default
        ((None,), {"chunk": 40, "context": 40}, 40, 40),
    ],
)
def test_defaults(windows: tuple[int | None, ...], options: dict[str, Any], chunk: int, context: int | None) -> None:
    plan = make_plan(config(*windows), **options)
    assert (plan.chunk, plan.context, plan.max_batch) == (chunk, context, 8)


def test_the_context_is_not_longer_than_the_checkpoint_was_trained_for() -> None:
    plan = make_plan(config(None, longest=100))
    assert (plan.context, plan.chunk) == (100, 100)


def test_layers_of_one_window_are_one_kind() -> None:
    plan = make_plan(config(7, None, 7, 7, 3, None), chunk=2, context=50)
    assert plan.kinds == (7, None, 3)
    assert plan.kind_of_layer == (0, 1, 0, 0, 2, 1)
    assert [plan.capacity(kind) for kind in range(3)] == [8, 50, 4]
    assert plan.template.num_layers == 3
    assert plan.template.layer_windows == (7, None, 3)
    assert plan.config.num_layers == 6


@pytest.mark.parametrize("chunk", [1, 3, 5, 9])
@pytest.mark.parametrize("window", [1, 5, 8])
def test_capacity_is_what_the_runtime_asks_for(window: int, chunk: int) -> None:
    assert make_plan(config(window), chunk=chunk).capacity(0) == required_capacity(window, chunk) == window + chunk - 1


@pytest.mark.parametrize("name", ["chunk", "max_batch", "context"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "8"])
def test_sizes_are_whole_numbers_above_zero(name: str, value: Any) -> None:
    with pytest.raises(ExportError, match=f"{name} is {value!r}, but must be a whole number of at least 1"):
        make_plan(config(None), **{name: value})


def test_a_context_means_nothing_to_a_model_that_slides_everywhere() -> None:
    assert make_plan(config(5, 6), context=100) == make_plan(config(5, 6))
    assert make_plan(config(5, 6), context=3).chunk == 16


@pytest.mark.parametrize("options, chunk", [({"chunk": 11, "context": 10}, 10), ({"chunk": 101}, 100)])
def test_a_chunk_is_never_above_the_context(options: dict[str, Any], chunk: int) -> None:
    assert make_plan(config(4, None, longest=100), **options).chunk == chunk


def mixture(
    experts: int, hidden: int, intermediate: int, *, head_dim: int = 8, window: int | None = None
) -> ExportPlan:
    moe, sizes = MoEConfig(num_experts=experts, top_k=2), config(window)
    sizes = replace(sizes, hidden_size=hidden, intermediate_size=intermediate, head_dim=head_dim)
    return make_plan(replace(sizes, architecture="mixtral", moe=moe))


@pytest.mark.parametrize("num_experts", [8, 64, 256])
@pytest.mark.parametrize("hidden, intermediate", [(64, 256), (512, 512), (4096, 14336)])
def test_what_is_proved_is_proved_at_its_own_size(num_experts: int, hidden: int, intermediate: int) -> None:
    """A region may hold its sizes as constants, so that examples of other sizes cannot be run through it."""
    plan = mixture(num_experts, hidden, intermediate)
    C, I = (plan.twin or plan).config.hidden_size, (plan.twin or plan).config.intermediate_size
    shapes = [("N", C), ("N", 2), ("N", 2), (num_experts, I, C), (num_experts, I, C), (num_experts, C, I)]
    _, _, _, gate, up, down = next(iter(MIXTURE_OF_EXPERTS.examples(np.random.default_rng(0), {}, shapes)))
    assert [gate.shape, up.shape, down.shape] == shapes[3:]


@pytest.mark.parametrize("sizes", [{"window": 31}, {"window": 37}, {"head_dim": 62}, {"head_dim": 74}])
def test_a_twin_has_no_size_of_its_model(sizes: dict[str, int]) -> None:
    """Neither a window nor half a head: one table of sizes must hold throughout both graphs."""
    twin = mixture(8, 4096, 14336, **sizes).twin
    assert twin is not None
    (size,) = sizes.values()
    assert not {twin.config.hidden_size, twin.config.intermediate_size} & {size, size // 2}


def test_a_plan_is_frozen() -> None:
    with pytest.raises(AttributeError):
        make_plan(config(5)).chunk = 3  # type: ignore[misc]


def test_a_context_past_the_end_of_dynamic_rope_is_refused() -> None:
    dynamic = replace(config(None, longest=100), rope=RopeConfig(1e4, "dynamic", 2.0), position_limit=100)
    assert make_plan(dynamic).context == make_plan(dynamic, context=100).context == 100
    with pytest.raises(ExportError, match=r"context is 101, but with RoPE of type dynamic .* position 100 only"):
        make_plan(dynamic, context=101)
