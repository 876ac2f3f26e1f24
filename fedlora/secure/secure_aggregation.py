"""Secure aggregation: the terms of a run, the messages of its protocol, and what is signed.

The protocol is that of Bonawitz et al. (2017), Practical Secure Aggregation for Privacy-Preserving
Machine Learning, with double masking, on the complete graph, with keys made once a run. A run has
two exchanges of setup (`Terms` -> `KeysMessage`, `SharesOrder` -> `SharesMessage`), and each round
three (`MaskedOrder` -> `MaskedMessage`, `ListOrder` -> `ListMessage`, `UnmaskOrder` ->
`UnmaskMessage`). ``client.secure_party`` is the institution's role, ``server.secure_sum`` the
server's; docs/secure-aggregation.md draws both.
"""

from __future__ import annotations

import functools
import hashlib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedlora.errors import Refusal
from fedlora.secure import canonical, noise_shares

KEY_BYTES = 32
"""Bytes of an X25519 key, of a seed, of a SHA-256 digest."""
WORD_BYTES = 8
"""Bytes of a word: an integer modulo 2^64, little-endian."""
MAX_INSTITUTIONS = 10_000
MAX_ROUNDS = 10_000
MAX_TEXT_CHARACTERS = 1000
"""Characters of a text in a message, such as a run, a name, a digest, a version."""
_TAG = "fedlora secure aggregation 1 "
_CURVE_PRIME = 2**255 - 19


class SecureMessage:
    """A message of the protocol: a frozen dataclass of text, numbers, bytes and tuples of them."""

    def to_bytes(self) -> bytes:
        """The canonical encoding under the message's own tag."""
        values = (getattr(self, name) for name in _types(type(self)))
        return canonical.encode(_TAG + type(self).__name__, *values)

    @classmethod
    def from_bytes(cls, data: bytes) -> typing.Self:
        """The message of an encoding.

        Raises:
            Refusal: ``secure-malformed`` if the bytes are another message or none.
        """
        values = canonical.decode(_TAG + cls.__name__, data)
        types = _types(cls)
        if len(values) != len(types) or not all(map(_fits, values, types.values())):
            raise Refusal(
                "secure-malformed",
                f"the values of a {cls.__name__} have other types than {', '.join(types)}, or a "
                f"text has more than {MAX_TEXT_CHARACTERS} characters",
            )
        return cls(**dict(zip(types, values, strict=True)))


@functools.cache
def _types(message: type[SecureMessage]) -> dict[str, typing.Any]:
    return typing.get_type_hints(message)


def _fits(value: canonical.Value, wanted: typing.Any) -> bool:
    if not isinstance(value, tuple):
        short = not isinstance(value, str) or len(value) <= MAX_TEXT_CHARACTERS
        return short and type(value) is wanted
    item = typing.get_args(wanted)[:1]
    return bool(item) and all(_fits(part, item[0]) for part in value)


