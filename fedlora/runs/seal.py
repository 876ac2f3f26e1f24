"""The seal of privacy.json: a digest of its content and, in a deployment, the server's signature.

The digest shows damage and careless edits. Only the signature shows forgery: the server signs with
a P-384 key whose certificate the federation's own CA issued for this purpose alone. The gateway's
TLS key, which is on a machine that faces the network, cannot sign statements.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.runs.run_files import finite

SEAL = "seal"
"""The key of privacy.json that the seal does not cover: its own."""
KEY, CERTIFICATE = "statement.key", "statement.pem"
"""The server's files, in its directory of keys."""
PURPOSE = x509.ObjectIdentifier("1.3.6.1.5.5.7.3.36")
"""Extended key usage of the certificate: document signing (RFC 9336)."""
_TAG = b"fedlora privacy statement 1\n"


@dataclass(frozen=True)
class Signer:
    """The server's key for statements.

    Args:
        key: The P-384 key.
        certificate: Its certificate, PEM.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: str

    @classmethod
    def open(cls, folder: Path) -> Self | None:
        """Read the key and certificate of a directory; None if it holds no key.

        Raises:
            ValueError: If a file is damaged, or the key is not that of the certificate.
            OSError: If a file cannot be read.
        """
        if not (folder / KEY).exists():
            return None
        pem = (folder / CERTIFICATE).read_bytes()
        try:
            _, key = read_pair(pem, (folder / KEY).read_bytes())
        except ValueError as error:
            raise ValueError(f"{folder / KEY} and {folder / CERTIFICATE}: {error}") from None
        return cls(key, pem.decode())


def read_pair(
    certificate: bytes, key: bytes
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Read a certificate and its private key from two PEM files.

    Raises:
        ValueError: If a file is damaged, or the key is not that of the certificate.
    """
    private = serialization.load_pem_private_key(key, None)
    public = x509.load_pem_x509_certificate(certificate)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic curve key")
    if private.public_key() != public.public_key():
        raise ValueError("the key does not belong to the certificate")
    return public, private


def sealed(statement: Mapping[str, Any], signer: Signer | None) -> dict[str, Any]:
    """Add the seal to a statement.

    Args:
        statement: The content of privacy.json without a seal.
        signer: The server's key; None in a simulation, which has no key.
    """
    content = finite(statement)
    data = _bytes(content)
    seal = {"sha256": hashlib.sha256(data).hexdigest()}
    if signer is not None:
        signature = signer.key.sign(data, ec.ECDSA(hashes.SHA384()))
        seal |= {
            "signature": base64.b64encode(signature).decode(),
            "certificate": signer.certificate,
        }
    return {**content, SEAL: seal}


def check_digest(statement: Mapping[str, Any]) -> str:
    """Check that a statement is as its seal says; return the digest (hex).

    Raises:
        ValueError: If it is not.
    """
    digest = hashlib.sha256(_bytes(statement)).hexdigest()
    if statement[SEAL]["sha256"] != digest:
        raise ValueError("the file was changed after it was written: its digest differs")
    return digest


def check_signature(statement: Mapping[str, Any], ca: bytes, signed: datetime) -> str:
    """Check a statement's signature by the server of the federation of this CA.

    Args:
        statement: The content of privacy.json.
        ca: The federation's CA certificate, PEM.
        signed: When the run ended; the certificate must have been valid then.

    Returns:
        SHA-256 (hex) of the server's certificate.

    Raises:
        ValueError: If there is no signature, or it is not such a server's.
    """
    seal = statement[SEAL]
    if "signature" not in seal:
        raise ValueError("there is no signature")
    certificate = x509.load_pem_x509_certificate(seal["certificate"].encode())
    authority = x509.load_pem_x509_certificate(ca)
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, TypeError, ValueError):
        raise ValueError("another CA issued the certificate") from None
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        usage = ()
    if PURPOSE not in usage:
        raise ValueError("the certificate is not one for statements")
    if not certificate.not_valid_before_utc <= signed <= certificate.not_valid_after_utc:
        raise ValueError(f"the certificate was not valid at {signed.isoformat()}")
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("the certificate has no elliptic curve key")
    try:
        signature = base64.b64decode(seal["signature"], validate=True)
        key.verify(signature, _bytes(statement), ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise ValueError("the signature is not that of the certificate's key") from None
    return certificate.fingerprint(hashes.SHA256()).hex()


def _bytes(statement: Mapping[str, Any]) -> bytes:
    """The sealed bytes: canonical JSON, without the seal, behind a tag."""
    content = {key: value for key, value in statement.items() if key != SEAL}
    return _TAG + json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
