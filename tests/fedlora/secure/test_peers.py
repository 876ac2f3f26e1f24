"""The files of pinned keys, what they may hold, and the fingerprints that people compare."""

import hashlib
import re
import shutil
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
)

from deployment import keys
from fedlora.errors import InputError
from fedlora.secure import peers


def _ssh(key):
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def _pem(key):
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_a_key_is_read_in_both_forms_and_under_its_file_s_name(tmp_path):
    ours, theirs = (ec.generate_private_key(ec.SECP384R1()).public_key() for _ in range(2))
    (tmp_path / "bank-a.pub").write_bytes(_ssh(ours))
    (tmp_path / "bank.b.pub").write_bytes(_pem(theirs))
    (tmp_path / "README").write_text("not a key")
    assert peers.read_directory(tmp_path) == {"bank-a": ours, "bank.b": theirs}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"ssh-rsa nonsense", "no public key in PEM or OpenSSH's form"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no public key in PEM"),
        (_pem(ec.generate_private_key(ec.SECP256R1()).public_key()), "curve secp256r1; .* P-384"),
        (_ssh(ed25519.Ed25519PrivateKey.generate().public_key()), "not an elliptic .* P-384"),
    ],
    ids=["nonsense", "damaged", "P-256", "Ed25519"],
)
def test_another_key_is_refused_with_its_file(tmp_path, content, said):
    (tmp_path / "a.pub").write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        peers.read_directory(tmp_path)
    assert "a.pub" in str(caught.value)


def test_pins_that_others_may_replace_or_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(InputError, match="peers must be a directory"):
        peers.read_directory(tmp_path / "peers")
    folder = tmp_path / "open"
    folder.mkdir()
    (folder / "a.pub").write_bytes(_ssh(peers.simulated(1, "a").public_key()))
    folder.chmod(0o777)
    with pytest.raises(InputError, match="may be written by others"):
        peers.read_directory(folder)


def test_the_own_key_counts_whatever_its_file_among_the_peers_says(tmp_path):
    public, private = keys.make_node("a")
    (tmp_path / "node.key").write_bytes(private)
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "a.pub").write_bytes(_ssh(peers.simulated(1, "a").public_key()))
    (folder / "b.pub").write_bytes(_ssh(peers.simulated(1, "b").public_key()))
    own = peers.read_private(tmp_path / "node.key")
    pinned = peers.pinned(folder, "a", own)
    assert pinned == {"a": peers.read(public, "a"), "b": peers.simulated(1, "b").public_key()}


@pytest.mark.parametrize("content", [b"", b"-----BEGIN OPENSSH PRIVATE KEY-----\n"])
def test_a_private_key_that_cannot_be_used_is_refused(tmp_path, content):
    (tmp_path / "node.key").write_bytes(content)
    with pytest.raises(InputError, match="holds no private key"):
        peers.read_private(tmp_path / "node.key")
    with pytest.raises(InputError, match="cannot be read"):
        peers.read_private(tmp_path / "none.key")


def test_a_fingerprint_is_the_digest_that_openssl_prints_in_groups_of_four(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    key = peers.simulated(3, "bank").public_key()
    said = peers.fingerprint(key)
    assert re.fullmatch("([0-9a-f]{4} ){15}[0-9a-f]{4}", said)
    (tmp_path / "key.pem").write_bytes(_pem(key))
    command = ["openssl", "pkey", "-pubin", "-outform", "DER", "-in", str(tmp_path / "key.pem")]
    der = subprocess.run(command, check=True, capture_output=True).stdout
    assert said.replace(" ", "") == hashlib.sha256(der).hexdigest()
