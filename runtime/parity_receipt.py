"""A receipt of parity: what `cierzo validate` held against the reference, and the hashes of what it ran.

Its digest is the SHA-256 of the canonical JSON of all its other fields, so that a damaged receipt is found; who may
write the file can write another digest as well, and against that only a signature helps. It signs SIGNED_FOR and the
canonical JSON of all fields but itself and the digest.

Canonical JSON: keys sorted, no white space, UTF-8 without escapes that JSON does not require, numbers as Python writes
them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from runtime.errors import BundleError
from runtime.json_files import MOST_KEY_CHARACTERS, brief
from runtime.manifest_section import Document, Section
from runtime.signing import KEY_BYTES, SIGNATURE_BYTES, Signer

RECEIPTS_FILE = "parity.json"
SIGNED_FOR = b"Cierzo parity receipt, schema 1\n"
"""What a signature begins with, so that it can never be taken for that of something else by the same key."""

QUICK, FULL = "quick", "full"
SUITES = (FULL, QUICK)
"""Names of the suites of `cierzo validate`, the larger one first."""

SHA256, BLOCKS_SHA256 = "sha256", "blocks_sha256"
RECEIPTS = Document(f"The {RECEIPTS_FILE}", "Run `cierzo validate` again, which writes it anew")


@dataclass(frozen=True, slots=True)
class FileHash:
    """Size in bytes of a file, and its hash in lower-case hex. kind: SHA256 or BLOCKS_SHA256 (`runtime.hashing`)."""

    bytes: int
    kind: str
    value: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in a receipt."""
        return {"bytes": self.bytes, self.kind: self.value}


@dataclass(frozen=True, slots=True)
class Hashes:
    """What a run was about.

    manifest: SHA-256 of the manifest without its `engines` (`runtime.parity_proof.manifest_hash`). files: graph and
    tokenizer. weights: the files that hold weights. engine: the files of the engine's folder; empty without one.
    """

    manifest: str
    files: Mapping[str, FileHash]
    weights: Mapping[str, FileHash]
    engine: Mapping[str, FileHash]

    def to_json(self) -> dict[str, Any]:
        """As it stands in a receipt."""
        parts = {"files": self.files, "weights": self.weights, "engine": self.engine}
        written = {part: {name: entry.to_json() for name, entry in files.items()} for part, files in parts.items()}
        return {"manifest": self.manifest, **written}


@dataclass(frozen=True, slots=True)
class Figures:
    """Errors of logits against float64, as in a validation's report.

    budget: the largest that was allowed. reference_error: of the reference in the engine's type. largest_error: of the
    engine. checks_run: how many checks ran. checks_not_run: names of those that could not. mean_kl: in nats, of
    quantised weights against the original ones, None where none are quantised.
    """

    budget: float
    reference_error: float
    largest_error: float
    largest_logit: float
    checks_run: int
    checks_not_run: tuple[str, ...]
    mean_kl: float | None


@dataclass(frozen=True, slots=True)
class Signature:
    """key: raw ed25519 public key, 32 bytes. value: 64 bytes. Whether it is right, `runtime.signing` says."""

    key: bytes
    value: bytes

    @property
    def signer(self) -> str:
        """The key in base64, as it stands in a receipt."""
        return base64.b64encode(self.key).decode()


@dataclass(frozen=True, slots=True)
class Receipt:
    """One passing run. engine: None where the bundle's graph ran. made: UTC, as 2026-01-31T23:59:59Z.

    document: the JSON object that all of this was read from, and more if a later version wrote it.
    """

    backend: str
    engine: str | None
    suite: str
    device: str
    seed: int
    dtype: str
    cierzo_version: str
    versions: Mapping[str, str]
    checkpoint: str
    made: str
    figures: Figures
    hashes: Hashes
    signature: Signature | None
    digest: str
    document: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str | None, str]:
        """What there is only one receipt for."""
        return self.backend, self.engine, self.suite

    @property
    def subject(self) -> str:
        """What ran, for a message."""
        return subject(self.backend, self.engine)

    @property
    def signed_bytes(self) -> bytes:
        """What its signature signs."""
        return _signed_bytes(self.document)


def subject(backend: str, engine: str | None) -> str:
    """What a receipt is about, for a message."""
    return f"the backend {backend}" if engine is None else f"the engine {engine} of the backend {backend}"


