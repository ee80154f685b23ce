"""Bundles with receipts of parity: toy bundles as an export writes them, reports of runs that passed, engines, keys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from exporter.build.engine_folder import engine_folder
from exporter.receipt import prepare_receipt
from exporter.save import write_manifest
from exporter.validation_report import Check, ValidationReport
from runtime.bundle import MANIFEST_NAME, Bundle, read_bundle
from runtime.parity_proof import open_bundle
from runtime.parity_receipt import RECEIPTS_FILE, Receipt
from tests.support.toy_bundle import write_toy_bundle

ENGINE = "first"
TOKENIZER = {"tokenizer.json": '{"a": 1}\n', "tokenizer_config.json": "{}"}
PLAN = "prefill.plan"


def toy(folder: Path, *, weights_hashed: bool = True) -> Path:
    """A toy bundle whose manifest is written as an export writes it. weights_hashed: False, as by --no-hash."""
    write_toy_bundle(folder, tokenizer=TOKENIZER)
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    if not weights_hashed:
        manifest["weights"]["files"]["weights.bin"]["sha256"] = None
    write_manifest(folder, manifest)
    return folder


def passing(bundle: Path, **changes: Any) -> ValidationReport:
    """The report of a run in which parity held, but for what `changes` say."""
    report = ValidationReport(
        bundle=str(bundle),
        checkpoint="somewhere/models/tiny",
        backend="onnxruntime",
        dtype="float32",
        seed=3,
        budget=4e-5,
        reference_error=1e-6,
        largest_logit=7.5,
        reason="float32",
        checks=(Check("prompt of 8", True, "whole prompt", 2e-6), Check("ragged batch", None, "one row only")),
        position_errors=(1e-6, 2e-6),
        versions={"onnxruntime": "1.31.0", "numpy": "2.3.0"},
    )
    return replace(report, **changes)


def validated(bundle: Path, *, sign: Path | None = None, **changes: Any) -> Receipt:
    """The receipt of such a run, in the bundle's `parity.json`."""
    outcome = prepare_receipt(bundle, sign=sign).conclude(passing(bundle, **changes), passed=True)
    assert outcome.receipt is not None
    return outcome.receipt


def proven_bundle(folder: Path) -> Path:
    """A bundle with the engine ENGINE; graph and engine have receipts."""
    bundle = toy(folder)
    build_engine(bundle, ENGINE)
    validated(bundle)
    validated(bundle, backend="tensorrt", engine=ENGINE)
    return bundle


def prove(bundle: Path, **options: Any) -> Bundle:
    """What `load` does before it opens an engine, by default with require_parity=True."""
    given: dict[str, Any] = {"require_parity": True, "trust": None, "backend": None, "engine": None}
    return open_bundle(bundle, **(given | options))


def failing(bundle: Path, **changes: Any) -> ValidationReport:
    """The report of a run in which parity failed."""
    return passing(bundle, checks=(Check("prompt of 8", False, "over budget", 1.0),), **changes)


def build_engine(bundle: Path, name: str, backend: str = "tensorrt", content: bytes = b"a plan") -> Path:
    """Something that lies in the bundle as an engine does; returns its folder."""
    with engine_folder(read_bundle(bundle), name) as folder:
        (folder / PLAN).write_bytes(content)
        document = {"backend": backend, "plans": {"prefill": {"file": PLAN, "bytes": len(content)}}}
        (folder / "engine.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return bundle / "engines" / name


def receipts_of(bundle: Path) -> list[dict[str, Any]]:
    """What `parity.json` holds, as plain data."""
    found: list[dict[str, Any]] = json.loads((bundle / RECEIPTS_FILE).read_text(encoding="utf-8"))["receipts"]
    return found


def signed(bundle: Path, folder: Path) -> Path:
    """Give the bundle a receipt signed by a key in `folder`; returns the public one."""
    private, public = key_pair(folder, "ours")
    validated(bundle, sign=private)
    return public


def key_pair(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    """PEM files of a new private key and of its public one."""
    key = Ed25519PrivateKey.generate()
    encryption: KeySerializationEncryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public
