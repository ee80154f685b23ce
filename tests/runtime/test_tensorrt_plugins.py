"""Plugins driven as TensorRT drives them, with their CUDA kernels on the CPU: results against the ops' definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits
from runtime.kernels.cuda.rolling_attention import rolling_attention_workspace_bytes
from runtime.tensorrt_plugins.callbacks import PluginCallbacks, PreparingLauncher
from tests.kernels.cuda.moe_cases import Mixture, mixture, truth_and_allowed
from tests.kernels.cuda.rolling_cases import (
    RollingCase,
    RollingInputs,
    RollingResults,
    check_attended,
    check_rings,
    inputs_of,
)
from tests.support.cuda_cpu import LIMITS
from tests.support.kernel_devices import Buffer, CpuDevice
from tests.support.plugin_driving import DrivenPlugin, PreparedOnly
from tests.support.tensorrt_rtx import tensorrt_rtx

FLAVOR = tensorrt_rtx()
ONE = RollingCase(window=5, slots=10, starts=(3, 0, 23), counts=(1, 0, 1))
CHUNK = RollingCase(window=5, slots=10, starts=(3, 0, 23), counts=(4, 0, 2), tokens=4)


def attributes_of(case: RollingCase, packed: bool) -> dict[str, int | float]:
    one = {"scale": case.head_dim**-0.5, "window": case.window, "interleaved": int(case.interleaved), "rounds": 0}
    return {**one, "heads": case.heads, "kv_heads": case.kv_heads} if packed else one


def arrays_of(case: RollingCase, inputs: RollingInputs, packed: bool) -> list[Any]:
    """A node's inputs in their order."""
    projected = [inputs.query_BTHD, inputs.key_BTGD, inputs.value_BTGD]
    rest = [inputs.cos_BTd, inputs.sin_BTd, inputs.key_ring_BGSD, inputs.value_ring_BGSD]
    rows = [np.array(numbers, np.int64) for numbers in (case.starts, case.counts)]
    return [*([np.concatenate(projected, axis=2)] if packed else projected), *rest, *rows]


def rolling_plugin(
    device: CpuDevice, case: RollingCase, packed: bool = False, planned: DeviceLimits | None = None
) -> tuple[DrivenPlugin, int]:
    """The plugin of an engine for 1 to so many rows and tokens as the case has; and the bytes of its workspace."""
    name = "PackedRollingAttention" if packed else "RollingAttention"
    plugin = DrivenPlugin(FLAVOR, device, name, attributes_of(case, packed), planned)
    least = replace(case, starts=case.starts[:1], counts=(min(case.counts[0], 1),), tokens=1)
    low, high = (arrays_of(x, inputs_of(x), packed) for x in (least, case))
    inputs = inputs_of(case)
    workspace = plugin.build(low, high, [inputs.query_BTHD, inputs.key_ring_BGSD, inputs.value_ring_BGSD])
    plugin.load()
    return plugin, workspace


def run_rolling(plugin: DrivenPlugin, case: RollingCase, workspace: Buffer, packed: bool = False) -> None:
    """One step with the plugin, checked as the kernels' own tests check it."""
    device, inputs = plugin.device, inputs_of(case)
    buffers = [device.upload(array) for array in arrays_of(case, inputs, packed)]
    attended = device.empty(inputs.query_BTHD.shape, inputs.query_BTHD.dtype)
    rings = buffers[-4:-2]
    plugin.run(buffers, [attended, *rings], workspace.address)
    for buffer in (*buffers, workspace):
        device.download(buffer)  # looks at what is around it
    results = RollingResults(device.download(attended), *(device.download(ring) for ring in rings))
    check_rings(case, inputs, results)
    check_attended(case, inputs, results)


@pytest.mark.parametrize("packed", [False, True], ids=["three inputs", "packed"])
@pytest.mark.parametrize(
    "case",
    [
        CHUNK,
        replace(CHUNK, interleaved=True, activations="float16", ring="float16", seed=1),
        replace(CHUNK, ring="float8", window=0, starts=(3, 0, 6), seed=2),
    ],
    ids=["bfloat16", "float16 interleaved", "float8 full"],
)
def test_rolling_attention_computes_its_definition_for_chunks_and_single_tokens(
    case: RollingCase, packed: bool
) -> None:
    device = CpuDevice()
    plugin, workspace_bytes = rolling_plugin(device, case, packed)
    workspace = device.empty((workspace_bytes,), np.uint8)
    one = replace(case, tokens=1, counts=tuple(min(count, 1) for count in case.counts), seed=case.seed + 10)
    for step in (case, one, replace(one, starts=case.starts[:2], counts=one.counts[:2]), case):
        run_rolling(plugin, step, workspace, packed)


