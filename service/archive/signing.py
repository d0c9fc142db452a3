"""Signatures of archives: Ed25519, over the card, which has the sha256 of every other file.

`cryptography` is imported only if an archive is signed, or has to be (requirements-signing.txt).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from handler.errors import InvalidModel, InvalidSettings, SetupError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

MISSING = "signatures need the packages of requirements-signing.txt"


def read_private_key(path: Path) -> "Ed25519PrivateKey":
    """The key of `--sign`. Raises SetupError."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as exc:
        raise SetupError(MISSING) from exc
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as exc:
        raise InvalidSettings(f"--sign {path} cannot be read: {exc.strerror}") from exc
    except Exception as exc:  # cryptography has many words for what is no such key
        raise InvalidSettings(f"--sign {path} is no private key in PEM, unencrypted") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidSettings(f"--sign {path} must be a key for Ed25519")
    return key


def read_public_key(path: Path) -> "Ed25519PublicKey":
    """The key of `--require-signed`. Raises SetupError."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as exc:
        raise SetupError(MISSING) from exc
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as exc:
        raise InvalidSettings(f"--require-signed {path} cannot be read: {exc.strerror}") from exc
    except Exception as exc:
        raise InvalidSettings(f"--require-signed {path} is no public key in PEM") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidSettings(f"--require-signed {path} must be a key for Ed25519")
    return key


def check_signature(card: Path, signature: Path, key: "Ed25519PublicKey") -> None:
    """Raise InvalidModel unless `signature` is that of `card`, by the private half of `key`."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature.read_bytes(), card.read_bytes())
    except FileNotFoundError as exc:
        raise InvalidModel("it is not signed (./scripts/package --sign signs it)") from exc
    except InvalidSignature as exc:
        raise InvalidModel(
            f"{signature.name} is no signature of {card.name} by the key of --require-signed"
        ) from exc
