"""`parity.json` of a bundle: its receipts, one for each (backend, engine, suite), in a form with no byte to spare.

    {"schema_version": 1, "receipts": [{"backend", "engine", "suite", …, "hashes", "signature", "digest"}, …]}

It is written for people, as `manifest.json` is: indented by one, one line end at the end. `as_file` is that form. Where
a proof is asked for, any other form of the same content is taken for tampering.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from runtime.errors import BundleError
from runtime.json_files import parse_json_object
from runtime.manifest_section import Section
from runtime.parity_receipt import RECEIPTS, RECEIPTS_FILE, Receipt, parse_receipt

SCHEMA_VERSION = 1


def as_file(document: Mapping[str, Any]) -> bytes:
    """The bytes of `parity.json` and of `manifest.json`, as Cierzo writes them."""
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def receipts_file(receipts: Iterable[Receipt]) -> bytes:
    """The `parity.json` of these receipts, in the order of their keys."""
    ordered = sorted(receipts, key=lambda receipt: (receipt.backend, receipt.engine or "", receipt.suite))
    return as_file({"schema_version": SCHEMA_VERSION, "receipts": [dict(receipt.document) for receipt in ordered]})


def parse_receipts(content: bytes) -> tuple[Receipt, ...]:
    """Parse the content of a `parity.json`.

    Raises BundleError for content that is no JSON object or of another schema, that is not exactly what `as_file`
    writes, for fields that are missing or mistyped, for two receipts of one key, and for a digest that differs.
    """
    root = Section(_object(content), "", RECEIPTS)
    _require_schema(root.integer("schema_version", minimum=1))
    if root.data.keys() != {"schema_version", "receipts"} or as_file(root.data) != content:
        raise BundleError(
            f"The {RECEIPTS_FILE} is not as Cierzo writes it, byte for byte, so it was changed since. "
            f"{RECEIPTS.remedy}."
        )
    receipts = tuple(parse_receipt(section) for section in root.sections("receipts"))
    if len({receipt.key for receipt in receipts}) < len(receipts):
        raise BundleError(f"The {RECEIPTS_FILE} holds two receipts of the same run. {RECEIPTS.remedy}.")
    return receipts


def sound_receipts(content: bytes) -> tuple[Receipt, ...]:
    """The receipts in a `parity.json` that are whole, whatever else in it is damaged; one for each key.

    Raises BundleError only for a schema that this Cierzo does not know: nobody may throw that away unread.
    """
    try:
        document = _object(content)
    except BundleError:
        return ()
    version, entries = document.get("schema_version"), document.get("receipts")
    if type(version) is int:
        _require_schema(version)
    found = {}
    for entry in entries if isinstance(entries, list) else []:
        try:
            receipt = parse_receipt(Section(entry if isinstance(entry, dict) else {}, "", RECEIPTS))
        except BundleError:
            continue
        found[receipt.key] = receipt
    return tuple(found.values())


def _object(content: bytes) -> dict[str, Any]:
    return parse_json_object(
        content, lambda cause: BundleError(f"The {RECEIPTS_FILE} is not readable JSON ({cause}). {RECEIPTS.remedy}.")
    )


def _require_schema(version: int) -> None:
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"The {RECEIPTS_FILE} was written with schema {version}, but this Cierzo reads schema {SCHEMA_VERSION}. "
            "Upgrade Cierzo, or delete the file and validate the bundle again with this version."
        )