def test_kernels_are_prepared_once_for_a_shape_and_known_when_an_engine_is_built() -> None:
    plugin, workspace_bytes = rolling_plugin(CpuDevice(), CHUNK)
    workspace = plugin.device.empty((workspace_bytes,), np.uint8)
    built = set(plugin.shared.kernels)
    for case in (CHUNK, ONE, CHUNK, ONE):
        run_rolling(plugin, case, workspace)
    assert isinstance(plugin.launcher, PreparedOnly)
    assert plugin.launcher.prepared == built
    buffers = [plugin.device.upload(array) for array in arrays_of(ONE, inputs_of(ONE), False)]
    attended = plugin.device.empty(inputs_of(ONE).query_BTHD.shape, ml_dtypes.bfloat16)
    described = [[plugin._described(x) for x in part] for part in (buffers, [attended, *buffers[5:7]])]
    addresses = [x.address for x in buffers], [x.address for x in (attended, *buffers[5:7])]
    before = len(plugin.launcher.calls)
    plugin.running.enqueue(*described, *addresses, workspace.address, 0)
    assert len(plugin.launcher.calls) == before


def test_a_shape_that_was_not_announced_is_prepared_when_it_comes() -> None:
    plugin, workspace_bytes = rolling_plugin(CpuDevice(), CHUNK)
    plugin.running.on_shape_change = lambda inputs, outputs: None
    launchers, enqueue = plugin.shared.launchers, plugin.running.enqueue
    streams: list[int] = []

    def noted(stream: int) -> PreparingLauncher:
        streams.append(stream)
        return launchers(stream)

    plugin.running.shared = replace(plugin.shared, launchers=noted)
    plugin.running.enqueue = lambda *arguments: enqueue(*arguments[:-1], 0x57)
    run_rolling(plugin, ONE, plugin.device.empty((workspace_bytes,), np.uint8))
    assert set(streams) == {0x57}  # another one does not tell whether this one is captured, and nothing may be loaded


@pytest.mark.parametrize(("planned", "here", "needs_more"), [(1, 400, True), (1, 1, False), (400, 1, False)])
def test_a_device_of_another_size_than_planned_stays_within_the_planned_workspace(
    planned: int, here: int, needs_more: bool
) -> None:
    """Few multiprocessors are filled by fewer splits of a row, each of which leaves a part in the workspace."""
    case = RollingCase(window=200, slots=200, starts=(500,), counts=(1,), kv_heads=1)
    limits = [replace(LIMITS, multiprocessors=number) for number in (planned, here)]
    given, needed = (rolling_attention_workspace_bytes(case.problem, each) for each in limits)
    assert (needed > given) == needs_more, "the case is not the one that it is meant to be"
    device = CpuDevice(limits[1])
    plugin, workspace_bytes = rolling_plugin(device, case, planned=limits[0])
    assert workspace_bytes == given
    run_rolling(plugin, case, device.empty((workspace_bytes,), np.uint8))


def test_fewer_rows_may_need_more_workspace_than_all() -> None:
    """Eight rows fill the device without being split; one row is split to fill it."""
    eight = RollingCase(window=200, slots=200, starts=tuple(range(500, 508)), counts=(1,) * 8, kv_heads=1)
    one = replace(eight, starts=(500,), counts=(1,))
    device = CpuDevice()
    assert rolling_attention_workspace_bytes(eight.problem, LIMITS) == 0
    assert rolling_attention_workspace_bytes(one.problem, LIMITS) > 0
    plugin, workspace_bytes = rolling_plugin(device, eight)
    run_rolling(plugin, one, device.empty((workspace_bytes,), np.uint8))


