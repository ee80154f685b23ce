"""Receipts of parity as `validate` keeps them: written after a pass, removed after a failure, whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from exporter.receipt import make_receipt, prepare_receipt
from exporter.validation_report import Quality
from runtime.bundle import read_bundle
from runtime.errors import BundleError, InputError, ParityError, UnprovenError
from runtime.parity_file import as_file
from tests.support.receipts import (
    PLAN,
    build_engine,
    failing,
    key_pair,
    passing,
    prove,
    receipts_of,
    toy,
    validated,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return toy(tmp_path / "bundle")


def keys(bundle: Path) -> list[tuple[str, str | None, str]]:
    return [(receipt["backend"], receipt["engine"], receipt["suite"]) for receipt in receipts_of(bundle)]


def names(bundle: Path) -> set[str]:
    return {path.name for path in bundle.iterdir()}


def test_what_a_build_writes_can_be_proved(bundle: Path) -> None:
    """Its manifest is byte for byte in the one form, names of any letters included."""
    build_engine(bundle, "ü")
    validated(bundle)
    prove(bundle)


def test_a_run_replaces_its_own_receipt_and_no_other(bundle: Path) -> None:
    build_engine(bundle, "first")
    for changes in ({}, {"suite": "quick"}, {"backend": "tensorrt", "engine": "first"}, {"seed": 7}):
        validated(bundle, **changes)
    assert keys(bundle) == [
        ("onnxruntime", None, "full"),
        ("onnxruntime", None, "quick"),
        ("tensorrt", "first", "full"),
    ]
    assert [receipt["seed"] for receipt in receipts_of(bundle)] == [7, 3, 3]
    assert (bundle / "parity.json").stat().st_mode & 0o777 == 0o644


def test_a_failing_run_removes_what_it_has_shown_to_be_untrue(bundle: Path) -> None:
    build_engine(bundle, "first")
    validated(bundle)
    validated(bundle, suite="quick")
    validated(bundle, backend="tensorrt", engine="first")
    pending = prepare_receipt(bundle)
    outcome = pending.conclude(failing(bundle, suite="quick"), passed=False)
    assert str(outcome).startswith("removed the 2 receipts for the backend onnxruntime from ")
    assert outcome.to_json() is None
    assert keys(bundle) == [("tensorrt", "first", "full")]
    again = pending.conclude(failing(bundle), passed=False)
    assert str(again) == "wrote no receipt for the backend onnxruntime, since parity fails"
    last = pending.conclude(failing(bundle, backend="tensorrt", engine="first"), passed=False)
    assert str(last).startswith("removed the receipt for the engine first of the backend tensorrt from ")
    assert "parity.json" not in names(bundle)


def test_no_receipt_of_a_run_that_fails(bundle: Path) -> None:
    with pytest.raises(ParityError):
        make_receipt(read_bundle(bundle), failing(bundle), None)
    validated(bundle)
    outcome = prepare_receipt(bundle).conclude(passing(bundle), passed=False)  # as where a module is off
    assert (outcome.receipt, outcome.removed) == (None, 1)


def test_receipts_of_other_files_go_with_the_next_one(bundle: Path) -> None:
    build_engine(bundle, "first")
    validated(bundle, suite="quick")
    validated(bundle, backend="tensorrt", engine="first")
    build_engine(bundle, "first", content=b"built again")
    validated(bundle)
    assert keys(bundle) == [("onnxruntime", None, "full"), ("onnxruntime", None, "quick")]
    toy(bundle, weights_hashed=False)
    validated(bundle)
    assert keys(bundle) == [("onnxruntime", None, "full")], "of another manifest"


def test_damaged_receipts_are_replaced_and_whole_ones_kept(bundle: Path) -> None:
    validated(bundle)
    validated(bundle, suite="quick")
    whole, damaged = receipts_of(bundle)
    (bundle / "parity.json").write_bytes(as_file({"schema_version": 1, "receipts": [whole, damaged | {"seed": 9}, 3]}))
    validated(bundle, backend="tensorrt")
    assert keys(bundle) == [("onnxruntime", None, "full"), ("tensorrt", None, "full")]
    (bundle / "parity.json").write_bytes(b"{")
    validated(bundle)
    assert keys(bundle) == [("onnxruntime", None, "full")]
    prove(bundle)


def test_receipts_of_a_later_version_are_left_alone(bundle: Path) -> None:
    content = as_file({"schema_version": 2, "receipts": []})
    (bundle / "parity.json").write_bytes(content)
    with pytest.raises(BundleError, match="written with schema 2, but this Cierzo reads schema 1"):
        prepare_receipt(bundle)
    assert (bundle / "parity.json").read_bytes() == content


def test_which_engine_ran(bundle: Path) -> None:
    """The report names it, and a run that fails takes away no other's receipt."""
    build_engine(bundle, "first")
    build_engine(bundle, "second")
    assert validated(bundle, backend="tensorrt", engine="first").engine == "first"
    assert validated(bundle, backend="tensorrt", engine="second").engine == "second"
    with pytest.raises(BundleError, match="The engine third was removed from the bundle"):
        validated(bundle, backend="tensorrt", engine="third")
    prepare_receipt(bundle).conclude(failing(bundle, backend="tensorrt", engine="first"), passed=False)
    assert keys(bundle) == [("tensorrt", "second", "full")]