@dataclass(frozen=True, kw_only=True)
class Terms(SecureMessage):
    """What all institutions of a run agree on, and the first message of its setup.

    Args:
        run: The run's identity.
        names: The institutions, sorted, without repeats. Each is asked in every round.
        colluding: Largest number t of institutions that tell the server all they know.
        honest: Least number h >= 2 of honest institutions whose noise is in every sum.
        rounds: Number of rounds for which keys are made. A round that is given up is one of them.
        parameters: Number d of words in a vector.
        mechanism: Bytes that name the noise and the grid of all vectors. Masks follow from the
            terms, so vectors with other noise than these terms say have no sum with the others.

    Raises:
        Refusal: ``secure-terms`` if a value is outside its bounds.
    """

    run: str
    names: tuple[str, ...]
    colluding: int
    honest: int
    rounds: int
    parameters: int
    mechanism: bytes = b""

    def __post_init__(self) -> None:
        n = len(self.names)
        texts = (self.run, *self.names)
        for wrong, words in (
            (
                not all(0 < len(text) <= MAX_TEXT_CHARACTERS for text in texts),
                f"the run or a name has not 1 to {MAX_TEXT_CHARACTERS} characters",
            ),
            (list(self.names) != sorted(set(self.names)), "names are not sorted, or repeated"),
            (n > MAX_INSTITUTIONS, f"{n} institutions are more than {MAX_INSTITUTIONS}"),
            (
                self.honest < noise_shares.MIN_HONEST,
                f"honest is {self.honest}, below {noise_shares.MIN_HONEST}: a sum of one is no sum",
            ),
            (
                self.colluding < noise_shares.MIN_COLLUDING,
                f"colluding is {self.colluding}, below {noise_shares.MIN_COLLUDING}: an "
                "institution knows its own share of the noise",
            ),
            (
                self.honest + self.colluding > n,
                f"honest + colluding is {self.honest} + {self.colluding}, above the run's {n} "
                "institutions; lower one of them",
            ),
            (not 1 <= self.rounds <= MAX_ROUNDS, f"{self.rounds} rounds are not 1..{MAX_ROUNDS}"),
            (
                not 1 <= self.parameters <= noise_shares.MAX_PARAMETERS,
                f"{self.parameters} parameters are not 1..{noise_shares.MAX_PARAMETERS}; "
                "lower adapter.rank or name fewer adapter.target-modules",
            ),
        ):
            if wrong:
                raise Refusal("secure-terms", words)

    @property
    def threshold(self) -> int:
        """Number T of shares that reveal a secret, and of signatures that make a list valid."""
        return noise_shares.threshold(len(self.names), self.colluding)

    @property
    def least_survivors(self) -> int:
        """Number of survivors below which a round is given up before anything is unmasked."""
        return noise_shares.least_survivors(len(self.names), self.honest, self.colluding)

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of these terms."""
        return hashlib.sha256(self.to_bytes()).digest()

    @functools.cached_property
    def points(self) -> Mapping[str, int]:
        """Name -> point x >= 1 at which its shares are values of the polynomials."""
        return {name: x for x, name in enumerate(self.names, 1)}


@dataclass(frozen=True, kw_only=True)
class KeysMessage(SecureMessage):
    """An institution's public keys for a run, signed.

    Args:
        terms: `Terms.digest`.
        name: The institution.
        channel: X25519 public key under which peers seal shares for this institution.
        masks: X25519 public keys of all rounds, one after the other, 32 bytes each.
        commitments: `commitment` to the self-mask seeds of all rounds, likewise.
        signature: ECDSA P-384 with SHA-384 over all the other fields.
    """

    terms: bytes
    name: str
    channel: bytes
    masks: bytes
    commitments: bytes
    signature: bytes

    def mask(self, number: int) -> bytes:
        """The public mask key of round ``number`` >= 1."""
        return self.masks[(number - 1) * KEY_BYTES : number * KEY_BYTES]

    def commitment(self, number: int) -> bytes:
        """The commitment to the self-mask seed of round ``number`` >= 1."""
        return self.commitments[(number - 1) * KEY_BYTES : number * KEY_BYTES]

    @property
    def statement(self) -> bytes:
        """The bytes that are signed."""
        return canonical.encode(
            f"{_TAG}keys", self.terms, self.name, self.channel, self.masks, self.commitments
        )


@dataclass(frozen=True, kw_only=True)
class SharesOrder(SecureMessage):
    """The key messages of all institutions, encoded, in the order of names."""

    run: str
    keys: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class SharesMessage(SecureMessage):
    """An institution's sealed shares: one message for each name, in order; empty for its own."""

    name: str
    sealed: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class MaskedOrder(SecureMessage):
    """A round begins.

    Args:
        run: The run.
        round: Its round, from 1.
        digest: 32 bytes that bind everything that is asked in this round. They must be the same
            for all institutions, because each signs them and compares the others' signatures.
        sealed: The shares that the others sealed for this institution, in the order of names,
            empty for its own; or no entry, if an earlier order of the run had them.
    """

    run: str
    round: int
    digest: bytes
    sealed: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class MaskedMessage(SecureMessage):
    """An institution's masked vector: d words of 8 bytes, little-endian."""

    name: str
    round: int
    words: bytes


@dataclass(frozen=True, kw_only=True)
class ListOrder(SecureMessage):
    """The survivors of a round: the sorted names whose masked vectors arrived."""

    run: str
    round: int
    survivors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ListMessage(SecureMessage):
    """An institution's signature over a round's survivors (`list_statement`)."""

    name: str
    round: int
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class UnmaskOrder(SecureMessage):
    """Signatures over a round's list, in the order of survivors; empty where one is absent."""

    run: str
    round: int
    signatures: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class UnmaskMessage(SecureMessage):
    """An institution's shares for a round, in the order of names.

    Of a survivor it is the share of its self-mask seed, of any other name that of its mask key;
    empty where this institution could not open the share that the name sealed for it.
    """

    name: str
    round: int
    shares: tuple[bytes, ...]


def commitment(terms: Terms, name: str, number: int, seed: bytes) -> bytes:
    """SHA-256 over a self-mask seed, its institution, run and round. Hiding: seeds are random."""
    statement = canonical.encode(f"{_TAG}seed", terms.run, name, number, seed)
    return hashlib.sha256(statement).digest()


def transcript(keys: Sequence[KeysMessage]) -> bytes:
    """SHA-256 over all key messages of a run, in the order of names."""
    encoded = tuple(message.to_bytes() for message in keys)
    return hashlib.sha256(canonical.encode(f"{_TAG}transcript", encoded)).digest()


def list_statement(
    terms: Terms, bound: bytes, number: int, digest: bytes, survivors: Sequence[str]
) -> bytes:
    """The bytes of a round's list that institutions sign.

    Args:
        terms: The run's terms.
        bound: The run's `transcript`.
        number: The round.
        digest: `MaskedOrder.digest`.
        survivors: Sorted names.
    """
    return canonical.encode(f"{_TAG}list", terms.run, bound, number, digest, tuple(survivors))


