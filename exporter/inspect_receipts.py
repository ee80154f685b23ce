"""What `cierzo inspect` shows of a bundle's receipts of parity. Weights are not read: `--require-parity` does that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from exporter.inspect_report import ReceiptFacts
from runtime.bundle import MANIFEST_NAME, Bundle
from runtime.engine_info import ENGINES_FOLDER
from runtime.errors import BundleError
from runtime.parity_proof import difference, hash_file, manifest_hash, read_receipts, stated_hash
from runtime.parity_receipt import RECEIPTS_FILE, Receipt

if TYPE_CHECKING:
    from rich.table import Table

SMALL = 64 << 20
"""Bytes of a file that is hashed at most, which takes a tenth of a second."""


def receipt_facts(bundle: Bundle) -> tuple[ReceiptFacts, ...]:
    """Each receipt of the bundle, and whether it still fits the manifest and the small files; none without a file."""
    if not (bundle.path / RECEIPTS_FILE).exists():
        return ()
    try:
        receipts = read_receipts(bundle)
    except BundleError as error:
        return (ReceiptFacts(problem=str(error)),)
    try:
        manifest_sha256 = manifest_hash((bundle.path / MANIFEST_NAME).read_bytes())
    except BundleError as error:
        return tuple(_facts(receipt, str(error)) for receipt in receipts)
    changed = _changed_file(bundle)
    return tuple(_facts(receipt, _problem(bundle, receipt, manifest_sha256, changed)) for receipt in receipts)


def draw_receipts(receipts: Sequence[ReceiptFacts]) -> Table:
    """A row for each."""
    from rich.markup import escape

    from exporter.console import new_table

    table = new_table("Receipts of parity", "for", "suite", "when", "fits", left=4)
    for receipt in receipts:
        what = "" if receipt.backend is None else receipt.engine or receipt.backend
        signed = "" if receipt.signed_by is None else f"\nsigned by {receipt.signed_by}"
        fits = "graph and manifest do" if receipt.problem is None else f"no: {receipt.problem}"
        table.add_row(escape(what), receipt.suite or "", receipt.made or "", escape(fits + signed))
    return table


def _facts(receipt: Receipt, problem: str | None) -> ReceiptFacts:
    return ReceiptFacts(
        backend=receipt.backend,
        engine=receipt.engine,
        suite=receipt.suite,
        device=receipt.device,
        made=receipt.made,
        cierzo_version=receipt.cierzo_version,
        signed_by=None if receipt.signature is None else receipt.signature.signer,
        problem=problem,
    )


def _problem(bundle: Bundle, receipt: Receipt, manifest_sha256: str, changed: str | None) -> str | None:
    if changed is not None:
        return f"the hash of {changed} differs"
    if (fault := difference(receipt, bundle, manifest_sha256)) is not None:
        return f"it {fault}"
    folder = bundle.path / ENGINES_FOLDER / (receipt.engine or "")
    for name, seen in receipt.hashes.engine.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != seen.bytes:
            return f"the size of {name} differs"
    return None


def _changed_file(bundle: Bundle) -> str | None:
    """The first of the small files that is not what the manifest says."""
    for name, info in bundle.manifest.files.items():
        if info.bytes <= SMALL and hash_file(bundle.file(name), info) != stated_hash(info):
            return name
    return None
