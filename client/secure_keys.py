"""An institution's keys and shares in the setup of secure aggregation.

Each secret of a round, a mask key and a self-mask seed, is shared among all institutions of the
run. Shares travel through the server, sealed for the institution that holds them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from client.secure_store import Pair
from fedlora.errors import Refusal
from fedlora.secure import secure_aggregation, shamir
from fedlora.secure.secure_aggregation import KEY_BYTES, KeysMessage, SharesOrder, Terms

_NONCE = bytes(12)  # each key seals one message
_PAIR_BYTES = 2 * shamir.SHARE_BYTES

Shares = dict[int, Pair]
"""Round -> one institution's shares of a dealer's mask key and seed."""


def generate(
    terms: Terms, name: str, key: ec.EllipticCurvePrivateKey
) -> tuple[bytes, KeysMessage, list[Pair]]:
    """New keys from the operating system's randomness.

    Returns:
        The private channel key, the signed public message, and the private mask key and the seed
        of each round.
    """
    channel = X25519PrivateKey.generate()
    private = [X25519PrivateKey.generate() for _ in range(terms.rounds)]
    secrets = [(one.private_bytes_raw(), os.urandom(KEY_BYTES)) for one in private]
    message = KeysMessage(
        terms=terms.digest,
        name=name,
        channel=channel.public_key().public_bytes_raw(),
        masks=b"".join(one.public_key().public_bytes_raw() for one in private),
        commitments=b"".join(
            secure_aggregation.commitment(terms, name, number, seed)
            for number, (_, seed) in enumerate(secrets, 1)
        ),
        signature=b"",
    )
    signature = secure_aggregation.sign(key, message.statement)
    return channel.private_bytes_raw(), replace(message, signature=signature), secrets


def checked(
    terms: Terms, peers: Mapping[str, ec.EllipticCurvePublicKey], order: SharesOrder
) -> list[KeysMessage]:
    """All institutions' key messages, checked against the pinned keys and each other.

    Raises:
        Refusal: ``secure-keys-*``, a code of its own for each fault.
    """
    if len(order.keys) != len(terms.names) or not all(order.keys):
        raise Refusal(
            "secure-keys-missing",
            f"the setup of run {order.run} has not the keys of its {len(terms.names)} names",
        )
    keys = [KeysMessage.from_bytes(encoded) for encoded in order.keys]
    for name, message in zip(terms.names, keys, strict=True):
        secure_aggregation.check_keys(terms, name, message, peers[name])
    secure_aggregation.check_all_keys(terms, keys)
    return keys


def deal(terms: Terms, secrets: Mapping[int, Pair]) -> dict[str, Shares]:
    """Holder -> its shares of the mask key and the seed of each round."""
    points = [*terms.points.values()]
    dealt: dict[str, Shares] = {name: {} for name in terms.names}
    for number, pair in secrets.items():
        mask, seed = (shamir.split(secret, terms.threshold, points) for secret in pair)
        for shares, mask_share, seed_share in zip(dealt.values(), mask, seed, strict=True):
            shares[number] = (mask_share, seed_share)
    return dealt


def seal(
    terms: Terms,
    name: str,
    channel: bytes,
    keys: Sequence[KeysMessage],
    dealt: Mapping[str, Shares],
) -> tuple[bytes, ...]:
    """Each holder's shares, encrypted for it alone, in the order of names; empty for ``name``.

    Args:
        terms: The run's terms.
        name: The dealer.
        channel: Its private channel key.
        keys: All key messages.
        dealt: The shares of `deal`.
    """
    own, bound = X25519PrivateKey.from_private_bytes(channel), secure_aggregation.transcript(keys)
    return tuple(
        b""
        if peer.name == name
        else ChaCha20Poly1305(_key(own, peer, terms, bound, (name, peer.name))).encrypt(
            _NONCE, b"".join(map(b"".join, dealt[peer.name].values())), None
        )
        for peer in keys
    )


def opened(
    terms: Terms,
    name: str,
    channel: bytes,
    keys: Sequence[KeysMessage],
    sealed: Sequence[bytes],
) -> dict[str, Shares]:
    """The shares that others sealed for ``name``, by dealer, without those that do not open."""
    found: dict[str, Shares] = {}
    own, bound = X25519PrivateKey.from_private_bytes(channel), secure_aggregation.transcript(keys)
    for peer, message in zip(keys, sealed, strict=True):
        if peer.name != name:
            key = _key(own, peer, terms, bound, (peer.name, name))
            plain = _decrypted(key, message)
            if len(plain) == terms.rounds * _PAIR_BYTES:
                found[peer.name] = _parsed(plain)
    return found


def _key(
    own: X25519PrivateKey, peer: KeysMessage, terms: Terms, bound: bytes, pair: tuple[str, str]
) -> bytes:
    """The key of the one message from the first of a pair to the second."""
    secret = secure_aggregation.agree(own, peer.channel, peer.name)
    return secure_aggregation.derive(secret, "share", terms.run, bound, *pair)


def _decrypted(key: bytes, message: bytes) -> bytes:
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, message, None)
    except InvalidTag:
        return b""


def _parsed(plain: bytes) -> Shares:
    middle = shamir.SHARE_BYTES
    parts = (plain[at : at + _PAIR_BYTES] for at in range(0, len(plain), _PAIR_BYTES))
    return {number: (part[:middle], part[middle:]) for number, part in enumerate(parts, 1)}
