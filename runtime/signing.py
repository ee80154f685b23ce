"""Signatures of ed25519 (RFC 8032), by the package `cryptography`, which only this file imports, and only when called.

Keys come as PEM files, as OpenSSL writes them:

    openssl genpkey -algorithm ed25519 -out KEY.pem
    openssl pkey -in KEY.pem -pubout -out PUBKEY.pem
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import InputError
from runtime.json_files import open_regular_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_BYTES, SIGNATURE_BYTES = 32, 64
_MOST_PEM_BYTES = 1 << 16
_PRIVATE, _ENCRYPTED = b"PRIVATE KEY-----", b"ENCRYPTED"
_MAKE_A_KEY = "Make a pair with `openssl genpkey -algorithm ed25519 -out KEY.pem`"
_PUBLIC_HALF = "`openssl pkey -in KEY.pem -pubout -out PUBKEY.pem`"


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key. key: the raw public key that belongs to it, 32 bytes. sign: gives 64 bytes."""

    key: bytes
    sign: Callable[[bytes], bytes]


def read_signer(path: str | os.PathLike[str]) -> Signer:
    """The private key in the PEM file `path`.

    Raises InputError for a file that cannot be read, that is encrypted or holds no ed25519 private key, and where
    `cryptography` is not installed.
    """
    content = _read(path, "signing key")
    require_cryptography()
    if _ENCRYPTED in content:
        raise InputError(
            f"The signing key {path} is encrypted, and Cierzo asks for no passwords. Decrypt it into a file that only "
            "you can read (`openssl pkey -in KEY.pem -out DECRYPTED.pem`) and name that."
        )
    key = _private_key(content)
    if key is None:
        raise InputError(f"{path} holds no ed25519 private key in PEM. {_MAKE_A_KEY} and name KEY.pem.")
    return Signer(key.public_key().public_bytes_raw(), key.sign)


def read_public_key(path: str | os.PathLike[str]) -> bytes:
    """The raw ed25519 public key, 32 bytes, in the PEM file `path`. Raises InputError as `read_signer` does."""
    content = _read(path, "trusted key")
    require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if _PRIVATE in content:
        raise InputError(
            f"{path} holds a private key, which only its owner should have. Trust the public one that belongs to it: "
            f"{_PUBLIC_HALF} writes it."
        )
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(
            f"{path} holds no ed25519 public key in PEM. {_PUBLIC_HALF} writes the one that belongs to KEY.pem."
        )
    return key.public_bytes_raw()


def is_signed(key: bytes, signature: bytes, content: bytes) -> bool:
    """Whether `signature` is that of `content` by the raw public `key`. Raises InputError without `cryptography`."""
    require_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


def require_cryptography() -> None:
    """Raises InputError, with what to type, when `cryptography` is not installed."""
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"Signatures need the Python package cryptography, which cannot be used here ({error}). "
            '`pip install "cierzo[sign]"` brings it.'
        ) from error


def _private_key(content: bytes) -> Ed25519PrivateKey | None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: encrypted, in a way that its text does not say
        return None
    return key if isinstance(key, Ed25519PrivateKey) else None


def _read(path: str | os.PathLike[str], what: str) -> bytes:
    try:
        with open_regular_file(Path(path)) as file:
            return file.read(_MOST_PEM_BYTES)
    except OSError as error:
        raise InputError(f"The {what} {path} cannot be read: {error.strerror or error}. Name a PEM file.") from error
