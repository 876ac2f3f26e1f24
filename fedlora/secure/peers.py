"""Public keys of institutions: the files that pin them, their fingerprints, those of a simulation.

Under secure aggregation an institution accepts the messages of the peers whose keys it pinned, and
of nobody else. It never takes a key from the server's word.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedlora import files
from fedlora.errors import InputError

SUFFIX = ".pub"
_SCALAR_BYTES = 47
"""One less than the order of P-384 has: any such number, plus 1, is a private key."""
_PEM = b"-----BEGIN"
_GROUP = 4
_SSH_KEYGEN = "`ssh-keygen -t ecdsa -b 384 -N ''`"


def read(content: bytes, source: object) -> ec.EllipticCurvePublicKey:
    """A public key on P-384, in PEM or in OpenSSH's form.

    Args:
        content: The file's content.
        source: The file, for the error.

    Raises:
        InputError: If the content is no such key.
    """
    load = load_pem_public_key if content.startswith(_PEM) else load_ssh_public_key
    try:
        key = load(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"{source} holds no public key in PEM or OpenSSH's form ({error}); ask the institution "
            "for its own again"
        ) from None
    remedy = f"the institution makes one on P-384 with {_SSH_KEYGEN}"
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError(f"{source} is not an elliptic curve key; {remedy}")
    if not isinstance(key.curve, ec.SECP384R1):  # Flower takes any curve
        raise InputError(f"{source} is a key on the curve {key.curve.name}; {remedy}")
    return key


def read_directory(directory: Path) -> dict[str, ec.EllipticCurvePublicKey]:
    """Institution -> its public key, of all files ``NAME.pub`` in a directory.

    Raises:
        InputError: If the directory or a file cannot be read, others may write to it, or a file
            holds something else.
    """
    found: dict[str, ec.EllipticCurvePublicKey] = {}
    try:
        for file in sorted(file for file in directory.iterdir() if file.suffix == SUFFIX):
            if exposed := files.exposed(file):
                raise InputError(exposed)
            found[file.stem] = read(file.read_bytes(), file)
        return found
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read: {error.strerror}; peers must be a directory with "
            "NAME.pub, the public key, of each other institution"
        ) from None


def read_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """An institution's own private key on P-384, in OpenSSH's form.

    Raises:
        InputError: If the file cannot be read or holds something else.
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise InputError(f"key is {path}, which cannot be read: {error.strerror}") from None
    except TypeError:
        raise InputError(
            f"key is {path}, which has a passphrase, and a node has nobody to type it; remove it "
            f"with `ssh-keygen -p -N '' -f {path}`"
        ) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"key is {path}, which holds no private key in OpenSSH's form ({error}); make "
            f"one with {_SSH_KEYGEN}"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise InputError(
            f"key is {path}, which holds no key on the curve P-384; make one with {_SSH_KEYGEN}"
        )
    return key


def pinned(
    directory: Path, name: str, key: ec.EllipticCurvePrivateKey
) -> dict[str, ec.EllipticCurvePublicKey]:
    """Institution -> the key that counts for it: those of `read_directory`, and the own one.

    Args:
        directory: The peers' public keys; a file for ``name`` is not read.
        name: The institution whose keys these are.
        key: Its own key.

    Raises:
        InputError: As `read_directory`.
    """
    return {**read_directory(directory), name: key.public_key()}


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key (DER), as hexadecimal digits in groups of four."""
    encoded = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    digits = hashlib.sha256(encoded).hexdigest()
    return " ".join(digits[at : at + _GROUP] for at in range(0, len(digits), _GROUP))


@functools.lru_cache(maxsize=4096)
def simulated(seed: int, name: str) -> ec.EllipticCurvePrivateKey:
    """The key of an institution of a simulation, which follows from the seed and the name.

    Everybody who knows the seed has this key. It protects nothing: in a simulation one experimenter
    plays all institutions.
    """
    digest = hashlib.sha384(f"fedlora simulated key {seed} {name}".encode()).digest()
    return ec.derive_private_key(1 + int.from_bytes(digest[:_SCALAR_BYTES]), ec.SECP384R1())


def simulated_public(seed: int, names: Sequence[str]) -> dict[str, ec.EllipticCurvePublicKey]:
    """Institution -> its public key, in a simulation."""
    return {name: simulated(seed, name).public_key() for name in names}
