"""Options about receipts of parity: those of `cierzo validate`, which writes them, and of commands that ask for one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from exporter.receipt import PendingReceipt, ReceiptOutcome
    from exporter.validation_report import ValidationReport

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FILE = click.Path(dir_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True)
class ReceiptOptions:
    """What `cierzo validate` was asked for: a private key to sign with, or no receipt at all."""

    sign: Path | None
    write: bool

    def prepare(self, bundle: Path, weights_folder: Path | None) -> Receipts:
        """Before the validation; raises what `exporter.receipt.prepare_receipt` does."""
        if not self.write:
            return Receipts(None)
        from exporter.receipt import prepare_receipt

        return Receipts(prepare_receipt(bundle, sign=self.sign, weights_folder=weights_folder))


@dataclass(frozen=True, slots=True)
class Receipts:
    """What is to become of the receipts of a run; pending: None leaves them as they are."""

    pending: PendingReceipt | None

    def conclude(
        self,
        report: ValidationReport,
        *,
        holds: bool,
        passed: bool,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> ReceiptOutcome | None:
        """After the validation. holds: whether parity does. passed: whether the run does, which may ask for more.

        A run that only became worse than its baseline makes no receipt and takes none away. Raises what
        `exporter.receipt.PendingReceipt.conclude` does.
        """
        if self.pending is None or (holds and not passed):
            return None
        return self.pending.conclude(report, passed=holds, progress=progress)


@dataclass(frozen=True, slots=True)
class ProofOptions:
    """What a command that runs a bundle asks for; see `runtime.load`."""

    require_parity: bool | str = False
    trust: Path | None = None


def receipt_options(command: _Command) -> _Command:
    """Adds --sign and --no-receipt; the command gets them as `receipt`, a ReceiptOptions."""

    @functools.wraps(command)
    def read(*arguments: Any, sign: Path | None, no_receipt: bool, **others: Any) -> Any:
        if no_receipt and sign is not None:
            raise click.UsageError("--sign signs the receipt that --no-receipt does without: give one of them.")
        return command(*arguments, receipt=ReceiptOptions(sign, not no_receipt), **others)

    for option in reversed(_RECEIPT):
        read = option(read)
    return read  # type: ignore[return-value]


def proof_options(command: _Command) -> _Command:
    """Adds --require-parity, --require-full-parity and --trust; the command gets them as `proof`, a ProofOptions."""

    @functools.wraps(command)
    def read(*arguments: Any, require_parity: bool, full_parity: bool, trust: Path | None, **others: Any) -> Any:
        if trust is not None and not (require_parity or full_parity):
            raise click.UsageError("--trust names whose receipts count, so it needs --require-parity beside it.")
        from runtime.parity_receipt import FULL

        return command(*arguments, proof=ProofOptions(FULL if full_parity else require_parity, trust), **others)

    for option in reversed(_PROOF):
        read = option(read)
    return read  # type: ignore[return-value]


_RECEIPT = (
    click.option("--sign", type=_FILE, metavar="KEY.pem", help="Sign the receipt with this ed25519 private key."),
    click.option("--no-receipt", is_flag=True, help="Leave the bundle's receipts of parity as they are."),
)
_PROOF = (
    click.option(
        "--require-parity", is_flag=True, help="Refuse a bundle without a receipt of parity that fits every byte of it."
    ),
    click.option(
        "--require-full-parity", "full_parity", is_flag=True, help="The same, and of the full suite of checks."
    ),
    click.option(
        "--trust",
        type=_FILE,
        metavar="PUBKEY.pem",
        help="Only a receipt that this ed25519 key has signed counts.",
    ),
)
