"""The one module that knows which TensorRT is loaded: what is chosen, what is refused, and what each is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from runtime.errors import BackendError
from runtime.tensorrt import flavor as flavors
from runtime.tensorrt.alias import empty_library
from runtime.tensorrt.flavor import FLAVORS, FLAVORS_FOR_OTHER_GPUS, Flavor, load_flavor, supported_gpus
from runtime.tensorrt.kept import kept_file, read_kept, write_kept

NAMES = {"tensorrt": "cierzo_fake_trt", "tensorrt-rtx": "cierzo_fake_trt_rtx"}


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where Python finds modules; the flavours look for those of NAMES."""
    table = {name: replace(library, module=NAMES[name], alias=None) for name, library in flavors._LIBRARIES.items()}
    monkeypatch.setattr(flavors, "_LIBRARIES", MappingProxyType(table))
    monkeypatch.syspath_prepend(str(tmp_path))
    flavors._load.cache_clear()
    yield tmp_path
    flavors._load.cache_clear()
    for module in NAMES.values():
        sys.modules.pop(module, None)


def install(libraries: Path, name: str, source: str) -> None:
    (libraries / f"{NAMES[name]}.py").write_text(source)


def test_the_first_one_that_is_installed_serves(libraries: Path) -> None:
    install(libraries, "tensorrt-rtx", "__version__ = '1.7.1.116'")
    found = load_flavor()
    assert (found.name, found.version) == ("tensorrt-rtx", "1.7.1.116")
    install(libraries, "tensorrt", "__version__ = '11.2.0.1'")
    assert load_flavor().name == "tensorrt"
    assert load_flavor("tensorrt-rtx").name == "tensorrt-rtx"
    assert load_flavor("tensorrt") is load_flavor("tensorrt")


def test_nothing_installed_names_both_ways(libraries: Path) -> None:
    with pytest.raises(BackendError) as caught:
        load_flavor()
    assert 'pip install "cierzo[tensorrt]"' in str(caught.value)
    assert 'pip install "cierzo[tensorrt-rtx]"' in str(caught.value)


@pytest.mark.parametrize("name", FLAVORS)
def test_one_that_is_missing_names_its_extra(libraries: Path, name: str) -> None:
    with pytest.raises(BackendError, match=rf'^{name} is not installed\. .*"cierzo\[{name}\]"'):
        load_flavor(name)


@pytest.mark.parametrize("name", FLAVORS)
@pytest.mark.parametrize("failure", ["raise OSError('libcuda.so.1: no such file')", "import cierzo_has_no_such_module"])
def test_one_that_does_not_load_says_why(libraries: Path, name: str, failure: str) -> None:
    install(libraries, name, failure)
    with pytest.raises(BackendError, match=r"is installed, but does not load \(.*no"):
        load_flavor(name)


@pytest.mark.parametrize(
    ("name", "version"),
    [("tensorrt", "10.14.1"), ("tensorrt", "12.0.0"), ("tensorrt-rtx", "2.0.0"), ("tensorrt-rtx", "dev")],
)
def test_other_versions_are_refused(libraries: Path, name: str, version: str) -> None:
    install(libraries, name, f"__version__ = {version!r}")
    with pytest.raises(BackendError, match=rf"^{name} {version} is installed, but Cierzo is written for versions"):
        load_flavor(name)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(BackendError, match=r"no TensorRT flavour 'rtx'\. Available: tensorrt, tensorrt-rtx\."):
        load_flavor("rtx")


def test_who_runs_and_builds_where() -> None:
    assert FLAVORS_FOR_OTHER_GPUS == ("tensorrt-rtx",)
    assert "9.0" in supported_gpus("tensorrt")
    assert "9.0" not in supported_gpus("tensorrt-rtx")
    for library in flavors._LIBRARIES.values():
        assert set(library.builds_for or ()) <= set(library.runs_on)


def fake(trt: Any, builds_for: tuple[str, ...] | None = None) -> Flavor:
    return Flavor("fake", trt, "1.0", builds_for, ("8.9",), {})


def test_a_target_is_set_where_there_is_a_choice() -> None:
    config, trt = MagicMock(), MagicMock()
    fake(trt).set_compute_capability(config, "8.9")
    assert config.mock_calls == []
    fake(trt, ("8.9",)).set_compute_capability(config, "8.9")
    config.set_compute_capability.assert_called_once_with(trt.ComputeCapability.SM89, 0)
    assert config.num_compute_capabilities == 1
    config.set_compute_capability.return_value = False
    with pytest.raises(BackendError, match=r"does not build for compute capability 8\.9"):
        fake(trt, ("8.9",)).set_compute_capability(config, "8.9")