def test_figures_of_quantised_weights(bundle: Path) -> None:
    quality = Quality("text.txt", 100, 0.0125, 0.97, 1.01)
    assert validated(bundle, quality=quality).figures.mean_kl == 0.0125
    assert validated(bundle).figures.mean_kl is None


def test_names_that_no_message_may_hold(bundle: Path) -> None:
    receipt = validated(bundle, device="a GPU\nof two lines", checkpoint="/models/\x1b[31mred")
    assert (receipt.device, receipt.checkpoint) == ("a GPU?of two lines", "?[31mred")


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "tokenizer.json", "manifest.json", "plan"])
def test_files_that_change_during_the_run(bundle: Path, name: str) -> None:
    plan = build_engine(bundle, "first") / PLAN
    pending = prepare_receipt(bundle)
    file = plan if name == "plan" else bundle / name
    content = file.read_bytes()
    if name == "manifest.json":
        file.write_bytes(content.replace(b'"chunk": 3', b'"chunk": 2'))
    os.utime(file, ns=(1, 1))
    with pytest.raises(BundleError, match=r"was changed while the bundle .* was validated"):
        pending.conclude(passing(bundle, backend="tensorrt", engine="first"), passed=True)
    assert "parity.json" not in names(bundle)


def test_other_engines_may_be_built_during_the_run(bundle: Path) -> None:
    build_engine(bundle, "first")
    pending = prepare_receipt(bundle)
    build_engine(bundle, "first", content=b"built again")
    build_engine(bundle, "second")
    assert pending.conclude(passing(bundle), passed=True).receipt is not None
    prove(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin"])
def test_damaged_files_get_no_receipt(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[40] ^= 4
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"The file {name} .* was damaged or changed"):
        validated(bundle)


def test_a_manifest_of_another_hand_gets_no_receipt(bundle: Path) -> None:
    with (bundle / "manifest.json").open("a") as file:
        file.write("\n")
    with pytest.raises(UnprovenError, match="Export the checkpoint again, and validate the new bundle"):
        validated(bundle)


def test_a_folder_that_is_no_bundle_is_for_the_validation_to_refuse(tmp_path: Path) -> None:
    assert prepare_receipt(tmp_path).before is None
    assert prepare_receipt(tmp_path / "gone").before is None


def test_a_folder_that_cannot_be_written_to(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pending = prepare_receipt(bundle)

    def refuse(**_: object) -> tuple[int, str]:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(BundleError, match=r"written into .*: Read-only file system\. .* or pass --no-receipt"):
        pending.conclude(passing(bundle), passed=True)


def test_before_the_run_a_folder_without_the_right_to_write_is_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != bundle or not mode & os.W_OK)
    with pytest.raises(BundleError, match="this user may not write into the folder"):
        prepare_receipt(bundle)


def test_the_old_file_stays_until_the_new_one_is_whole(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated(bundle)
    before, files = (bundle / "parity.json").read_bytes(), names(bundle)

    def full(source: str, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(BundleError, match="No space left on device"):
            validated(bundle, suite="quick")
    assert (bundle / "parity.json").read_bytes() == before
    assert names(bundle) == files
    (bundle / ".parity.json.abcd_123").touch()  # as a killed run leaves it
    validated(bundle, suite="quick")
    assert names(bundle) == files


def test_runs_at_once_keep_each_other_s_receipts(bundle: Path) -> None:
    """The lock belongs to an open file, so that it keeps threads apart as it does processes."""

    def validate(backend: str) -> None:
        for seed in range(5):
            validated(bundle, backend=backend, seed=seed)

    backends = [f"backend-{number}" for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(validate, backends))
    assert keys(bundle) == [(backend, None, "full") for backend in backends]
    assert [receipt["seed"] for receipt in receipts_of(bundle)] == [4, 4, 4]


def test_keys_that_cannot_sign(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the run, that is."""
    encrypted, public = key_pair(tmp_path, "encrypted", b"secret")
    for key, said in (
        (encrypted, "is encrypted, and Cierzo asks for no passwords"),
        (public, "holds no ed25519 private key in PEM"),
        (bundle / "model.onnx", "holds no ed25519 private key in PEM"),
        (tmp_path / "gone.pem", "The signing key .* cannot be read: No such file"),
    ):
        with pytest.raises(InputError, match=said):
            prepare_receipt(bundle, sign=key)
    plain, _ = key_pair(tmp_path, "plain")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    with pytest.raises(InputError, match=r'pip install "cierzo\[sign\]"'):
        prepare_receipt(bundle, sign=plain)


def test_a_signed_receipt(bundle: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "ours")
    outcome = prepare_receipt(bundle, sign=private).conclude(passing(bundle), passed=True)
    assert outcome.receipt is not None
    assert outcome.receipt.signature is not None
    signer = outcome.receipt.signature.signer
    assert str(outcome).endswith(f"a receipt for the backend onnxruntime, suite full, signed by {signer}")
    found = outcome.to_json()
    assert found is not None
    assert found["signed_by"] == signer
    assert found["digest"] == receipts_of(bundle)[0]["digest"]
    prove(bundle, trust=public)
