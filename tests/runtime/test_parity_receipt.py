"""`load(..., require_parity=…, trust=…)`: what counts as a proof, and every refusal."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import UnprovenError, load
from runtime.errors import BundleError, InputError
from runtime.parity_file import as_file, parse_receipts
from runtime.parity_receipt import canonical
from tests.support.receipts import (
    ENGINE,
    PLAN,
    build_engine,
    key_pair,
    passing,
    prove,
    proven_bundle,
    receipts_of,
    signed,
    toy,
    validated,
)
from tests.support.toy_bundle import ToyModel


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests copy it before they change it."""
    return proven_bundle(tmp_path_factory.mktemp("proven") / "bundle")


@pytest.fixture
def copy(proven: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(proven, tmp_path / "bundle"))


def refusal(bundle: Path, **options: Any) -> str:
    with pytest.raises(UnprovenError) as caught:
        prove(bundle, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """Change the first receipt; `seal` gives it the digest of what it then says, as whoever forges one would."""
    receipts = receipts_of(bundle)
    change(receipts[0])
    if seal:
        rest = {key: value for key, value in receipts[0].items() if key != "digest"}
        receipts[0]["digest"] = hashlib.sha256(canonical(rest)).hexdigest()
    (bundle / "parity.json").write_bytes(as_file({"schema_version": 1, "receipts": receipts}))


def test_a_proven_bundle_runs(proven: Path) -> None:
    for wanted in (True, "quick", "full"):
        session = load(proven, threads=1, require_parity=wanted)
        assert list(session.generate([5, 6, 7], max_new_tokens=4)) == ToyModel().greedy([5, 6, 7], 4)
    assert session.unverified == ()


def test_without_a_receipt(tmp_path: Path) -> None:
    bundle = toy(tmp_path / "bundle")
    assert list(load(bundle, threads=1).generate([5], max_new_tokens=1)) == ToyModel().greedy([5], 1)
    with pytest.raises(UnprovenError, match=r"has no receipt of parity: .* `cierzo validate .*bundle` writes"):
        load(bundle, require_parity=True)


def test_nothing_large_is_read_before_the_receipt_is_found(tmp_path: Path) -> None:
    seen: list[str] = []
    bundle = toy(tmp_path / "bundle")
    with pytest.raises(UnprovenError):
        prove(bundle, progress=lambda stage, done, total: seen.append(stage))
    assert seen == []
    validated(bundle)
    prove(bundle, progress=lambda stage, done, total: seen.append(stage))
    assert set(seen) == {"verifying"}


def test_of_another_backend_or_engine(copy: Path) -> None:
    said = refusal(copy, backend="abacus")
    assert (
        "no receipt of parity for the backend abacus; it has receipts for the backend onnxruntime, the engine" in said
    )
    assert f"`cierzo validate {copy} --backend abacus` makes a new receipt" in said
    build_engine(copy, "second", content=b"another")
    assert "for the engine second of the backend tensorrt; it has" in refusal(copy, backend="tensorrt", engine="second")


def test_only_proven_engines_can_be_chosen(copy: Path) -> None:
    build_engine(copy, "second", content=b"another")
    assert set(prove(copy, backend="tensorrt").manifest.engines) == {ENGINE}
    assert set(prove(copy, backend="tensorrt", engine=ENGINE).manifest.engines) == {ENGINE}
    assert set(prove(copy).manifest.engines) == set(), "the graph was proved, and no engine"
    validated(copy, backend="tensorrt", engine="second")
    assert set(prove(copy, backend="tensorrt").manifest.engines) == {ENGINE, "second"}


def test_another_build_of_an_engine_is_not_the_one_that_was_proved(copy: Path) -> None:
    folder = build_engine(copy, ENGINE, content=b"built again")
    assert (folder / PLAN).read_bytes() == b"built again"
    assert "the hash of its engine.json differs, as after another build" in refusal(copy, backend="tensorrt")
    assert prove(copy).path == copy, "the graph is what it was"


def test_an_engine_that_was_deleted(copy: Path) -> None:
    shutil.rmtree(copy / "engines" / ENGINE)
    assert "lists the engine first, which is not there" in refusal(copy)


@pytest.mark.parametrize("name", [PLAN, "engine.json"])
def test_a_file_of_the_engine_that_is_gone(copy: Path, name: str) -> None:
    (copy / "engines" / ENGINE / name).unlink()
    with pytest.raises(BundleError, match=f"{name}.* cannot be read|cannot be read: .*{name}"):
        prove(copy, backend="tensorrt")


def test_a_suite_that_is_too_small(tmp_path: Path) -> None:
    bundle = toy(tmp_path / "bundle")
    validated(bundle, suite="quick")
    assert prove(bundle, require_parity="quick").path == prove(bundle).path
    said = refusal(bundle, require_parity="full")
    assert "(quick) is of another suite than full" in said
    assert "--suite full` makes" in said
    with pytest.raises(InputError, match="must be False, True or one of full, quick, not 'most'"):
        load(bundle, require_parity="most")


def test_weights_without_a_hash_in_the_manifest(tmp_path: Path) -> None:
    bundle = toy(tmp_path / "bundle", weights_hashed=False)
    entry = validated(bundle).hashes.weights["weights.bin"]
    assert entry.kind == "blocks_sha256"
    assert prove(bundle).unverified == ()
    content = (bundle / "weights.bin").read_bytes()
    (bundle / "weights.bin").write_bytes(content[:17] + bytes([content[17] ^ 1]) + content[18:])
    assert "the hash of weights.bin is not that of the file that was validated" in refusal(bundle)


def test_weights_that_lie_elsewhere(tmp_path: Path) -> None:
    bundle, elsewhere = toy(tmp_path / "bundle"), tmp_path / "elsewhere"
    validated(bundle)
    elsewhere.mkdir()
    shutil.move(bundle / "weights.bin", elsewhere)
    assert prove(bundle, weights_folder=elsewhere).weights_folder == elsewhere


def test_signatures(copy: Path, tmp_path: Path) -> None:
    _, other = key_pair(tmp_path, "theirs")
    assert "the backend onnxruntime (full) is not signed" in refusal(copy, trust=other)
    public = signed(copy, tmp_path)
    assert load(copy, threads=1, require_parity="full", trust=public).batch == 1
    assert prove(copy).path == copy, "a signature is no obstacle to whoever does not ask for one"
    said = refusal(copy, trust=other)
    assert "is signed by another key than the trusted one" in said
    assert "--sign KEY.pem` makes" in said
    assert "is not signed" in refusal(copy, backend="tensorrt", trust=public), "the engine's receipt is"


@pytest.mark.parametrize(
    "change",
    [
        lambda receipt: receipt.update(checkpoint="another"),
        lambda receipt: receipt["figures"].update(largest_error=0.0),
        lambda receipt: receipt.update(suite="quick"),
        lambda receipt: receipt.update(more="than was signed"),
        lambda receipt: receipt["signature"].update(value="A" * 86 + "=="),
    ],
)
def test_a_signed_receipt_that_was_changed(
    copy: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    """Its digest is brought up to date, so that only the signature tells."""
    public = signed(copy, tmp_path)
    rewrite(copy, change)
    assert prove(copy).path == copy
    assert "bears a signature that is wrong" in refusal(copy, trust=public)


def test_a_receipt_signed_anew_by_another_key(copy: Path, tmp_path: Path) -> None:
    public = signed(copy, tmp_path)
    private, _ = key_pair(tmp_path, "theirs")
    validated(copy, sign=private)
    assert "is signed by another key" in refusal(copy, trust=public)
    ours = json.loads(canonical({"key": receipts_of(copy)[0]["signature"]["key"]}))["key"]
    assert ours in refusal(copy, trust=public), "the message says whose it is"


def test_a_trusted_key_needs_a_proof_to_be_asked_for(copy: Path, tmp_path: Path) -> None:
    _, public = key_pair(tmp_path, "ours")
    with pytest.raises(InputError, match="needs require_parity=True beside it"):
        load(copy, trust=public)


def test_trusted_keys_that_are_none(copy: Path, tmp_path: Path) -> None:
    private, _ = key_pair(tmp_path, "ours")
    (tmp_path / "text.pem").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    for name, said in (
        (private, "holds a private key, which only its owner should have"),
        (tmp_path / "text.pem", "holds no ed25519 public key in PEM"),
        (tmp_path / "gone.pem", "cannot be read: No such file"),
        (tmp_path, "cannot be read: it is a folder"),
    ):
        with pytest.raises(InputError, match=said):
            prove(copy, trust=name)


def test_without_cryptography(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public = signed(copy, tmp_path)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    with pytest.raises(InputError, match=r'pip install "cierzo\[sign\]"'):
        prove(copy, trust=public)
    assert prove(copy).path == copy, "only signatures need it"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not readable JSON"),
        (b"[]", "not a JSON object"),
        (b'{"schema_version": 2, "receipts": []}', "was written with schema 2, but this Cierzo reads schema 1"),
        (b'{"schema_version": 1, "receipts": []}', "is not as Cierzo writes it, byte for byte"),
        (as_file({"schema_version": 1, "receipts": [], "more": 1}), "is not as Cierzo writes it, byte for byte"),
        (as_file({"schema_version": 1, "receipts": [{}]}), "digest` must be a string, but it is missing"),
        (as_file({"schema_version": 1, "receipts": []}), "it has receipts for nothing"),
    ],
)
def test_a_damaged_file(copy: Path, content: bytes, said: str) -> None:
    (copy / "parity.json").write_bytes(content)
    assert said in refusal(copy)


def test_two_receipts_of_one_run(copy: Path) -> None:
    receipt = receipts_of(copy)[0]
    (copy / "parity.json").write_bytes(as_file({"schema_version": 1, "receipts": [receipt, receipt]}))
    assert "holds two receipts of the same run" in refusal(copy)


def test_a_receipts_file_that_is_a_folder(copy: Path) -> None:
    (copy / "parity.json").unlink()
    (copy / "parity.json").mkdir()
    assert "cannot be read: it is a folder" in refusal(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(suite="slow"), "this Cierzo knows only full, quick"),
        (lambda r: r.update(device="a\nb"), "which is no text of up to"),
        (lambda r: r.update(seed=-1), "which is no seed"),
        (lambda r: r.update(seed=True), "which is no seed"),
        (lambda r: r["figures"].update(budget="small"), "which is no number, as `budget`"),
        (lambda r: r["figures"].update(checks_run=0), "cannot be below 1"),
        (lambda r: r["hashes"].update(files={"../x": {"bytes": 1, "sha256": "0" * 64}}), "lies outside the bundle"),
        (lambda r: r["hashes"]["files"].update(x={"bytes": 1}), "blocks_sha256` must be a string, but it is missing"),
        (lambda r: r.update(signature={"key": "AAAA", "value": "AAAA"}), "is not the base64 of 32 bytes"),
        (lambda r: r["hashes"].update(manifest="0" * 64), "the hash of manifest.json differs"),
        (lambda r: r["hashes"]["files"].pop("tokenizer.json"), "tokenizer.json is not in both"),
        (lambda r: r["hashes"]["weights"]["weights.bin"].update(sha256="0" * 64), "the hash of weights.bin differs"),
        (lambda r: r["hashes"]["files"]["model.onnx"].update(bytes=1), "the hash of model.onnx differs"),
    ],
)
def test_receipts_that_say_what_is_not_so(copy: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
    rewrite(copy, change)
    assert said in refusal(copy)
    rewrite(copy, lambda receipt: receipt.update(dtype="float16"), seal=False)
    assert "it was damaged or changed" in refusal(copy)


def test_a_manifest_that_somebody_wrote_again(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert load(copy, threads=1).batch == 1, "it is the same to whoever asks for no proof"
    assert "manifest.json is not as Cierzo writes it, byte for byte" in refusal(copy)
    manifest["kv"]["max_batch"] -= 1
    (copy / "manifest.json").write_bytes(as_file(manifest))
    assert "the hash of manifest.json differs" in refusal(copy)


def test_engines_that_are_built_later_leave_other_receipts_true(tmp_path: Path) -> None:
    bundle = toy(tmp_path / "bundle")
    validated(bundle)
    build_engine(bundle, ENGINE)
    assert prove(bundle).path == bundle


def test_what_a_receipt_holds(proven: Path) -> None:
    graph, engine = parse_receipts((proven / "parity.json").read_bytes())
    report = passing(proven)
    assert graph.key == ("onnxruntime", None, "full")
    assert engine.key == ("tensorrt", ENGINE, "full")
    assert (graph.seed, graph.dtype, graph.device, graph.checkpoint) == (3, "float32", "cpu", "tiny")
    assert graph.versions == report.versions
    assert graph.figures.budget == report.budget
    assert graph.figures.largest_error == report.largest_error
    assert (graph.figures.checks_run, graph.figures.checks_not_run) == (1, ("ragged batch",))
    assert set(graph.hashes.files) == {"model.onnx", "tokenizer.json", "tokenizer_config.json"}
    digest = hashlib.sha256((proven / "weights.bin").read_bytes()).hexdigest()
    assert graph.hashes.weights["weights.bin"].value == digest
    assert graph.hashes.engine == {}
    assert set(engine.hashes.engine) == {"engine.json", PLAN}
    assert graph.signature is None