def test_a_context_takes_memory_and_capture_from_outside() -> None:
    trt, engine = MagicMock(), MagicMock()
    config = engine.create_runtime_config.return_value
    config.create_runtime_cache.return_value.serialize.return_value = b"kernels"
    opened = fake(trt).open_context(engine, b"before")
    assert opened.context is engine.create_execution_context.return_value
    engine.create_execution_context.assert_called_once_with(config)
    config.set_execution_context_allocation_strategy.assert_called_once_with(
        trt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    config.create_runtime_cache.return_value.deserialize.assert_called_once_with(b"before")
    assert config.cuda_graph_strategy is trt.CudaGraphStrategy.DISABLED
    assert opened.cache_bytes() == b"kernels"
    engine.create_execution_context.return_value = None
    with pytest.raises(BackendError, match="makes no execution context"):
        fake(trt).open_context(engine, None)


def test_a_library_without_a_runtime_cache_is_asked_for_none() -> None:
    strategy, engine = SimpleNamespace(USER_MANAGED="user"), MagicMock()
    flavor = fake(SimpleNamespace(ExecutionContextAllocationStrategy=strategy, BuilderFlag=SimpleNamespace()))
    opened = flavor.open_context(engine, b"of another")
    engine.create_execution_context.assert_called_once_with("user")
    assert opened.cache_bytes() is None
    assert flavor.build_flags() == ()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries have such names on Linux only")
def test_a_loaded_library_gets_a_second_name_without_a_compiler() -> None:
    """In a process of its own, since what was loaded once stays."""
    script = (
        "import ctypes\n"
        "from runtime.tensorrt.alias import load_alias\n"
        "try:\n    ctypes.CDLL('libcierzo_no_such.so')\nexcept OSError as error:\n    print('before:', error)\n"
        "load_alias('libcierzo_no_such.so', 'libm.so.6')\n"
        "library = ctypes.CDLL('libcierzo_no_such.so')\n"
        "library.cos.restype, library.cos.argtypes = ctypes.c_double, [ctypes.c_double]\n"
        "print(library.cos(0.0))\n"
        "load_alias('libcierzo_no_such.so', 'libm.so.6')\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[0].startswith("before: libcierzo_no_such.so: cannot open")
    assert run.stdout.splitlines()[1] == "1.0"


def test_the_made_library_is_small_and_of_the_machine() -> None:
    for machine, number in (("x86_64", 62), ("aarch64", 183)):
        made = empty_library("liba.so", "liba.so.1", machine)
        assert made[:5] == b"\x7fELF\x02"
        assert int.from_bytes(made[18:20], "little") == number
        assert made.endswith(b"\0liba.so\0liba.so.1\0")
        assert len(made) < 500


def test_timings_are_kept_by_a_library_that_times() -> None:
    config, trt = MagicMock(), MagicMock()
    config.get_timing_cache.return_value.serialize.return_value = b"timed"
    fake(trt).use_timings(config, None)
    config.create_timing_cache.assert_called_once_with(b"")
    config.set_timing_cache.assert_called_once_with(config.create_timing_cache.return_value, ignore_mismatch=False)
    fake(trt).use_timings(config, b"before")
    config.create_timing_cache.assert_called_with(b"before")
    assert fake(trt).timings(config) == b"timed"
    untouched = MagicMock()
    fake(trt, ("8.9",)).use_timings(untouched, b"before")
    assert fake(trt, ("8.9",)).timings(untouched) is None
    assert untouched.mock_calls == []


def test_what_is_kept_is_found_again_and_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIERZO_CACHE", str(tmp_path / "cache"))
    file = kept_file("timings", "tensorrt-11.2-sm8.9")
    assert read_kept(file) is None
    write_kept(file, b"one")
    write_kept(file, b"two")
    assert read_kept(file) == b"two"
    assert [path.name for path in file.parent.iterdir()] == ["tensorrt-11.2-sm8.9.cache"]
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("CIERZO_CACHE", str(tmp_path / "no folder"))
    write_kept(kept_file("timings", "x"), b"one")  # nothing is raised
    assert read_kept(kept_file("timings", "x")) is None
    taken = tmp_path / "taken"
    (taken / "folder").mkdir(parents=True)
    write_kept(taken, b"one")  # cannot take its place
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