def test_the_gate_computes_its_definition() -> None:
    device = CpuDevice()
    plugin = DrivenPlugin(FLAVOR, device, "MoEGate", {"top_k": 2})
    logits_NE = np.random.default_rng(0).standard_normal((5, 6), dtype=np.float32)
    logits_NE[1, 4] = logits_NE[1, 2] = 9
    logits, weight, expert = device.upload(logits_NE), device.empty((5, 2), np.float32), device.empty((5, 2), np.int64)
    assert plugin.build([logits_NE[:1]], [logits_NE], [weight, expert]) == 0
    plugin.load()
    plugin.run([logits], [weight, expert], 0)
    best_NK = np.argsort(-logits_NE, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(device.download(expert), best_NK)
    weights = np.exp(np.take_along_axis(logits_NE.astype(np.float64), best_NK, axis=1))
    np.testing.assert_allclose(device.download(weight), weights / weights.sum(axis=1, keepdims=True), rtol=2**-20)


@pytest.mark.parametrize("tokens", [1, 3, 9, 12])
def test_the_mixture_computes_its_definition_for_few_and_many_tokens(tokens: int) -> None:
    device = CpuDevice()
    case = mixture(tokens, 2, 4, 16, 24, element="float16", activation="gelu")
    plugin, workspace_bytes = mixture_plugin(device, mixture(12, 2, 4, 16, 24, element="float16", activation="gelu"))
    inputs = [device.upload(getattr(case, name)) for name in Mixture.__slots__ if name != "activation"]
    y, workspace = device.empty(case.x_NC.shape, case.x_NC.dtype), device.empty((workspace_bytes,), np.uint8)
    plugin.run(inputs, [y], workspace.address)
    device.download(workspace)
    truth, allowed = truth_and_allowed(case)
    assert (np.abs(device.download(y).astype(np.float64) - truth) <= allowed).all()


def mixture_plugin(device: CpuDevice, largest: Mixture) -> tuple[DrivenPlugin, int]:
    plugin = DrivenPlugin(FLAVOR, device, "MixtureOfExperts", {"activation": largest.activation})
    high = [getattr(largest, name) for name in Mixture.__slots__ if name != "activation"]
    low = [array[:1] for array in high[:3]] + high[3:]
    workspace_bytes = plugin.build(low, high, [largest.x_NC])
    plugin.load()
    return plugin, workspace_bytes


def test_a_plugin_is_made_of_what_it_serialises() -> None:
    case = replace(CHUNK, head_dim=80, interleaved=True)
    plugin, _ = rolling_plugin(CpuDevice(), case, planned=replace(LIMITS, multiprocessors=77))
    running: PluginCallbacks = plugin.running
    assert running.attributes == {**attributes_of(case, False), "scale": float(np.float32(80**-0.5))}
    assert running.planned == replace(LIMITS, multiprocessors=77)
    assert running.signature == plugin.built.signature
    moe, _ = mixture_plugin(CpuDevice(), mixture(9, 2, 4, 16, 24, activation="gelu_tanh"))
    assert moe.running.attributes == {"activation": "gelu_tanh"}


Breaking = Callable[[DrivenPlugin], None]


def _no_planned_device(plugin: DrivenPlugin) -> None:
    plugin.creator.planned = None


@pytest.mark.parametrize(
    ("attributes", "breaking", "sentence"),
    [
        ({"scale": 0.25, "interleaved": 0}, None, "has no attribute 'window'"),
        ({"scale": 0.25, "window": 5, "interleaved": 0}, _no_planned_device, "registered to run engines, not to build"),
    ],
)
def test_a_plugin_that_cannot_be_made_says_why(
    attributes: dict[str, int | float], breaking: Breaking | None, sentence: str
) -> None:
    plugin = DrivenPlugin(FLAVOR, CpuDevice(), "RollingAttention", attributes, node="layers.3.attention")
    if breaking is not None:
        breaking(plugin)
    inputs = arrays_of(ONE, inputs_of(ONE), False)
    with pytest.raises(BackendError, match=rf"RollingAttention of node 'layers.3.attention': .*{sentence}"):
        plugin.build(inputs, inputs, [inputs[0], *inputs[5:7]])


def _with(arrays: Sequence[Any], index: int, array: Any) -> list[Any]:
    return [*arrays[:index], array, *arrays[index + 1 :]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: _with(x, 0, x[0].astype(np.float32)), "takes query in bfloat16 or float16, not in float32"),
        (lambda x: _with(x, 1, x[1].astype(np.float16)), "takes key in bfloat16, not in float16"),
        (lambda x: _with(x, 6, x[6].astype(np.float16)), "takes past_value in bfloat16, not in float16"),
        (lambda x: _with(x, 7, x[7].astype(np.float32)), "takes start in int64, not in float32"),
        (lambda x: _with(x, 2, x[2][:, :, :1]), "given value of .* but G is 2 elsewhere"),
        (lambda x: _with(x, 8, x[8][:2]), "given count of .* but B is 3 elsewhere"),
        (lambda x: _with(_with(x, 3, x[3][..., :4]), 4, x[4][..., :4]), "cos and sin for 4 pairs"),
        (lambda x: _with(x, 5, x[5][..., 0]), "takes past_key with axes BGSD"),
        (lambda x: _with(_with(x, 5, x[5][:, :, :3]), 6, x[6][:, :, :3]), "ring of 3 slots is too small"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_when_the_engine_is_built(
    change: Callable[[Sequence[Any]], Sequence[Any]], sentence: str
) -> None:
    plugin = DrivenPlugin(FLAVOR, CpuDevice(), "RollingAttention", attributes_of(ONE, False))
    inputs = change(arrays_of(ONE, inputs_of(ONE), False))
    with pytest.raises(BackendError, match=sentence):
        plugin.build(inputs, inputs, [inputs[0], *inputs[5:7]])
    with pytest.raises(BackendError, match=rf"RollingAttention of node .*{sentence}"):
        plugin.shared.failures.raise_first()
    plugin.shared.failures.raise_first()  # told once


def test_a_packed_projection_of_other_heads_is_refused() -> None:
    case = replace(ONE, heads=2)
    plugin = DrivenPlugin(FLAVOR, CpuDevice(), "PackedRollingAttention", attributes_of(ONE, True))
    inputs = arrays_of(case, inputs_of(case), True)
    with pytest.raises(BackendError, match="given 6 heads, but 4 query heads and 2 KV heads make 8"):
        plugin.build(inputs, inputs, [inputs_of(ONE).query_BTHD, *inputs[3:5]])


def test_rings_that_are_not_written_in_place_are_refused() -> None:
    plugin, workspace_bytes = rolling_plugin(CpuDevice(), ONE)
    buffers = [plugin.device.upload(array) for array in arrays_of(ONE, inputs_of(ONE), False)]
    outputs = [plugin.device.upload(buffers_of) for buffers_of in arrays_of(ONE, inputs_of(ONE), False)[5:7]]
    workspace = plugin.device.empty((workspace_bytes,), np.uint8)
    attended = plugin.device.empty(inputs_of(ONE).query_BTHD.shape, ml_dtypes.bfloat16)
    with pytest.raises(BackendError, match="present_key must lie where past_key does"):
        plugin.run(buffers, [attended, *outputs], workspace.address)


def test_an_engine_for_another_architecture_is_refused() -> None:
    plugin, workspace_bytes = rolling_plugin(CpuDevice(), ONE, planned=DeviceLimits(144, 99 << 10, (8, 9)))
    with pytest.raises(BackendError, match=r"built for compute capability 8\.9, and this GPU has 9\.0"):
        run_rolling(plugin, ONE, plugin.device.empty((workspace_bytes,), np.uint8))
    with pytest.raises(BackendError, match=r"RollingAttention of node 'layers\.0\.node': .*8\.9"):
        plugin.shared.failures.raise_first()


def test_formats_and_types_are_taken_as_they_are_declared_and_no_others() -> None:
    """TensorRT goes through the tensors in order; what lies behind the one that it asks for holds anything yet."""
    trt = FLAVOR.trt
    plugin, _ = rolling_plugin(CpuDevice(), replace(CHUNK, activations="float16", ring="float8"))
    arrays = arrays_of(CHUNK, inputs_of(replace(CHUNK, activations="float16", ring="float8")), False)
    tensors = [*arrays, arrays[0], *arrays[5:7]]
    for position in range(len(tensors)):
        for dtype in trt.DataType.__members__.values():
            for layout in (trt.TensorFormat.LINEAR, trt.TensorFormat.CHW32):
                described = [plugin._range(array, array) for array in tensors]
                described[position].desc.type, described[position].desc.format = dtype, layout
                for later in described[position + 1 :]:
                    later.desc.type = trt.DataType.BOOL
                free = {0: {trt.DataType.BF16, trt.DataType.HALF}, 5: {trt.DataType.BF16, trt.DataType.HALF}}
                fits = {plugin._type(tensors[position])} | free.get(position, set())
                expected = dtype in fits and layout == trt.TensorFormat.LINEAR
                assert plugin.built.supports_format_combination(position, described, len(arrays)) == expected
