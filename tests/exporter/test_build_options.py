"""What an engine is built as when little is said, and every refusal before anything is built."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter import defaults
from exporter.build import build as building
from exporter.build import options
from exporter.build.build import build
from exporter.build.options import default_arithmetic, resolve_options
from runtime.bundle import Bundle, read_bundle
from runtime.engine_info import EMBEDDED
from runtime.errors import BackendError
from runtime.tensorrt.flavor import FLAVORS, load_flavor
from tests.support.bundles import exported
from tests.support.engines import SIZES


@pytest.fixture
def bundle() -> Bundle:
    return read_bundle(exported(**SIZES).bundle)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise BackendError("There is no GPU.")

    monkeypatch.setattr(options, "open_device", nothing)


def give_gpu(monkeypatch: pytest.MonkeyPatch, compute_capability: str) -> None:
    monkeypatch.setattr(options, "open_device", lambda: SimpleNamespace(compute_capability=compute_capability))


def refusal(bundle: Bundle, **asked: Any) -> str:
    with pytest.raises(BackendError) as caught:
        resolve_options(bundle, **{"compute_capability": "8.9", **asked})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_has_a_default_but_the_gpu(bundle: Bundle) -> None:
    flavor, chosen = resolve_options(bundle, compute_capability="8.9")
    assert chosen.flavor == flavor.name
    assert chosen.version == flavor.version
    assert (chosen.arithmetic, chosen.kv, chosen.weights) == ("bfloat16", "bfloat16", "weightless")
    assert chosen.plugins == ("MixtureOfExperts", "MoEGate", "PackedRollingAttention", "RollingAttention")


def test_the_gpu_here_is_the_default(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpu(monkeypatch, "8.6")
    assert resolve_options(bundle)[1].compute_capability == "8.6"
    assert resolve_options(bundle, compute_capability="12.0")[1].compute_capability == "12.0"


def test_arithmetic_follows_the_weights(bundle: Bundle) -> None:
    def stored(**types: int) -> str:
        weights = replace(bundle.manifest.weights, types=types)
        return default_arithmetic(replace(bundle, manifest=replace(bundle.manifest, weights=weights)))

    assert stored(BF16=9) == "bfloat16"
    assert stored(F16=9) == "float16"
    assert stored(F32=9) == "float32"
    assert stored(F32=3, BF16=9) == "bfloat16"
    assert stored(F32=5, F16=5) == "float32"
    assert stored(U8=5, F16=5) == "float16"
    with pytest.raises(BackendError, match="--arithmetic"):
        stored(U8=5)
    for scales in ("float16", "float32"):
        quantized = exported(**{**SIZES, "options": {"weights": "int4", "scales": scales, "prove": False}})
        assert default_arithmetic(read_bundle(quantized.bundle)) == scales


def test_float32_goes_without_plugins_and_refuses_them(bundle: Bundle) -> None:
    assert resolve_options(bundle, compute_capability="8.9", arithmetic="float32")[1].plugins == ()
    for asked in ("all", "RollingAttention", ["MoEGate"]):
        found = refusal(bundle, arithmetic="float32", plugins=asked)
        assert "bfloat16 or float16, not in float32" in found
        assert "--plugins none" in found


def test_names_of_engines_tell_them_apart(bundle: Bundle) -> None:
    _, first = resolve_options(bundle, compute_capability="8.9")
    others = [
        replace(first, kv="float16"),
        replace(first, plugins=()),
        replace(first, weights=EMBEDDED),
        replace(first, arithmetic="float16"),
        replace(first, compute_capability="12.0"),
    ]
    names = [chosen.name(bundle) for chosen in (first, *others)]
    assert len(set(names)) == len(names)
    kv = replace(bundle.manifest.kv, chunk=99)
    assert first.name(replace(bundle, manifest=replace(bundle.manifest, kv=kv))) != names[0]
    assert names[-1].startswith(f"{first.flavor}-{first.version}-sm120-bfloat16-")


UNKNOWN: dict[str, dict[str, Any]] = {
    "backend": {"backend": "onnxruntime"},
    "flavour": {"flavor": "tensorflow"},
    "arithmetic": {"arithmetic": "int8"},
    "KV rings": {"kv": "int8"},
    "weights": {"weights": "none"},
    "plugin": {"plugins": "MoEGate,MoeGate"},
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_names_are_refused_with_the_known_ones(bundle: Bundle, what: str) -> None:
    found = refusal(bundle, **UNKNOWN[what])
    assert found.startswith("There is no ")
    assert what in found
    assert "Available: " in found


def test_a_gpu_must_be_named_where_there_is_none(bundle: Bundle) -> None:
    found = refusal(bundle, compute_capability=None)
    assert "--compute-capability" in found
    assert "8.0, 8.6, 8.9, 12.0" in found


@pytest.mark.parametrize("spelled", ["89", "sm_89", "8.9.1", "", "0.0"])
def test_what_is_no_compute_capability_is_refused(bundle: Bundle, spelled: str) -> None:
    assert "is spelled like 8.9" in refusal(bundle, compute_capability=spelled)


def test_gpus_that_the_library_does_not_build_for_are_refused_with_the_way_out(bundle: Bundle) -> None:
    assert "with --flavor tensorrt." in refusal(bundle, compute_capability="9.0")
    assert "No other flavour" in refusal(bundle, compute_capability="6.1")


def test_a_flavour_that_needs_its_gpu_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    full = replace(load_flavor("tensorrt-rtx"), name="tensorrt", builds_for=None)
    monkeypatch.setattr(options, "load_flavor", lambda name: full)
    assert "none here: There is no GPU." in refusal(bundle, flavor="tensorrt")
    give_gpu(monkeypatch, "9.0")
    found = refusal(bundle, flavor="tensorrt", compute_capability="8.9")
    assert "9.0, not 8.9" in found
    assert "--flavor tensorrt-rtx" in found
    assert resolve_options(bundle, flavor="tensorrt")[1].compute_capability == "9.0"
    give_gpu(monkeypatch, "10.0")
    assert "10.0" in refusal(bundle, flavor="tensorrt", compute_capability=None)  # no kernel of the plugins runs there
    assert resolve_options(bundle, flavor="tensorrt", plugins="none")[1].compute_capability == "10.0"


def test_rings_of_eight_bits_need_the_plugins(bundle: Bundle) -> None:
    assert resolve_options(bundle, compute_capability="8.9", kv="float8")[1].kv == "float8"
    for asked in ("none", "MoEGate"):
        assert "--plugins all" in refusal(bundle, kv="float8", plugins=asked)


def test_one_plugin_that_writes_rings_brings_the_other(bundle: Bundle) -> None:
    """A graph may have nodes of both, and rings that some nodes write in place and others copy would go apart."""
    _, options = resolve_options(bundle, compute_capability="8.9", plugins="RollingAttention")
    assert options.plugins == ("PackedRollingAttention", "RollingAttention")


def test_plugins_without_a_node_are_refused_when_they_are_named(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="no node for the plugin MoEGate"):
        build(bundle.path, compute_capability="8.9", plugins=["MoEGate"])


def test_a_full_disk_is_noticed_before_the_work(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(BackendError, match=r"0\.00 GB left"):
        build(bundle.path, compute_capability="8.9")


def test_embedded_weights_take_what_their_arithmetic_does(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = replace(bundle.manifest, model=replace(bundle.manifest.model, parameters=10**9))
    monkeypatch.setattr(building, "read_bundle", lambda *_, **__: replace(bundle, manifest=manifest))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=256 << 20))
    for arithmetic, width in (("bfloat16", 2), ("float32", 4)):
        with pytest.raises(BackendError, match=rf"may need {3 * width}\.27 GB"):
            build(bundle.path, compute_capability="8.9", arithmetic=arithmetic, weights=EMBEDDED)


def test_rings_of_int8_are_the_cpus(tmp_path: Path) -> None:
    case = exported(**{**SIZES, "options": {"weights": "int4", "kv": "int8", "prove": False}})
    with pytest.raises(BackendError, match="int8 KV buffers"):
        build(case.bundle, compute_capability="8.9")


def test_the_command_knows_the_flavours() -> None:
    assert defaults.ENGINE_FLAVORS == FLAVORS
