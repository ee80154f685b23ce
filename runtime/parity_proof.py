"""Whether a bundle's receipts prove what is about to run: the work behind `load(..., require_parity=…)`.

What costs nothing is looked at first, so that a bundle without a receipt is refused at once and not after 14 GB were
read. Then every byte that will run is read once: of the graph, the tokenizer, the weights, and the files of the engine.

A proof is of the files as they are when they are read here. It holds as long as nobody writes to them while the session
is open, also after loading, because weights are read where they lie; nor may anybody change the receipt and the files
together: against the latter only a signature helps.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from runtime.backends import DEFAULT_BACKEND
from runtime.bundle import MANIFEST_NAME, VERIFYING, Bundle, Progress, read_bundle, verified
from runtime.engine_files import read_engine_document
from runtime.engine_info import ENGINE_FILE, ENGINES_FOLDER
from runtime.errors import BundleError, InputError, UnprovenError
from runtime.hashing import blocks_sha256_of, sha256_of
from runtime.json_files import MOST_BYTES, brief, open_regular_file, parse_json_object
from runtime.manifest import FileInfo, parse_manifest
from runtime.parity_file import as_file, parse_receipts
from runtime.parity_receipt import BLOCKS_SHA256, FULL, RECEIPTS_FILE, SHA256, SUITES, FileHash, Receipt, subject
from runtime.signing import is_signed, read_public_key


def open_bundle(
    path: str | os.PathLike[str],
    require_parity: bool | str,
    trust: str | os.PathLike[str] | None,
    backend: str | None,
    engine: str | None,
    *,
    verify: bool = False,
    weights_folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """The bundle in a folder, proved if `require_parity` says so; for the options see `runtime.load`.

    Raises BundleError as `read_bundle` does, and UnprovenError and InputError as `require_proof`; InputError also for a
    trusted key where no proof is asked for.
    """
    if require_parity is False:
        if trust is not None:
            raise InputError(
                "Keys are trusted to sign receipts of parity: `trust` needs require_parity=True beside it."
            )
        return read_bundle(path, verify=verify, weights_folder=weights_folder, progress=progress)
    # A proof reads every file itself, after what costs nothing.
    opened = read_bundle(path, weights_folder=weights_folder)
    return require_proof(opened, backend=backend, engine=engine, suite=require_parity, trust=trust, progress=progress)


def require_proof(
    bundle: Bundle,
    *,
    backend: str | None,
    engine: str | None,
    suite: bool | str = True,
    trust: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """The bundle, listing only those of its engines that a receipt proves; every hash was compared.

    backend, engine: what is to run, as for `runtime.load`. suite: True or "quick" takes a receipt of any suite, "full"
    only one of the full suite. trust: PEM file of the public key by which the receipt must be signed.

    Raises UnprovenError where no receipt fits, naming the cause and the way out; BundleError for files that are not
    what the manifest says; InputError for an unknown suite, for a key that cannot be read and where `cryptography` is
    needed and not installed.
    """
    if suite is not True and suite not in SUITES:
        raise InputError(f"`require_parity` must be False, True or one of {', '.join(SUITES)}, not {brief(suite)}.")
    key = None if trust is None else read_public_key(trust)
    name = DEFAULT_BACKEND if backend is None else backend
    manifest_sha256 = _manifest_hash(bundle)
    _require_listed_engines(bundle)
    receipts = read_receipts(bundle)
    found = [r for r in receipts if r.backend == name and (engine is None or r.engine == engine)]
    again = _way_out(bundle, name, engine, suite, key)
    if not found:
        has = ", ".join(sorted({r.subject for r in receipts})) or "nothing"
        raise UnprovenError(
            f"The bundle {bundle.path} has no receipt of parity for {subject(name, engine)}; it has receipts for "
            f"{has}. {again}"
        )
    fitting: list[Receipt] = []
    faults: dict[str, None] = {}
    for receipt in found:
        fault = _misfit(bundle, receipt, manifest_sha256, full=suite == FULL, key=key)
        if fault is None:
            fitting.append(receipt)
        else:
            faults[f"the receipt for {receipt.subject} ({receipt.suite}) {fault}"] = None
    if not fitting:
        raise UnprovenError(f"The bundle {bundle.path} is not proved: {'; '.join(faults)}. {again}")
    _compare_files(bundle, fitting, again, progress)
    proven = {receipt.engine for receipt in fitting}
    engines = {each: info for each, info in bundle.manifest.engines.items() if each in proven}
    return replace(bundle, manifest=replace(bundle.manifest, engines=engines))


def read_receipts(bundle: Bundle) -> tuple[Receipt, ...]:
    """The receipts of a bundle. Raises UnprovenError where it has none, and for a file that was changed."""
    file = bundle.path / RECEIPTS_FILE
    try:
        with open_regular_file(file) as stream:
            content = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UnprovenError(
            f"The bundle {bundle.path} has no receipt of parity: there is no {RECEIPTS_FILE} in it, which "
            f"`cierzo validate {bundle.path}` writes when parity holds."
        ) from None
    except OSError as error:
        raise UnprovenError(f"{file} cannot be read: {error.strerror or error}. Validate the bundle again.") from error
    try:
        return parse_receipts(content)
    except BundleError as error:
        raise UnprovenError(f"{error} The bundle is {bundle.path}.") from error


def manifest_hash(content: bytes) -> str:
    """SHA-256 of a manifest as it would be written without its `engines`, which may be built after a validation.

    Raises UnprovenError for a manifest that is not byte for byte as Cierzo writes it.
    """
    document = parse_json_object(content, lambda cause: UnprovenError(f"The manifest is not readable JSON ({cause})."))
    if as_file(document) != content:
        raise UnprovenError(
            f"The {MANIFEST_NAME} is not as Cierzo writes it, byte for byte, so somebody changed it. Export the "
            "checkpoint again, and validate the new bundle."
        )
    return hashlib.sha256(as_file({k: v for k, v in document.items() if k != "engines"})).hexdigest()


def hash_file(path: Path, info: FileInfo, progress: Progress | None = None) -> FileHash:
    """The hash of a file of the manifest, of the kind that the manifest has of it; the block hash where it has none."""

    def report(done: int) -> None:
        if progress is not None:
            progress(VERIFYING, done, info.bytes)

    try:
        if info.sha256 is not None:
            return FileHash(info.bytes, SHA256, sha256_of(path, report))
        return FileHash(info.bytes, BLOCKS_SHA256, blocks_sha256_of(path, report))
    except OSError as error:
        raise BundleError(f"The file {path} cannot be read: {error}.") from error


def stated_hash(info: FileInfo) -> FileHash | None:
    """What the manifest says of a file; None where it has no hash of it."""
    if info.sha256 is not None:
        return FileHash(info.bytes, SHA256, info.sha256)
    return None if info.blocks_sha256 is None else FileHash(info.bytes, BLOCKS_SHA256, info.blocks_sha256)


def difference(receipt: Receipt, bundle: Bundle, manifest_sha256: str) -> str | None:
    """What of the bundle is not what the receipt saw, as far as the manifest says; the end of a sentence."""
    manifest, hashes = bundle.manifest, receipt.hashes
    for stated, seen in ((manifest.files, hashes.files), (manifest.weights.files, hashes.weights)):
        for name in (*stated, *seen):
            if name not in stated or name not in seen:
                return f"is of other files: {name} is not in both"
            due = stated_hash(stated[name])
            if seen[name] != due and (due is not None or seen[name].bytes != stated[name].bytes):
                return f"does not fit: the hash of {name} differs"
    if hashes.manifest != manifest_sha256:
        return f"does not fit: the hash of {MANIFEST_NAME} differs"
    if receipt.engine is not None:
        if receipt.engine not in manifest.engines:
            return "is of an engine that the bundle does not have"
        listed = manifest.engines[receipt.engine]
        if hashes.engine.get(ENGINE_FILE) != FileHash(listed.bytes, SHA256, listed.sha256 or ""):
            return f"does not fit: the hash of its {ENGINE_FILE} differs, as after another build"
    return None


def _misfit(bundle: Bundle, receipt: Receipt, manifest_sha256: str, *, full: bool, key: bytes | None) -> str | None:
    """Why a receipt proves nothing here, as the end of a sentence about it; None where only files are left to read."""
    if full and receipt.suite != FULL:
        return f"is of another suite than {FULL}"
    if key is not None and (fault := _unsigned(receipt, key)) is not None:
        return fault
    return difference(receipt, bundle, manifest_sha256)


def _unsigned(receipt: Receipt, key: bytes) -> str | None:
    if receipt.signature is None:
        return "is not signed"
    if receipt.signature.key != key:
        return f"is signed by another key than the trusted one ({receipt.signature.signer})"
    if not is_signed(key, receipt.signature.value, receipt.signed_bytes):
        return "bears a signature that is wrong: somebody changed it after it was signed"
    return None


def _compare_files(bundle: Bundle, receipts: Sequence[Receipt], again: str, progress: Progress | None) -> None:
    """Read all files: those with a hash in the manifest are held to it, and the others to the receipts."""
    for name in verified(bundle, progress).unverified:
        found = hash_file(bundle.file(name), bundle.manifest.weights.files[name], progress)
        if any(receipt.hashes.weights[name] != found for receipt in receipts):
            raise _differs(bundle, name, again)
    for receipt in receipts:
        if receipt.engine is not None:
            folder = Path(ENGINES_FOLDER) / receipt.engine
            for name, seen in receipt.hashes.engine.items():
                if _hash_of(bundle.path / folder / name) != seen:
                    raise _differs(bundle, str(folder / name), again)


def _hash_of(file: Path) -> FileHash:
    try:
        return FileHash(file.stat().st_size, SHA256, sha256_of(file))
    except OSError as error:
        raise UnprovenError(f"{file}, which was there when parity was shown, cannot be read: {error}.") from error


def _differs(bundle: Bundle, name: str, again: str) -> UnprovenError:
    return UnprovenError(
        f"The bundle {bundle.path} is not proved: the hash of {name} is not that of the file that was validated, so it "
        f"was damaged or changed. Restore it. {again}"
    )


def _manifest_hash(bundle: Bundle) -> str:
    try:
        with open_regular_file(bundle.path / MANIFEST_NAME) as stream:
            content = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise BundleError(f"The manifest of {bundle.path} cannot be read: {error}.") from error
    sha256 = manifest_hash(content)
    if parse_manifest(content) != bundle.manifest:
        raise BundleError(f"The manifest of {bundle.path} was changed while it was loaded. Load it again.")
    return sha256


def _require_listed_engines(bundle: Bundle) -> None:
    """Hold what the manifest says of every engine, which the receipts of others leave out, to what is there."""
    for name in bundle.manifest.engines:
        if not os.path.isdir(bundle.path / ENGINES_FOLDER / name):
            raise UnprovenError(
                f"The manifest of {bundle.path} lists the engine {name}, which is not there, so the bundle is not as "
                "it was written. Restore the engine's folder, or build any engine, which lists what is there."
            )
        read_engine_document(bundle, name)


def _way_out(bundle: Bundle, backend: str, engine: str | None, suite: bool | str, key: bytes | None) -> str:
    words: Mapping[str, object] = {
        "--backend": backend if backend != DEFAULT_BACKEND else None,
        "--engine": engine,
        "--suite": FULL if suite == FULL else None,
        "--sign": None if key is None else "KEY.pem",
    }
    options = "".join(f" {option} {value}" for option, value in words.items() if value is not None)
    return f"`cierzo validate {bundle.path}{options}` makes a new receipt if parity holds."
