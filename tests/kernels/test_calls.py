"""What concerns every kernel: outputs that cannot be had, sessions of several threads, and forked processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import SimpleQueue

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from tests.support.experts import Case, route
from tests.support.kernels import Array, Node

FLOAT = np.float32
Inputs = dict[str, Array | None]


def products(seed: int) -> tuple[Node, Inputs]:
    """A node that borrows memory for the length of a call: more rows than are multiplied as they lie."""
    rng = np.random.default_rng(seed)
    inputs: Inputs = {
        "x": rng.standard_normal((20 + 30 * seed, 64), dtype=FLOAT),
        "weight": rng.standard_normal((100, 64), dtype=FLOAT),
    }
    return Node("StoredMatMul", inputs, {"y": FLOAT}, {}, threads=2), inputs


def mixtures(seed: int) -> tuple[Node, Inputs]:
    """A node that borrows twice in a call."""
    rng = np.random.default_rng(seed)
    routing = route(Case(4, 2, 10 + 20 * seed, 32, 48), rng)
    inputs: Inputs = {"x": routing.x_NC, "weight": routing.weight_NK, "expert": routing.expert_NK}
    for name, shape in (("gate", (4, 48, 32)), ("up", (4, 48, 32)), ("down", (4, 32, 48))):
        inputs[name] = rng.standard_normal(shape, dtype=FLOAT)
    return Node("MixtureOfExperts", inputs, {"y": FLOAT}, {"activation": "silu"}, threads=2), inputs


def outcome(made: tuple[Node, Inputs]) -> npt.NDArray[np.float32]:
    node, inputs = made
    return np.asarray(node.run(inputs)["y"], FLOAT)


def test_sessions_of_several_threads_do_not_disturb_each_other() -> None:
    """Runs, and the making of further sessions, all at once; every result has the bits that it has alone."""
    made = [build(seed) for seed in range(4) for build in (products, mixtures)]
    expected = [outcome(one) for one in made]

    def repeated(i: int) -> None:
        for _ in range(20):
            np.testing.assert_array_equal(outcome(made[i]), expected[i])

    def rebuilt(i: int) -> None:
        for _ in range(5):
            np.testing.assert_array_equal(outcome((products, mixtures)[i % 2](i // 2)), expected[i])

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(work, i) for i in range(len(made)) for work in (repeated, rebuilt)]:
            done.result()


def _in_child(answer: SimpleQueue[list[float]]) -> None:
    answer.put(outcome(mixtures(1)).ravel().tolist())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # that is what is tested
def test_a_forked_process_has_sessions_of_its_own() -> None:
    expected = outcome(mixtures(1))
    context = multiprocessing.get_context("fork")
    answer: SimpleQueue[list[float]] = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(answer,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    np.testing.assert_array_equal(np.array(answer.get(), FLOAT), expected.ravel())


ONE, FOUR = np.ones((2, 4), FLOAT), np.ones(4, FLOAT)
RINGS: dict[str, Array] = {
    **{name: np.ones((1, 1, 1, 4), FLOAT) for name in ("query", "key", "value")},
    **{name: np.ones((1, 1, 2), FLOAT) for name in ("cos", "sin")},
    **{name: np.zeros((1, 1, 8, 4), FLOAT) for name in ("past_key", "past_value")},
    "start": np.zeros(1, np.int64),
    "count": np.ones(1, np.int64),
}
CALLS: dict[str, tuple[dict[str, Array], tuple[str, ...], Mapping[str, int | float | str]]] = {
    "RMSNorm": ({"x": ONE, "weight": FOUR}, ("y",), {"epsilon": 1e-5}),
    "GatedActivation": ({"gate": ONE, "up": ONE}, ("y",), {"activation": "silu"}),
    "StoredMatMul": ({"x": ONE, "weight": ONE}, ("y",), {}),
    "RollingAttention": (RINGS, ("y", "key_ring", "value_ring"), {"scale": 0.5, "window": 4, "interleaved": 0}),
}


@pytest.mark.parametrize("op, output", [(op, output) for op, (_, outputs, _) in CALLS.items() for output in outputs])
def test_an_output_of_another_shape_is_refused(op: str, output: str) -> None:
    inputs, outputs, attributes = CALLS[op]
    node = Node(op, inputs, dict.fromkeys(outputs, FLOAT), attributes)
    binding = node._session.io_binding()
    bound = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    for name, value in bound.items():
        binding.bind_ortvalue_input(name, value)
    wrong = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(3, FLOAT))
    for name in outputs:
        if name == output:
            binding.bind_ortvalue_output(name, wrong)
        else:
            binding.bind_output(name)
    with pytest.raises(Exception, match=f"{op} could not get an output: no memory is left, or one of another shape"):
        node._session.run_with_iobinding(binding)
