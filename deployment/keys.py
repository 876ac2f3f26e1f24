"""Certificates and keys of a federation.

There are one CA, two servers, a key for privacy statements, and a key pair for each institution.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.runs.seal import PURPOSE, read_pair

CA_DAYS = 3650
SERVER_DAYS = 365


@dataclass(frozen=True, kw_only=True)
class Authority:
    """The federation's own certificate authority."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The certificate in PEM; public."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def private_pem(self) -> bytes:
        """The private key in PEM; for the operator alone."""
        return _private(self.key, serialization.PrivateFormat.PKCS8)


def stated_size(file: Path) -> int:
    """The server's bound of an institution's number of records.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds no whole number from 1.
    """
    text = file.read_text("utf-8", errors="replace").strip()
    if not re.fullmatch("[1-9][0-9]{0,11}", text):
        raise ValueError(f"{file} holds {text[:40]!r}; it must be a whole number from 1")
    return int(text)


def make_authority() -> Authority:
    """A new certificate authority, valid for ten years."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedlora CA")
    made = (
        _certificate(name, name, key.public_key(), key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return Authority(certificate=made, key=key)


def read_authority(certificate: bytes, key: bytes) -> Authority:
    """Read an authority from two PEM files.

    Raises:
        ValueError: As `fedlora.runs.seal.read_pair`.
    """
    public, private = read_pair(certificate, key)
    return Authority(certificate=public, key=private)


def make_server(
    authority: Authority, hosts: Sequence[str], days: int = SERVER_DAYS
) -> tuple[bytes, bytes]:
    """Certificate and private key of a server.

    Args:
        authority: The signer.
        hosts: The server's names and addresses; the first is the common name.
        days: The certificate's validity in days, from an hour ago, since clocks differ.
    """
    names = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    return _issued(authority, hosts[0], days, (names, False), (usage, False))


def make_signer(authority: Authority) -> tuple[bytes, bytes]:
    """Certificate and private key with which the server signs privacy statements.

    They are valid as long as a server's. A statement stays valid: it was signed in this time.
    """
    usage = x509.ExtendedKeyUsage([PURPOSE])
    return _issued(authority, "fedlora privacy statements", SERVER_DAYS, (usage, True))


def _issued(
    authority: Authority, name: str, days: int, *extensions: tuple[x509.ExtensionType, bool]
) -> tuple[bytes, bytes]:
    """A certificate, with these extensions and whether each is critical, and its private key."""
    key = ec.generate_private_key(ec.SECP384R1())
    issuer, signer = authority.certificate.subject, authority.key
    made = _certificate(_name(name), issuer, key.public_key(), signer.public_key(), days)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    for extension, critical in extensions:
        made = made.add_extension(extension, critical)
    signed = made.add_extension(_usage(signs_certificates=False), critical=True).sign(
        signer, hashes.SHA384()
    )
    return (
        signed.public_bytes(serialization.Encoding.PEM),
        _private(key, serialization.PrivateFormat.PKCS8),
    )


def hosts(certificate: bytes) -> tuple[str, ...]:
    """The server names and addresses in a certificate.

    Raises:
        ValueError: If the certificate is damaged.
        cryptography.x509.ExtensionNotFound: If it has no names.
    """
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return tuple(str(name.value) for name in names.value)


def make_node(name: str) -> tuple[bytes, bytes]:
    """Public and private key of an institution, in OpenSSH's formats, which Flower reads."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return public + f" {name}\n".encode(), _private(key, serialization.PrivateFormat.OpenSSH)


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer_public: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public), critical=False
        )
    )


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fedlora"),
            x509.NameAttribute(NameOID.COMMON_NAME, common[:64]),
        ]
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