def sign(key: ec.EllipticCurvePrivateKey, statement: bytes) -> bytes:
    """ECDSA with SHA-384, DER encoding."""
    return key.sign(statement, ec.ECDSA(hashes.SHA384()))


def is_signed(key: ec.EllipticCurvePublicKey, signature: bytes, statement: bytes) -> bool:
    """Whether ``signature`` is one of ``key`` over ``statement``."""
    try:
        key.verify(signature, statement, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def check_roster(terms: Terms, peers: Mapping[str, ec.EllipticCurvePublicKey]) -> None:
    """Check that all names have a pinned key of their own.

    Raises:
        Refusal: ``secure-unknown-institution``, ``secure-shared-key`` or ``secure-curve``.
    """
    owners: dict[tuple[int, int], str] = {}
    for name in terms.names:
        if name not in peers:
            raise Refusal(
                "secure-unknown-institution",
                f"{name} takes part in run {terms.run} and has no pinned key; add its key to the "
                "pinned keys after comparing fingerprints, or refuse the run",
            )
        if not isinstance(peers[name].curve, ec.SECP384R1):
            raise Refusal("secure-curve", f"the pinned key of {name} is not one of P-384")
        numbers = peers[name].public_numbers()
        other = owners.setdefault((numbers.x, numbers.y), name)
        if other != name:
            raise Refusal("secure-shared-key", f"{other} and {name} have the same pinned key")


def roster_digest(terms: Terms, peers: Mapping[str, ec.EllipticCurvePublicKey]) -> bytes:
    """SHA-256 over the pinned keys of a run's names, in order."""
    points = tuple(
        peers[name].public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        for name in terms.names
    )
    return hashlib.sha256(canonical.encode(f"{_TAG}roster", points)).digest()


def check_keys(
    terms: Terms, name: str, message: KeysMessage, key: ec.EllipticCurvePublicKey
) -> None:
    """Check one key message by itself: whose it is, for which run, its lengths, its signature.

    Raises:
        Refusal: ``secure-keys-swapped``, ``-replayed``, ``-length``, ``-unsigned`` or
            ``-signature``.
    """
    size = terms.rounds * KEY_BYTES
    for wrong, code, words in (
        (message.name != name, "swapped", f"is that of {message.name}"),
        (message.terms != terms.digest, "replayed", "was made for another run or other terms"),
        (
            (len(message.channel), len(message.masks), len(message.commitments))
            != (KEY_BYTES, size, size),
            "length",
            f"has not one key and {terms.rounds} mask keys and commitments",
        ),
        (not message.signature, "unsigned", "has no signature"),
        (
            not is_signed(key, message.signature, message.statement),
            "signature",
            "is not signed by its pinned key",
        ),
    ):
        if wrong:
            raise Refusal(f"secure-keys-{code}", f"the key message of {name} {words}")


def check_all_keys(terms: Terms, keys: Sequence[KeysMessage]) -> None:
    """Check the keys of all messages against each other.

    Raises:
        Refusal: ``secure-keys-repeated`` if two public keys are equal, or
            ``secure-keys-small-order`` if an agreement with one would be the same for everybody.
    """
    probe = X25519PrivateKey.generate()
    seen: set[int] = set()
    for message in keys:
        for public in (message.channel, *map(message.mask, range(1, terms.rounds + 1))):
            # X25519 ignores the top bit and reduces the rest: several encodings are one key
            value = (int.from_bytes(public, "little") & (2**255 - 1)) % _CURVE_PRIME
            if value in seen:
                raise Refusal(
                    "secure-keys-repeated",
                    f"{message.name} sent a key that is in the setup already",
                )
            seen.add(value)
            agree(probe, public, message.name)


def agree(private: X25519PrivateKey, public: bytes, name: str) -> bytes:
    """The shared secret of two X25519 keys.

    Raises:
        Refusal: ``secure-keys-small-order`` if ``public``, of institution ``name``, is a point of
            small order.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Refusal("secure-keys-small-order", f"a key of {name} has a small order") from None


def derive(secret: bytes, purpose: str, *bound: canonical.Value) -> bytes:
    """A key of 32 bytes: HKDF-SHA256 of a shared secret, bound to a purpose and values."""
    info = canonical.encode(_TAG + purpose, *bound)
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def pair_key(
    secret: bytes, terms: Terms, bound: bytes, number: int, digest: bytes, pair: tuple[str, str]
) -> bytes:
    """The key of the mask that two institutions share in a round, for one order.

    Masks for two orders do not cancel, so vectors for two orders have no sum.

    Args:
        secret: The X25519 secret of their mask keys of this round.
        terms: The run's terms.
        bound: The run's `transcript`.
        number: The round.
        digest: `MaskedOrder.digest`.
        pair: Both names; the sorted first adds the mask, the other subtracts it.
    """
    return derive(secret, "mask", terms.run, bound, number, digest, *sorted(pair))
