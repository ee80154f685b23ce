"""Engines with plugins, built by TensorRT-RTX without a GPU: what runs around a plugin, shapes, types, refusals."""

from __future__ import annotations

import pytest

from tests.support.plugin_builds import BuildResult, build_with_plugins
from tests.support.plugin_graphs import PluginGraph, attention_graph, mixture_graph
from tests.support.tensorrt_rtx import tensorrt_rtx

tensorrt_rtx()
ONE = (1, 1, 1)
PREFILL = {"B": (1, 1, 2), "T": (1, 4, 9)}
ROWS = {"B": (1, 2, 4), "T": ONE}
SINGLE = {"B": ONE, "T": ONE}


def built(graph: PluginGraph, dims: dict[str, tuple[int, int, int]], compute_capability: str = "8.9") -> BuildResult:
    result = build_with_plugins(graph.model(), [graph.profile(**dims)], compute_capability=compute_capability)
    assert result.failure is None
    assert result.built, result.errors
    return result


def running(result: BuildResult) -> list[str]:
    """The kinds of layers that run on the GPU: shape_call computes sizes on the host, a NoOp only renames."""
    return [kind for kind in result.kinds() if kind not in ("NoOp", "shape_call")]


@pytest.mark.parametrize(
    ("dims", "compute_capability"),
    [(PREFILL, "8.9"), (ROWS, "8.9"), (SINGLE, "8.9"), (SINGLE, "8.0"), (SINGLE, "8.6"), (PREFILL, "12.0")],
)
def test_nothing_runs_between_the_products_and_packed_attention(
    dims: dict[str, tuple[int, int, int]], compute_capability: str
) -> None:
    result = built(attention_graph(), dims, compute_capability)
    assert running(result) == ["gemm", "PluginV3", "gemm"]
    prefill = {"rolling_prefill", "rolling_write"} if dims == PREFILL else set()
    assert set(result.kernels) == {"rolling_decode"} | prefill
    assert result.serialized == 1


@pytest.mark.parametrize(("activations", "ring"), [("float16", "float16"), ("bfloat16", "float8")])
def test_rings_of_every_type_are_read_and_written_where_they_lie(activations: str, ring: str) -> None:
    for dims in (PREFILL, SINGLE):
        assert running(built(attention_graph(activations=activations, ring=ring), dims)) == ["gemm", "PluginV3", "gemm"]


def test_shapes_follow_from_the_inputs() -> None:
    result = built(attention_graph(), PREFILL)
    assert result.outputs == {"y": [-1, 1024], "present_key": [-1, 2, 24, 128], "present_value": [-1, 2, 24, 128]}
    result = built(mixture_graph(top_k=3), {"N": (1, 4, 20)})
    assert result.outputs == {"y": [-1, 1024], "weight": [-1, 3], "expert": [-1, 3]}


def test_attention_with_separate_projections_is_taken_too() -> None:
    result = built(attention_graph(packed=False), PREFILL)
    assert result.kinds().count("PluginV3") == 1
    assert result.kinds().count("gemm") == 4
    assert not {"kgen", "Reformat"} & set(result.kinds())
    assert result.outputs["present_key"] == [-1, 2, 24, 128]


@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_gate_and_mixture_read_the_experts_where_they_lie(element: str) -> None:
    for dims in ((1, 4, 20), ONE):
        result = built(mixture_graph(element=element), {"N": dims})
        *router, gate, mixture = running(result)
        assert (gate, mixture) == ("custom_layer", "custom_layer"), result.layers
        assert len(router) == 1, result.layers
        assert ("moe_gemm" in result.kernels) == (dims != ONE)
        assert {"moe_gate", "moe_decode_up", "moe_decode_down"} <= set(result.kernels)
        assert result.serialized >= 2  # a fused part of the graph keeps its plugins twice


def test_two_profiles_have_a_plugin_each() -> None:
    graph = attention_graph()
    result = build_with_plugins(graph.model(), [graph.profile(**SINGLE), graph.profile(**ROWS)])
    assert result.failure is None
    assert running(result) == ["gemm", "PluginV3", "gemm"] * 2
    assert result.serialized == 2


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (
            attention_graph(activations="float32"),
            "The plugin PackedRollingAttention of node 'layers.0.PackedRollingAttention': PackedRollingAttention takes "
            "projected in bfloat16 or float16, not in float32. Build with --arithmetic bfloat16 or float16, or without",
        ),
        (attention_graph(ring="float32"), "takes past_key in bfloat16 or float16 or float8, not in float32"),
        (attention_graph(head_dim=24), "head dims 16, 32, 64, 80, 96, 112, 128, 160, 192, 256, not 24"),
        (attention_graph(slots=10), "A ring of 10 slots is too small for 1 tokens with a window of 16: it needs 16"),
        (attention_graph(heads=3), "3 query heads cannot share 2 KV heads evenly"),
        (mixture_graph(element="float32"), "MixtureOfExperts takes x in bfloat16 or float16, not in float32"),
        (mixture_graph(hidden=1028), "multiples of 8, and the hidden size is 1028"),
        (mixture_graph(activation="swish"), "not bfloat16 with swish"),
        (mixture_graph(top_k=5), "choose up to 16 of up to 256 experts, not 5 of 4"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_what_no_kernel_computes_is_refused_before_anything_is_built(graph: PluginGraph, sentence: str) -> None:
    result = build_with_plugins(graph.model(), [graph.profile(**PREFILL, N=(1, 4, 20))])
    assert not result.parsed
    assert result.failure is not None
    assert sentence in result.failure


def test_a_chunk_that_does_not_fit_into_the_ring_is_refused_when_the_profile_says_so() -> None:
    graph = attention_graph(slots=20)
    result = build_with_plugins(graph.model(), [graph.profile(**PREFILL)])
    assert not result.built
    assert result.failure is not None
    assert "A ring of 20 slots is too small for 9 tokens with a window of 16: it needs 24" in result.failure


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("import runtime.tensorrt_plugins.rolling_attention as r; r.RollingAttention.workspace_bytes", "in workspace"),
        ("import runtime.tensorrt_plugins.callbacks as c; c.serialized", "in serialized"),
    ],
)
def test_failures_that_the_library_takes_no_notice_of_are_told_afterwards(broken: str, sentence: str) -> None:
    """TensorRT goes on without a workspace, or without fields in the plan, if its question for them fails."""
    graph = attention_graph()
    prelude = f"def fail(*arguments):\n    raise RuntimeError({sentence!r})\n{broken} = fail\n"
    result = build_with_plugins(graph.model(), [graph.profile(**SINGLE)], prelude=prelude)
    assert result.built
    assert result.failure is not None
    assert f"failed with RuntimeError: {sentence}. This is a fault of Cierzo's plugin" in result.failure


def test_a_node_without_its_plugin_is_not_built() -> None:
    graph = mixture_graph()
    result = build_with_plugins(graph.model(), [graph.profile(N=ONE)], plugins=["MoEGate"])
    assert not result.parsed
    assert result.failure is None
    assert "MixtureOfExperts" in "".join(result.errors)
