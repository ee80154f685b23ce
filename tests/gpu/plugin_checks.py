"""Plugin objects driven as TensorRT drives them, on the GPU at hand: create, configure, serialise, load, enqueue."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from runtime.errors import BackendError
from runtime.tensorrt.flavor import FLAVORS, Flavor, load_flavor
from tests.gpu.findings import Notebook
from tests.kernels.cuda.moe_cases import Mixture, mixture, truth_and_allowed
from tests.kernels.cuda.rolling_cases import RollingCase, RollingResults, check_attended, check_rings, inputs_of
from tests.support.kernel_devices import Buffer, Device

_STACKS = tuple(name for name in Mixture.__slots__ if name != "activation")


def installed_flavors(book: Notebook) -> list[Flavor]:
    """Those that load here; the others are noted."""
    found = []
    for name in FLAVORS:
        try:
            found.append(load_flavor(name))
            book.fact(f"{name} loads", found[-1].version)
        except BackendError as error:
            book.skip(name, str(error), expected=isinstance(error.__cause__, ModuleNotFoundError))
    if not found:
        book.skip("all of it", f"none of {', '.join(FLAVORS)} can be imported here")
    return found


def check_plugins(book: Notebook, device: Callable[[], Device]) -> None:
    """All plugins of every flavour that is installed."""
    flavors = installed_flavors(book)
    if not flavors:
        return
    where = device()
    chunk = RollingCase(50, 50 + 69, (3, 0, 2**31), (64, 0, 70), 70, heads=8, head_dim=64, seed=book.seed)
    for flavor in flavors:
        for ring, packed in itertools.product(("bfloat16", "float8"), (False, True)):
            name = f"{flavor.name}: {'Packed' * packed}RollingAttention, {ring} rings"
            book.check(name, partial(check_rolling, flavor, where, replace(chunk, ring=ring), packed))
        book.check(f"{flavor.name}: MoEGate", partial(check_gate, flavor, where, book.seed))
        book.check(
            f"{flavor.name}: MixtureOfExperts",
            partial(check_mixture, flavor, where, book.seed),
        )


def _plugin(flavor: Flavor, device: Device, name: str, attributes: dict[str, Any]) -> Any:
    from tests.support.plugin_driving import DrivenPlugin

    return DrivenPlugin(flavor, device, name, attributes)


def check_rolling(flavor: Flavor, device: Device, case: RollingCase, packed: bool = False) -> float:
    """The chunk, a step of single tokens, fewer rows, and the chunk again. Returns the share of the budget.

    packed: the plugin that reads query, key and value out of one tensor.
    """
    attributes = {"scale": case.problem.scale, "window": case.window, "interleaved": 0, "rounds": 0}
    if packed:
        attributes |= {"heads": case.heads, "kv_heads": case.kv_heads}
    plugin = _plugin(flavor, device, "PackedRollingAttention" if packed else "RollingAttention", attributes)
    one = replace(case, tokens=1, counts=tuple(min(count, 1) for count in case.counts), seed=case.seed + 1)
    least = replace(one, starts=case.starts[:1], counts=one.counts[:1])
    inputs = inputs_of(case)
    outputs = [inputs.query_BTHD, inputs.key_ring_BGSD, inputs.value_ring_BGSD]
    workspace_bytes = plugin.build(_arrays(least, packed), _arrays(case, packed), outputs)
    plugin.load()
    workspace = device.empty((workspace_bytes,), np.uint8)
    few = replace(one, starts=case.starts[:2], counts=one.counts[:2])
    return max(_run_rolling(plugin, device, step, workspace, packed) for step in (case, one, few, case))


def _arrays(case: RollingCase, packed: bool) -> list[Any]:
    """A node's inputs in their order."""
    inputs = inputs_of(case)
    projected = [inputs.query_BTHD, inputs.key_BTGD, inputs.value_BTGD]
    rest = [inputs.cos_BTd, inputs.sin_BTd, inputs.key_ring_BGSD, inputs.value_ring_BGSD]
    rows = [np.array(numbers, np.int64) for numbers in (case.starts, case.counts)]
    return [*([np.concatenate(projected, axis=2)] if packed else projected), *rest, *rows]


def _run_rolling(plugin: Any, device: Device, case: RollingCase, workspace: Buffer, packed: bool) -> float:
    inputs = inputs_of(case)
    buffers = [device.upload(array) for array in _arrays(case, packed)]
    attended = device.empty(inputs.query_BTHD.shape, inputs.query_BTHD.dtype)
    rings = buffers[-4:-2]
    plugin.run(buffers, [attended, *rings], workspace.address)
    for buffer in (*buffers, workspace):
        device.download(buffer)  # looks at what is around it
    results = RollingResults(device.download(attended), *(device.download(ring) for ring in rings))
    check_rings(case, inputs, results)
    return check_attended(case, inputs, results)


def check_gate(flavor: Flavor, device: Device, seed: int) -> None:
    """Experts exactly; weights to a few roundings of float32."""
    plugin = _plugin(flavor, device, "MoEGate", {"top_k": 2})
    logits_NE = np.random.default_rng(seed).standard_normal((50, 8), dtype=np.float32)
    logits, weight, expert = (
        device.upload(logits_NE), device.empty((50, 2), np.float32), device.empty((50, 2), np.int64)
    )  # fmt: skip
    plugin.build([logits_NE[:1]], [logits_NE], [weight, expert])
    plugin.load()
    plugin.run([logits], [weight, expert], 0)
    best_NK = np.argsort(-logits_NE, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(device.download(expert), best_NK)
    weights = np.exp(np.take_along_axis(logits_NE.astype(np.float64), best_NK, axis=1))
    np.testing.assert_allclose(device.download(weight), weights / weights.sum(axis=1, keepdims=True), rtol=2**-20)


def check_mixture(flavor: Flavor, device: Device, seed: int) -> float:
    """Both paths of one plugin. Returns the share of the budget."""
    largest = mixture(200, 2, 4, 136, 200, seed=seed)
    plugin = _plugin(flavor, device, "MixtureOfExperts", {"activation": largest.activation})
    high = [getattr(largest, name) for name in _STACKS]
    workspace_bytes = plugin.build([array[:1] for array in high[:3]] + high[3:], high, [largest.x_NC])
    plugin.load()
    workspace, worst = device.empty((workspace_bytes,), np.uint8), 0.0
    for tokens in (1, 3, 9, 200):
        case = largest.tokens(np.arange(tokens))
        inputs = [device.upload(getattr(case, name)) for name in _STACKS]
        y = device.empty(case.x_NC.shape, case.x_NC.dtype)
        plugin.run(inputs, [y], workspace.address)
        device.download(workspace)
        truth, allowed = truth_and_allowed(case)
        worst = max(worst, float((np.abs(device.download(y).astype(np.float64) - truth) / allowed).max()))
    return worst
