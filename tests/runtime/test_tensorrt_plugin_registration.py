"""Plugins in the library's registry: shared, refused, gone again; and failures that wait to be told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.errors import BackendError
from runtime.kernels.cuda.device_launcher import DeviceLauncher
from runtime.tensorrt_plugins import OPERATIONS, Registration, deregister, planned_device, register
from runtime.tensorrt_plugins.failures import Failures
from tests.support.tensorrt_rtx import tensorrt_rtx

FLAVOR = tensorrt_rtx()
ATTENTION = "RollingAttention"


def known(name: str = ATTENTION) -> bool:
    """Whether a parser or an engine would find the plugin."""
    registry = FLAVOR.trt.get_plugin_registry()
    return any(
        (creator.name, creator.plugin_namespace, creator.plugin_version) == (name, "cierzo", "1")
        for creator in registry.all_creators
    )


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    assert not any(map(known, OPERATIONS)), "a test left a plugin behind"


def test_plugins_are_known_as_long_as_somebody_has_registered_them() -> None:
    assert not known()
    first = register(FLAVOR, [ATTENTION, "MoEGate"])
    with register(FLAVOR, [ATTENTION]) as second:
        assert known()
        assert second.names == (ATTENTION,)
        deregister(first)
        assert known()
        assert not known("MoEGate")
    assert not known()


def test_every_plugin_can_be_registered_for_every_gpu_that_has_kernels() -> None:
    for compute_capability in ("8.0", "8.6", "8.9", "9.0", "12.0"):
        with register(FLAVOR, OPERATIONS, compute_capability=compute_capability):
            assert all(map(known, OPERATIONS))


def test_engines_are_not_built_and_run_with_the_same_plugins() -> None:
    with register(FLAVOR, [ATTENTION], compute_capability="8.9"):
        with pytest.raises(BackendError, match=r"has a plugin cierzo\.RollingAttention already, made for something el"):
            register(FLAVOR, ["MoEGate", ATTENTION])
        assert not known("MoEGate")  # all or none
        with register(FLAVOR, [ATTENTION], compute_capability="8.9"):
            assert known()


def test_a_plugin_that_somebody_else_registered_is_not_taken_for_ours() -> None:
    trt = FLAVOR.trt

    class Other(trt.IPluginCreatorV3One):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = ATTENTION, "1", "cierzo"
            self.field_names = trt.PluginFieldCollection([])

    other = Other()
    assert trt.get_plugin_registry().register_creator(other, "cierzo")
    try:
        with pytest.raises(BackendError, match="already, made for something else"):
            register(FLAVOR, [ATTENTION])
    finally:
        trt.get_plugin_registry().deregister_creator(other)


def test_what_cannot_be_registered_says_why() -> None:
    with pytest.raises(BackendError, match=r"no plugin 'RollingAttentio'. Available: RollingAttention, Packed"):
        register(FLAVOR, ["RollingAttentio"])
    with pytest.raises(BackendError, match=r"8\.0, 8\.6, 8\.9, 9\.0, 12\.0, not for 7\.5\. Build without plugins"):
        register(FLAVOR, [ATTENTION], compute_capability="7.5")


def test_planned_devices_have_the_compute_capability_that_they_are_listed_under() -> None:
    for compute_capability in ("8.0", "8.6", "8.9", "9.0", "12.0"):
        assert ".".join(map(str, planned_device(compute_capability).compute_capability)) == compute_capability


def test_a_registration_tells_the_failures_of_all_its_plugins() -> None:
    def raised(registration: Registration) -> str:
        with pytest.raises(BackendError) as error:
            registration.raise_failure()
        return str(error.value)

    with register(FLAVOR, [ATTENTION]) as one, register(FLAVOR, [ATTENTION, "MoEGate"]) as both:
        assert one.shared[0] in both.shared
        assert len(both.shared) == 2
        both.shared[-1].failures.note("The plugin MoEGate of node 'a'", ValueError("lost"))
        one.raise_failure()
        assert raised(both).startswith(
            "The plugin MoEGate of node 'a' failed with ValueError: lost. This is a fault of"
        )
        both.raise_failure()


def test_the_first_failure_is_told_and_told_once() -> None:
    failures = Failures()
    failures.raise_first()
    cause = BackendError("The ring is too small.")
    failures.note("The plugin of node 'a'", cause)
    failures.note("The plugin of node 'b'", ValueError("follows from it"))
    with pytest.raises(BackendError, match=r"^The plugin of node 'a': The ring is too small\.$") as error:
        failures.raise_first()
    assert error.value.__cause__ is cause
    failures.raise_first()


def test_an_interruption_is_told_as_what_it_is() -> None:
    failures = Failures()
    failures.note("The plugin of node 'a'", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        failures.raise_first()


def test_failures_may_come_from_several_threads() -> None:
    failures = Failures()
    told: list[BackendError] = []

    def tell() -> None:
        try:
            failures.raise_first()
        except BackendError as error:
            told.append(error)

    threads: list[threading.Thread] = []
    for number in range(8):
        threads.append(threading.Thread(target=failures.note, args=(f"node {number}", ValueError(number))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tellers = [threading.Thread(target=tell) for _ in range(8)]
    for thread in tellers:
        thread.start()
    for thread in tellers:
        thread.join()
    assert len(told) == 1


def test_engines_run_their_kernels_on_the_gpu_unless_told_otherwise() -> None:
    with register(FLAVOR, [ATTENTION]) as registration:
        (shared,) = registration.shared
        launchers: Any = shared.launchers
        assert launchers is DeviceLauncher
