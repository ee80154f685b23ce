"""The parts of `cierzo bench` that are arithmetic: contexts, costs of a graph, shares, sums of a profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.bench.contexts import plan_contexts
from exporter.bench.graph_cost import GraphCost, LinearCost, graph_cost
from exporter.bench.limits import BANDWIDTH, FLOAT_PEAK, INT8_PEAK, MachineLimits
from exporter.bench.profile import summed
from exporter.bench.report import Spread
from exporter.bench.rounds import PATIENCE, Counted, Rounds, Text
from exporter.bench.shares import Work, limits_of, share_of_peak, step_cost
from exporter.compile import export
from exporter.inspect import count_parameters
from exporter.machine import Int8Peak
from runtime import load, read_bundle
from runtime.errors import InputError
from runtime.kernels import kernels
from runtime.kernels.limits import int8_operations
from runtime.manifest import KVInfo, LayerKV
from runtime.profile import NodeRun, StepRun
from tests.support.bundles import checkpoint, exported, shared_traces
from tests.support.toy_bundle import ToyModel, write_toy_bundle


def kv(*windows: int | None, context: int | None = None, position_limit: int | None = None) -> KVInfo:
    """Buffers of layers with these windows."""
    layers = tuple(
        LayerKV(window, window + 3 if window is not None else context or 0, "", "", "", "") for window in windows
    )
    return KVInfo(
        dtype="float32", chunk=4, max_batch=1, context=context, position_limit=position_limit, layers=layers
    )  # fmt: skip


def test_contexts_follow_the_widest_window() -> None:
    plan = plan_contexts(None, kv(256, 1024), decode_tokens=8, rounds=3)
    assert (plan.again, plan.once, plan.left_out) == ((128, 1024, 4096), (32768,), ())
    assert plan.chosen


def test_contexts_end_where_the_positions_do() -> None:
    plan = plan_contexts(None, kv(1024, position_limit=20_000), decode_tokens=8, rounds=3)
    assert (plan.again, plan.once) == ((128, 1024, 4096), ())
    assert [item.what for item in plan.left_out] == ["context 32,768"]
    exact = plan_contexts("19976,19977", kv(1024, position_limit=20_000), decode_tokens=8, rounds=3)
    assert exact.once == (19_976,), "three groups of 8 tokens follow it"


def test_contexts_of_full_attention_leave_room_to_decode() -> None:
    assert plan_contexts(None, kv(None, context=4096), decode_tokens=48, rounds=3).again == (128, 1024, 4048)
    mixed = plan_contexts(None, kv(16, None, context=32_768), decode_tokens=48, rounds=3)
    assert (mixed.again, mixed.once) == ((128, 8192), (32_768 - 144,))
    with pytest.raises(InputError, match="There is no context to measure at: 1 tokens and 48 to decode"):
        plan_contexts(None, kv(None, context=48), decode_tokens=48, rounds=3)


def test_contexts_can_be_asked_for_in_windows() -> None:
    plan = plan_contexts(" 2W, 100,2w", kv(64), decode_tokens=1, rounds=1)
    assert (plan.again, plan.chosen) == ((100, 128), False)


@pytest.mark.parametrize("architecture", ["mistral", "mixtral"])
def test_the_graph_costs_what_the_config_says(architecture: str) -> None:
    made = exported(architecture=architecture, window=5)
    counted = count_parameters(made.opened().config)
    groups = dict(counted.groups or {})
    linear = sum(groups.get(name, 0) for name in ("attention", "mlp", "experts", "router", "lm_head"))
    idle = counted.total - (counted.active or 0)
    cost = graph_cost(read_bundle(made.bundle), ())
    assert sum(item.numbers for item in cost.linear) == linear
    assert cost.operations(1, 1, quantized=False) == 2 * (linear - idle)
    assert cost.operations(1, 0, quantized=False) == 2 * (linear - idle - groups["lm_head"])
    assert cost.operations(1, 1, quantized=True) == 0
    assert sum(item.bytes_read(1) for item in cost.linear) == 4 * (linear - idle)
    assert sum(item.bytes_read(1000) for item in cost.linear) == 4 * linear


@pytest.mark.parametrize("architecture", ["mistral", "mixtral"])
def test_a_quantised_graph_costs_its_packed_bytes(architecture: str, tmp_path: Path) -> None:
    source = checkpoint(architecture=architecture, window=5, hidden_size=64, intermediate_size=128)
    with shared_traces():
        bundle = export(source, tmp_path / "int8", weights="int8", block_size=32, scales="float16", prove=False)
    plain = graph_cost(read_bundle(exported(architecture=architecture, window=5, hidden_size=64,
                                            intermediate_size=128).bundle), ())  # fmt: skip
    cost = graph_cost(read_bundle(bundle), ())
    assert sum(item.numbers for item in cost.linear) == sum(item.numbers for item in plain.linear)
    quantised = [item for item in cost.linear if item.quantized]
    assert quantised
    for item in quantised:
        assert item.nbytes == item.numbers + 2 * item.numbers // 32, "a byte each, and a scale for 32"
    assert cost.operations(1, 1, quantized=True) == sum(item.operations(1, 1) for item in quantised)


def linear(op: str, numbers: int, *, quantized: bool = False, head: bool = False) -> LinearCost:
    return LinearCost(
        node=op, op=op, plugin=True, nbytes=numbers, numbers=numbers, chosen=1, experts=1, quantized=quantized,
        head=head,
    )  # fmt: skip


def test_shares_add_the_time_that_each_kind_takes_at_its_peak() -> None:
    limits = limits_of({BANDWIDTH: [5.0], FLOAT_PEAK: [10.0, 30.0, 20.0], INT8_PEAK: [100.0]})
    assert share_of_peak(Work(floats=40, int8s=300), 10.0, limits) == pytest.approx((40 / 20 + 300 / 100) / 10)
    without = limits_of({BANDWIDTH: [5.0], FLOAT_PEAK: [20.0]})
    assert without.int8_operations is None
    assert share_of_peak(Work(floats=40, int8s=300), 10.0, without) is None
    assert share_of_peak(Work(floats=40, int8s=0), 10.0, without) == pytest.approx(0.2)


def test_what_kernels_count_goes_before_what_is_worked_out() -> None:
    cost = GraphCost((linear("A", 70, quantized=True), linear("A", 30, quantized=True), linear("B", 7, head=True)), {})
    counted = {"A": Counted(4, 8, 360), "RollingAttention": Counted(4, 4, 44), "C": Counted(4, 4, 0)}
    step = step_cost(cost, counted, batch=1)
    assert [(read.op, read.nodes, read.bytes, read.counted) for read in step.reads] == [
        ("A", 2, 90, True),
        ("B", 1, 7, False),
    ]
    assert (step.weight_bytes, step.kv_bytes_read) == (97, 11)
    assert (step.float_operations, step.int8_operations, step.logit_operations) == (0, 200, 14)


def test_a_profile_is_the_mean_of_the_quick_steps() -> None:
    def step(scale: float, extra: float = 0.0) -> StepRun:
        nodes = (
            NodeRun("n0", "QuantizedMatMul", None, 4e-3 * scale),
            NodeRun("n1", "QuantizedMatMul", None, 2e-3 * scale),
            NodeRun("_inlfunc_RMSNorm_3", "Mul", "RMSNorm", 1e-3),
            NodeRun("m", "Mul", None, 3e-3),
        )
        return StepRun(6e-3 * scale + 5e-3 + extra, nodes)

    cost = GraphCost((linear("QuantizedMatMul", 100),), {"n0": "QuantizedMatMul", "n1": "QuantizedMatMul"})
    profile = summed(
        [step(1.0), step(2.0), step(9.0, extra=1.0)], cost, {"QuantizedMatMul": Counted(3, 6, 600)},
        tokens=1, context=9, batch=1, logits=1,
    )  # fmt: skip
    assert profile.steps == 2
    assert profile.milliseconds == pytest.approx(14.0)
    assert profile.between_milliseconds == pytest.approx(1.0)
    shown = [(row.op, row.kind, row.nodes, row.bytes, row.operations) for row in profile.rows]
    assert shown == [
        ("QuantizedMatMul", "kernel", 2, 200, 200),
        ("Mul", "op", 1, None, None),
        ("RMSNorm", "body", 1, None, None),
    ]
    assert [row.milliseconds for row in profile.rows] == pytest.approx([9.0, 3.0, 1.0])


def test_a_long_context_that_nobody_asked_for_is_left_out_when_it_takes_too_long(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "toy", ToyModel(windows=(300,), chunk=16))
    session = load(bundle, threads=1)
    for asked, measured in ((None, False), ("32w", True)):
        plan = plan_contexts(asked, session.manifest.kv, decode_tokens=1, rounds=1)
        assert plan.once == (9600,)
        rounds = Rounds(session, Text(37, 1), plan, rounds=1, prompt=None, decode_tokens=1)
        rounds.samples.reading[1] = [(1, float(PATIENCE))]  # a token a patience
        rounds._measure_once(9600)
        assert (9600 in rounds.samples.steps) == measured
        assert [item.what for item in rounds.samples.left_out] == ([] if measured else ["context 9,600"])


def test_progress_counts_every_token_and_ends(tmp_path: Path) -> None:
    session = load(write_toy_bundle(tmp_path / "toy", ToyModel(windows=(4,), chunk=3)), threads=1)
    plan = plan_contexts("5,9", session.manifest.kv, decode_tokens=2, rounds=2)
    seen: list[tuple[str, int, int]] = []
    rounds = Rounds(
        session, Text(37, 1), plan, rounds=2, prompt=6, decode_tokens=2, progress=lambda *report: seen.append(report)
    )
    samples = rounds.measure(lambda limit: None if limit == INT8_PEAK else 1.0)
    assert set(seen) >= {("measuring", 48, 48)}
    assert seen[-1] == ("measuring", 48, 48)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert samples.rates == {BANDWIDTH: [1.0, 1.0], FLOAT_PEAK: [1.0, 1.0]}
    assert {context: [len(group) for group in groups] for context, groups in samples.steps.items()} == {
        5: [2, 2],
        9: [2, 2],
    }


def test_the_limits_are_measured_in_a_process_of_their_own() -> None:
    with MachineLimits(1, bandwidth_bytes=1 << 20, matmul_size=64, int8_rounds=100) as limits:
        rates = [limits.measure(name) for name in (BANDWIDTH, FLOAT_PEAK, INT8_PEAK)]
    assert rates[0] is not None
    assert rates[1] is not None
    assert min(rates[0], rates[1]) > 0
    assert (rates[2] is None) == (int8_operations(1) is None)


def test_8_bit_operations_are_counted_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    one = int8_operations(1)
    assert one is None or int8_operations(1000) == 1000 * one
    active = kernels()
    if active is not None and active.isa in ("avx2", "avx512"):
        assert one is not None
        rate = Int8Peak(2, rounds=100)()
        assert rate is not None
        assert rate > 0
    monkeypatch.setenv("CIERZO_KERNELS", "off")
    assert int8_operations(1) is None
    assert Int8Peak(2, rounds=100)() is None


def test_a_spread_keeps_its_samples() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, (3.0, 1.0, 2.0))
