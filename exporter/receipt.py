"""Makes a receipt of parity after a validation and keeps `parity.json` of the bundle true.

A run that passes writes its receipt in the place of an older one. A run that fails removes the receipts of what it ran:
they say what is no longer so. Receipts of files that have changed since go with the next one that is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from exporter.describe import version
from exporter.receipt_file import change_receipts, require_writable
from exporter.validation_report import ValidationReport
from runtime.bundle import MANIFEST_NAME, Bundle, read_bundle, verified
from runtime.engine_files import read_engine_document
from runtime.engine_info import ENGINES_FOLDER
from runtime.errors import BundleError, CierzoError, ParityError
from runtime.hashing import sha256_of
from runtime.json_files import MOST_BYTES, open_regular_file
from runtime.manifest import Manifest
from runtime.parity_proof import difference, hash_file, manifest_hash, stated_hash
from runtime.parity_receipt import RECEIPTS_FILE, SHA256, FileHash, Hashes, Receipt, sealed, subject
from runtime.signing import Signer, read_signer

Progress = Callable[[str, int, int], None]
State = tuple[int, int]
"""Bytes of a file, and nanosecond of the last change of its content."""


@dataclass(frozen=True, slots=True)
class ReceiptOutcome:
    """What became of `file`. receipt: that was written, None after a failure. removed: how many are gone for it."""

    file: Path
    subject: str
    receipt: Receipt | None
    removed: int = 0

    def __str__(self) -> str:
        """One line for a person."""
        if self.receipt is not None:
            by = "" if self.receipt.signature is None else f", signed by {self.receipt.signature.signer}"
            return f"wrote {self.file}: a receipt for {self.subject}, suite {self.receipt.suite}{by}"
        if self.removed:
            what = "the receipt" if self.removed == 1 else f"the {self.removed} receipts"
            return f"removed {what} for {self.subject} from {self.file}, since parity fails"
        return f"wrote no receipt for {self.subject}, since parity fails"

    def to_json(self) -> dict[str, Any] | None:
        """Where the receipt is, and by what it is known; None where none was written."""
        if self.receipt is None:
            return None
        signature = self.receipt.signature
        return {
            "file": str(self.file),
            "suite": self.receipt.suite,
            "made": self.receipt.made,
            "digest": self.receipt.digest,
            "signed_by": None if signature is None else signature.signer,
        }


@dataclass(frozen=True, slots=True)
class PendingReceipt:
    """What is found out before a validation, so that hours of work do not end at a key that cannot be read.

    before: the manifest, None where it could not be read. states: of all files before anything was run; under the
    names of engines those of their folders, and under None the others.
    """

    bundle: Path
    weights_folder: Path | None
    signer: Signer | None
    before: Manifest | None
    states: Mapping[str | None, Mapping[Path, State | None]]

    def conclude(self, report: ValidationReport, *, passed: bool, progress: Progress | None = None) -> ReceiptOutcome:
        """Write the receipt of a run that passed, or remove those that a run has shown to be untrue.

        passed: whether all of it did; a receipt also needs the report's own verdict.
        progress: called with (stage, done, total), in bytes of the file that is being read.

        Raises BundleError for files that were changed during the run, for a manifest that Cierzo did not write as it
        is, and for a folder that cannot be written to.
        """
        file = self.bundle.absolute() / RECEIPTS_FILE
        opened = read_bundle(self.bundle, weights_folder=self.weights_folder)
        if not (passed and report.passed):
            ran = report.backend, report.engine
            removed = change_receipts(self.bundle, lambda old: [r for r in old if (r.backend, r.engine) != ran])
            return ReceiptOutcome(file, subject(*ran), None, removed)
        receipt = make_receipt(opened, report, self.signer, progress)
        self._require_unchanged(opened.manifest, report.engine)
        change_receipts(self.bundle, lambda old: [*(r for r in old if _stays(r, receipt, opened)), receipt])
        return ReceiptOutcome(file, receipt.subject, receipt)

    def _require_unchanged(self, manifest: Manifest, engine: str | None) -> None:
        """What was hashed is what ran. Other engines may have been built meanwhile."""
        states = {**self.states.get(None, {}), **self.states.get(engine, {})}
        changed = [str(path) for path, state in states.items() if _state(path) != state]
        if self.before is None or replace(self.before, engines={}) != replace(manifest, engines={}):
            changed.append(MANIFEST_NAME)
        if changed:
            raise BundleError(
                f"{changed[0]} was changed while the bundle {self.bundle} was validated, so that nobody knows which "
                "content was. Validate it again when nothing else writes there; no receipt was written."
            )


def prepare_receipt(
    bundle: str | Path, *, sign: str | Path | None = None, weights_folder: Path | None = None
) -> PendingReceipt:
    """Before a validation. sign: PEM file of the ed25519 private key that signs the receipt.

    Raises InputError for a key that cannot be used, and BundleError for a folder that nothing can be written into and
    for receipts of a later version of Cierzo.
    """
    signer = None if sign is None else read_signer(sign)
    folder = Path(bundle)
    try:
        opened = read_bundle(folder, weights_folder=weights_folder)
    except CierzoError:  # the validation refuses it, in its own words
        return PendingReceipt(folder, weights_folder, signer, None, {})
    require_writable(folder)
    manifest = opened.manifest
    states: dict[str | None, Mapping[Path, State | None]] = {}
    states[None] = _states([opened.file(name) for name in (*manifest.files, *manifest.weights.files)])
    for name in manifest.engines:
        with contextlib.suppress(OSError):  # its folder was deleted
            states[name] = _states(_files_in(opened.path / ENGINES_FOLDER / name))
    return PendingReceipt(folder, weights_folder, signer, manifest, states)


def make_receipt(
    bundle: Bundle, report: ValidationReport, signer: Signer | None, progress: Progress | None = None
) -> Receipt:
    """The receipt of a run of `bundle` that passed. Reads every file; raises BundleError for one that is damaged."""
    if not report.passed:
        raise ParityError(f"Parity does not hold for {bundle.path}, so there is no receipt of it.")
    quality = report.quality
    fields = {
        "backend": report.backend,
        "engine": report.engine,
        "suite": report.suite,
        "device": _printable(report.device),
        "seed": int(report.seed),
        "dtype": report.dtype,
        "cierzo_version": version("cierzo"),
        "versions": {name: _printable(found) for name, found in report.versions.items()},
        "checkpoint": _printable(Path(report.checkpoint).name),  # not where it lies, which is nobody's business
        "made": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "figures": {
            "budget": float(report.budget),
            "reference_error": float(report.reference_error),
            "largest_error": float(report.largest_error),
            "largest_logit": float(report.largest_logit),
            "checks_run": sum(check.passed is not None for check in report.checks),
            "checks_not_run": [check.name for check in report.checks if check.passed is None],
            "mean_kl": None if quality is None else float(quality.kl),
        },
        "hashes": _hashes(bundle, report.engine, progress).to_json(),
    }
    return sealed(fields, signer)


def _hashes(bundle: Bundle, engine: str | None, progress: Progress | None) -> Hashes:
    with open_regular_file(bundle.path / MANIFEST_NAME) as stream:
        manifest = manifest_hash(stream.read(MOST_BYTES + 1))
    verified(bundle, progress)
    files = {
        name: stated_hash(info) or hash_file(bundle.file(name), info, progress)
        for name, info in {**bundle.manifest.files, **bundle.manifest.weights.files}.items()
    }
    return Hashes(
        manifest=manifest,
        files={name: files[name] for name in bundle.manifest.files},
        weights={name: files[name] for name in bundle.manifest.weights.files},
        engine={} if engine is None else _engine_hashes(bundle, engine),
    )


def _engine_hashes(bundle: Bundle, engine: str) -> dict[str, FileHash]:
    """Of all files in its folder: what their names mean is the backend's business."""
    if engine not in bundle.manifest.engines:
        raise BundleError(
            f"The engine {engine} was removed from the bundle {bundle.path} while it was validated. Build it again, "
            "and validate it then."
        )
    files = _files_in(read_engine_document(bundle, engine).folder)
    return {file.name: FileHash(file.stat().st_size, SHA256, sha256_of(file)) for file in files}


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def _stays(old: Receipt, new: Receipt, bundle: Bundle) -> bool:
    """Whether an older receipt is still true beside the new one."""
    ours, theirs = new.hashes, old.hashes
    same = (ours.manifest, ours.files, ours.weights) == (theirs.manifest, theirs.files, theirs.weights)
    return old.key != new.key and same and difference(old, bundle, ours.manifest) is None


def _states(files: Iterable[Path]) -> dict[Path, State | None]:
    return {file: _state(file) for file in files}


def _state(file: Path) -> State | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _printable(text: str) -> str:
    """What a receipt may hold, however a folder or a device is called."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:200]
