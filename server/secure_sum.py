"""The server's role in secure aggregation: it collects messages, checks them, and unmasks a sum.

`SecureSetup` is a run's setup, `SecureRound` one round of it. Both are made of messages: after a
restart the server gives a setup's stored messages to new objects, or asks for them again, because
an institution answers the same order with the same message. Of a round, its list and the sum of its
vectors are stored before the list is sent (`SecureRound.list_order`), because an institution signs
one list a round and makes no vector of it after it revealed shares.

A message that is refused changes nothing, so the caller notes its code and goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.errors import Refusal
from fedlora.secure import masks, secure_aggregation, shamir
from fedlora.secure.secure_aggregation import (
    WORD_BYTES,
    KeysMessage,
    ListMessage,
    ListOrder,
    MaskedMessage,
    MaskedOrder,
    SharesMessage,
    SharesOrder,
    Terms,
    UnmaskMessage,
    UnmaskOrder,
)


class SecureSetup:
    """The setup of a run: all institutions' keys and sealed shares.

    Args:
        terms: The run's terms, the first message to each institution.
        peers: The P-384 key of each institution.

    Raises:
        Refusal: ``secure-unknown-institution``, ``secure-shared-key`` or ``secure-curve``.
    """

    def __init__(self, terms: Terms, peers: Mapping[str, ec.EllipticCurvePublicKey]) -> None:
        secure_aggregation.check_roster(terms, peers)
        self.terms, self.peers = terms, peers
        self._keys: dict[str, KeysMessage] = {}
        self.shares: dict[str, SharesMessage] = {}

    def add_keys(self, message: KeysMessage) -> None:
        """Add an institution's keys.

        Raises:
            Refusal: ``secure-unknown-institution`` or ``secure-keys-*``.
        """
        name = self._known(message.name)
        secure_aggregation.check_keys(self.terms, name, message, self.peers[name])
        self._keys[name] = message

    def shares_order(self) -> SharesOrder:
        """The message to all institutions once all keys are there.

        Raises:
            Refusal: ``secure-keys-missing`` that names the institutions, ``secure-keys-repeated``
                or ``secure-keys-small-order``.
        """
        keys = self.keys
        secure_aggregation.check_all_keys(self.terms, keys)
        return SharesOrder(run=self.terms.run, keys=tuple(message.to_bytes() for message in keys))

    @property
    def keys(self) -> list[KeysMessage]:
        """All key messages in the order of names; refused as in `shares_order` without one."""
        if missing := [name for name in self.terms.names if name not in self._keys]:
            raise Refusal(
                "secure-keys-missing",
                f"run {self.terms.run} has no keys of {', '.join(missing)}; the setup needs all",
            )
        return [self._keys[name] for name in self.terms.names]

    def add_shares(self, message: SharesMessage) -> None:
        """Add an institution's sealed shares.

        Raises:
            Refusal: ``secure-unknown-institution`` or ``secure-shares-length``.
        """
        name, sealed = self._known(message.name), message.sealed
        if [peer for peer, part in zip(self.terms.names, sealed, strict=False) if not part] != [
            name
        ] or len(sealed) != len(self.terms.names):
            raise Refusal(
                "secure-shares-length", f"{name} sealed no share for some of the institutions"
            )
        self.shares[name] = message

    def sealed_for(self, name: str) -> tuple[bytes, ...]:
        """The shares that all sealed for one institution, in the order of names.

        Raises:
            Refusal: ``secure-setup-unfinished`` that names the institutions without shares.
        """
        if missing := [dealer for dealer in self.terms.names if dealer not in self.shares]:
            raise Refusal(
                "secure-setup-unfinished",
                f"run {self.terms.run} has no shares of {', '.join(missing)}; the setup needs all",
            )
        position = self.terms.names.index(name)
        return tuple(self.shares[dealer].sealed[position] for dealer in self.terms.names)

    def _known(self, name: str) -> str:
        if name not in self.terms.names:
            raise Refusal("secure-unknown-institution", f"{name} is not in run {self.terms.run}")
        return name


class SecureRound:
    """One round: masked vectors are added as they arrive, and kept as their sum only.

    Args:
        setup: The finished setup.
        number: The round, from 1.
        digest: `MaskedOrder.digest`.
    """

    def __init__(self, setup: SecureSetup, number: int, digest: bytes) -> None:
        self._setup, self._terms = setup, setup.terms
        self._keys = setup.keys
        self._bound = secure_aggregation.transcript(self._keys)
        self._number, self._digest = number, digest
        self._list: ListOrder | None = None
        self._sum = np.zeros(self._terms.parameters, dtype="<u8")
        self._masked: set[str] = set()
        self._signatures: dict[str, bytes] = {}
        self._shares: dict[str, tuple[bytes, ...]] = {}

    def masked_order(self, name: str, *, with_shares: bool) -> MaskedOrder:
        """The order for an institution; ``with_shares`` until one of its vectors arrived."""
        return MaskedOrder(
            run=self._terms.run,
            round=self._number,
            digest=self._digest,
            sealed=self._setup.sealed_for(name) if with_shares else (),
        )

    def add_masked(self, message: MaskedMessage) -> None:
        """Add an institution's masked vector to the sum.

        Raises:
            Refusal: ``secure-unknown-institution``, ``secure-other-round``,
                ``secure-words-length``, ``secure-words-repeated``, or ``secure-words-late`` if the
                list was made without it.
        """
        name = message.name
        self._check(message, self._terms.names, "secure-unknown-institution")
        if len(message.words) != self._terms.parameters * WORD_BYTES:
            raise Refusal(
                "secure-words-length",
                f"{name} sent {len(message.words)} bytes for {self._terms.parameters} words",
            )
        if name in self._masked:
            raise Refusal("secure-words-repeated", f"{name} sent a masked vector before")
        if self._list is not None and name not in self._list.survivors:
            raise Refusal("secure-words-late", f"the list of round {self._number} has not {name}")
        self._sum += np.frombuffer(message.words, dtype="<u8")
        self._masked.add(name)

    @property
    def masked_sum(self) -> bytes:
        """The sum of the masked vectors, little-endian: with the list, all to `restore`."""
        return self._sum.tobytes()

    def restore(self, listed: ListOrder, masked_sum: bytes) -> None:
        """Go on after a restart, with the list that was stored and the sum of its vectors.

        An institution that has revealed shares of a round makes no vector of it again.

        Raises:
            Refusal: ``secure-words-length``.
        """
        if len(masked_sum) != self._terms.parameters * WORD_BYTES:
            raise Refusal("secure-words-length", "the stored sum is not one of this run")
        self._list = listed
        self._sum = np.frombuffer(masked_sum, dtype="<u8").copy()
        self._masked = set(listed.survivors)

    def list_order(self) -> ListOrder:
        """The list of this round's survivors. Store it before it is sent.

        Raises:
            Refusal: ``secure-survivors`` if they are too few: the round is given up.
        """
        if self._list is None:
            least = self._terms.least_survivors
            if len(self._masked) < least:
                raise Refusal(
                    "secure-survivors",
                    f"round {self._number} has {len(self._masked)} masked vectors and needs "
                    f"{least}; it is given up, and nothing is unmasked",
                )
            self._list = ListOrder(
                run=self._terms.run, round=self._number, survivors=tuple(sorted(self._masked))
            )
        return self._list

    def add_signature(self, message: ListMessage) -> None:
        """Add an institution's signature over the list.

        Raises:
            Refusal: ``secure-unlisted``, ``secure-other-round`` or ``secure-list-signature``.
        """
        survivors = self.list_order().survivors
        self._check(message, survivors, "secure-unlisted")
        statement = secure_aggregation.list_statement(
            self._terms, self._bound, self._number, self._digest, survivors
        )
        key = self._setup.peers[message.name]
        if not secure_aggregation.is_signed(key, message.signature, statement):
            raise Refusal("secure-list-signature", f"{message.name} signed another list")
        self._signatures[message.name] = message.signature

    def is_signed(self) -> bool:
        """Whether enough survivors signed the list."""
        return len(self._signatures) >= self._terms.threshold

    def unmask_order(self) -> UnmaskOrder:
        """The message that asks the survivors for shares: as many signatures as are needed.

        Raises:
            Refusal: ``secure-list-signatures`` if fewer than the threshold signed: the round is
                given up.
        """
        needed = self._terms.threshold
        if not self.is_signed():
            raise Refusal(
                "secure-list-signatures",
                f"the list of round {self._number} has {len(self._signatures)} signatures, below "
                f"{needed}; the round is given up, and nothing is unmasked",
            )
        first = dict(sorted(self._signatures.items())[:needed])
        survivors = self.list_order().survivors
        return UnmaskOrder(
            run=self._terms.run,
            round=self._number,
            signatures=tuple(first.get(name, b"") for name in survivors),
        )

    def add_shares(self, message: UnmaskMessage) -> None:
        """Add an institution's shares of this round.

        Raises:
            Refusal: ``secure-unlisted``, ``secure-other-round`` or ``secure-shares-length``.
        """
        self._check(message, self.list_order().survivors, "secure-unlisted")
        if len(message.shares) != len(self._terms.names):
            raise Refusal("secure-shares-length", f"{message.name} sent another number of shares")
        self._shares[message.name] = message.shares

    def has_shares(self) -> bool:
        """Whether enough survivors sent shares, if all of these are right."""
        return len(self._shares) >= self._terms.threshold

    def total(self) -> np.ndarray:
        """The sum of the survivors' vectors, ``(d,)`` int64.

        Raises:
            Refusal: ``secure-shares-few`` if fewer than the threshold sent shares, or
                ``secure-shares-wrong`` if the shares of a secret do not give it. The round is void.
        """
        survivors = frozenset(self.list_order().survivors)
        secrets = self._reveal(survivors)
        words = self._sum.copy()
        masks.apply(words, subtract=[secrets[name] for name in survivors])
        for dead in (name for name in self._terms.names if name not in survivors):
            self._remove_pairs(words, dead, secrets[dead], survivors)
        return words.view("<i8")

    def _reveal(self, survivors: Collection[str]) -> dict[str, bytes]:
        """Each survivor's seed of this round, each other institution's private mask key."""
        number, terms = self._number, self._terms

        def is_right(name: str, secret: bytes) -> bool:
            keys = self._keys[terms.points[name] - 1]
            if name in survivors:
                made = secure_aggregation.commitment(terms, name, number, secret)
                return made == keys.commitment(number)
            public = X25519PrivateKey.from_private_bytes(secret).public_key()
            return public.public_bytes_raw() == keys.mask(number)

        return {
            dealer: self._secret(position, dealer, is_right)
            for position, dealer in enumerate(terms.names)
        }

    def _secret(self, position: int, dealer: str, is_right: Callable[[str, bytes], bool]) -> bytes:
        """A dealer's secret, checked against what it published: a wrong one is never used."""
        terms = self._terms
        shares = {
            terms.points[holder]: sent[position]
            for holder, sent in sorted(self._shares.items())
            if len(sent[position]) == shamir.SHARE_BYTES
        }
        if len(shares) < terms.threshold:
            raise Refusal(
                "secure-shares-few",
                f"{len(shares)} institutions sent a share of {dealer}'s secret, below "
                f"{terms.threshold}; the round is void",
            )
        value = shamir.combine(dict(itertools.islice(shares.items(), terms.threshold)))
        if value < 2 ** (8 * shamir.SECRET_BYTES):
            secret = value.to_bytes(shamir.SECRET_BYTES, "big")
            if is_right(dealer, secret):
                return secret
        raise Refusal(
            "secure-shares-wrong",
            f"the shares of {dealer}'s secret do not give it, so {dealer} or one of those who "
            f"answered ({', '.join(sorted(self._shares))}) is at fault; the round is void",
        )

    def _remove_pairs(
        self, words: np.ndarray, dead: str, private: bytes, survivors: Collection[str]
    ) -> None:
        """Remove what the survivors added and subtracted for an institution without a vector."""
        own = X25519PrivateKey.from_private_bytes(private)
        pairs = {
            name: secure_aggregation.pair_key(
                secure_aggregation.agree(own, self._keys[position].mask(self._number), name),
                self._terms,
                self._bound,
                self._number,
                self._digest,
                (dead, name),
            )
            for position, name in enumerate(self._terms.names)
            if name in survivors
        }
        masks.apply(
            words,
            add=[key for name, key in pairs.items() if name > dead],
            subtract=[key for name, key in pairs.items() if name < dead],
        )

    def _check(
        self,
        message: MaskedMessage | ListMessage | UnmaskMessage,
        names: Sequence[str],
        code: str,
    ) -> None:
        if message.name not in names:
            raise Refusal(code, f"{message.name} has no part in round {self._number}")
        if message.round != self._number:
            raise Refusal(
                "secure-other-round",
                f"{message.name} answers round {message.round} in round {self._number}",
            )