def canonical(value: Mapping[str, Any]) -> bytes:
    """Canonical JSON (see the module). Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sealed(fields: Mapping[str, Any], signer: Signer | None) -> Receipt:
    """The receipt of these fields, which have neither signature nor digest, with both; unsigned without a signer."""
    document = dict(fields)
    if signer is not None:
        value = signer.sign(_signed_bytes(document))
        document["signature"] = {"key": _base64(signer.key), "value": _base64(value)}
    document["digest"] = hashlib.sha256(canonical(document)).hexdigest()
    return parse_receipt(Section(document, "", RECEIPTS))


def parse_receipt(section: Section) -> Receipt:
    """One receipt. Raises BundleError for a missing or mistyped field and for a digest that differs."""
    digest = section.hash("digest")
    rest = {key: value for key, value in section.data.items() if key != "digest"}
    if hashlib.sha256(canonical(rest)).hexdigest() != digest:
        raise BundleError(
            f"The digest of `{section.path[:-1] or 'receipt'}` in the {RECEIPTS_FILE} is not that of its fields: it "
            f"was damaged or changed. {RECEIPTS.remedy}."
        )
    versions = section.section("versions")
    return Receipt(
        **{key: _name(section, key) for key in ("backend", "device", "dtype", "cierzo_version", "checkpoint", "made")},
        engine=None if section.optional_string("engine") is None else _name(section, "engine"),
        suite=section.one_of("suite", SUITES),
        seed=_seed(section),
        versions=MappingProxyType({key: _name(versions, key) for key in versions.data}),
        figures=_figures(section.section("figures")),
        hashes=_hashes(section.section("hashes")),
        signature=_signature(section.section("signature")) if "signature" in section.data else None,
        digest=digest,
        document=MappingProxyType(dict(section.data)),
    )


def _signed_bytes(document: Mapping[str, Any]) -> bytes:
    return SIGNED_FOR + canonical({k: v for k, v in document.items() if k not in ("signature", "digest")})


def _figures(section: Section) -> Figures:
    return Figures(
        **{key: _number(section, key) for key in ("budget", "reference_error", "largest_error", "largest_logit")},
        checks_run=section.integer("checks_run", minimum=1),
        checks_not_run=tuple(section.strings("checks_not_run")),
        mean_kl=None if section.data.get("mean_kl") is None else _number(section, "mean_kl"),
    )


def _hashes(section: Section) -> Hashes:
    return Hashes(
        manifest=section.hash("manifest"),
        **{part: _files(section.section(part)) for part in ("files", "weights", "engine")},
    )


def _files(section: Section) -> Mapping[str, FileHash]:
    files = {}
    for name in section.data:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
            raise _wrong(section, name, "which lies outside the bundle")
        entry = section.section(name)
        kind = SHA256 if SHA256 in entry.data else BLOCKS_SHA256
        files[name] = FileHash(entry.integer("bytes", minimum=0), kind, entry.hash(kind))
    return MappingProxyType(files)


def _signature(section: Section) -> Signature:
    return Signature(_bytes(section, "key", KEY_BYTES), _bytes(section, "value", SIGNATURE_BYTES))


def _bytes(section: Section, key: str, count: int) -> bytes:
    text = section.string(key)
    try:
        value = base64.b64decode(text, validate=True)
    except ValueError:
        value = b""
    if len(value) != count:
        raise _wrong(section, text, f"which is not the base64 of {count} bytes")
    return value


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _name(section: Section, key: str) -> str:
    """A string that messages may hold."""
    value = section.string(key)
    if not value.isprintable() or len(value) > MOST_KEY_CHARACTERS:
        raise _wrong(section, value, f"which is no text of up to {MOST_KEY_CHARACTERS} characters")
    return value


def _seed(section: Section) -> int:
    value = section.data.get("seed")
    if type(value) is not int or value < 0:  # of any size: it is a name, not an amount
        raise _wrong(section, value, "which is no seed")
    return value


def _number(section: Section, key: str) -> float:
    value = section.data.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(section, value, f"which is no number, as `{key}`")
    return float(value)


def _wrong(section: Section, value: object, fault: str) -> BundleError:
    return BundleError(
        f"{RECEIPTS.name}'s `{section.path[:-1] or 'receipt'}` holds {brief(value)}, {fault}. {RECEIPTS.remedy}."
    )
