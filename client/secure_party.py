"""An institution's role in secure aggregation: its keys, its masked vectors, and what it reveals.

Each method answers one message of ``secure.secure_aggregation``. All that a later answer needs is
in the party's store before an answer is returned, so a process that was killed goes on with a new
object on the same store, and an answer that was lost is given again.

Guaranteed, as long as the store is not lost or replaced by an older copy: in one round this
institution masks one vector, signs one list, and reveals for each institution one kind of share.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client import secure_checks, secure_keys, secure_store
from fedlora.errors import Refusal
from fedlora.secure import masks, secure_aggregation
from fedlora.secure.secure_aggregation import (
    KEY_BYTES,
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


class SecureParty:
    """One institution in the protocol.

    Args:
        store: The file of this role's state (``client.secure_store``); created by the first run.
        name: This institution.
        key: Its P-384 key, which signs.
        peers: The pinned P-384 key of each institution, this one included, by name. A run may have
            fewer institutions than there are pinned keys, never others.
        before_unmask: Called with run, round, `MaskedOrder.digest` and the survivors before shares
            of a round are returned: the point of no return. It must store durably that the round
            is spent, may be called again for the same round, and stops the answer by raising.
    """

    def __init__(
        self,
        *,
        store: Path,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        peers: Mapping[str, ec.EllipticCurvePublicKey],
        before_unmask: Callable[[str, int, bytes, Sequence[str]], None],
    ) -> None:
        self._path, self._name, self._key = store, name, key
        self._peers, self._before_unmask = peers, before_unmask

    def keys(self, terms: Terms) -> KeysMessage:
        """Make the keys of a run (first exchange of the setup); the same terms, the same answer.

        The caller has checked that its own settings allow these terms.

        Raises:
            Refusal: ``secure-name-missing``, ``secure-own-key``, ``secure-unknown-institution``,
                ``secure-shared-key``, ``secure-curve``, or ``secure-terms-changed``.
        """
        if self._name not in terms.names:
            raise Refusal("secure-name-missing", f"run {terms.run} does not name {self._name}")
        secure_aggregation.check_roster(terms, self._peers)
        if self._key.public_key() != self._peers[self._name]:
            raise Refusal("secure-own-key", f"the pinned key of {self._name} is not its own")
        with secure_store.opened(self._path) as db:
            if secure_store.run(db, terms.run) is not None:
                stored, agreed = self._run(db, terms.run)
                if agreed != terms:
                    raise Refusal(
                        "secure-terms-changed",
                        f"run {terms.run} was set up with other terms; give it another name",
                    )
                return KeysMessage.from_bytes(stored.keys)
            secure_store.drop_unused(db)
            channel, message, secrets = secure_keys.generate(terms, self._name, self._key)
            secure_store.add_run(
                db,
                secure_store.StoredRun(
                    run=terms.run,
                    terms=terms.to_bytes(),
                    roster=secure_aggregation.roster_digest(terms, self._peers),
                    keys=message.to_bytes(),
                    channel=channel,
                ),
                secrets,
            )
        return message

    def shares(self, order: SharesOrder) -> SharesMessage:
        """Check all keys and seal the shares of this institution's secrets (second exchange).

        Raises:
            Refusal: ``secure-run-unknown``, ``secure-roster-changed``, ``secure-keys-*``, or
                ``secure-other-keys``.
        """
        with secure_store.opened(self._path) as db:
            stored, terms = self._run(db, order.run)
            if stored.sealed is not None:
                if stored.peers != order.to_bytes():
                    raise Refusal(
                        "secure-other-keys",
                        f"the setup of run {order.run} has two different sets of keys",
                    )
                return SharesMessage.from_bytes(stored.sealed)
            keys = secure_keys.checked(terms, self._peers, order)
            if stored.keys != order.keys[terms.names.index(self._name)]:
                raise Refusal("secure-keys-own", f"the keys of {self._name} are not those it sent")
            dealt = secure_keys.deal(terms, secure_store.secrets(db, order.run))
            message = SharesMessage(
                name=self._name,
                sealed=secure_keys.seal(terms, self._name, stored.channel or b"", keys, dealt),
            )
            secure_store.add_shares(db, order.run, self._name, dealt[self._name])
            secure_store.add_sealed(
                db, order.run, peers=order.to_bytes(), sealed=message.to_bytes()
            )
        return message

    def begin(self, order: MaskedOrder) -> MaskedMessage | None:
        """Begin a round, before any training: check the order, store it, erase earlier rounds.

        Returns:
            The masked vector where the round has one. Nothing is trained for it again: a second
            training may differ in its last bits, and whether it does may depend on the records.

        Raises:
            Refusal: ``secure-setup-unfinished``, ``secure-shares-missing``, ``secure-digest``,
                ``secure-round-range``, ``secure-round-past``, ``secure-round-other-order``.
        """
        with secure_store.opened(self._path) as db:
            self._begin(db, order)
            words = self._round(db, order.run, order.round).masked
        if words is None:
            return None
        return MaskedMessage(name=self._name, round=order.round, words=words)

    def _begin(
        self, db: sqlite3.Connection, order: MaskedOrder
    ) -> tuple[Terms, list[KeysMessage], secure_store.Pair]:
        """Begin a round, or go on with it; returns the round's own secrets, too."""
        stored, terms = self._run(db, order.run)
        keys = _peer_keys(stored)
        if not 1 <= order.round <= terms.rounds:
            raise Refusal(
                "secure-round-range", f"round {order.round} is not one of 1 to {terms.rounds}"
            )
        if len(order.digest) != KEY_BYTES:
            raise Refusal("secure-digest", f"a digest has {KEY_BYTES} bytes")
        latest = secure_store.latest_round(db, order.run)
        if latest is not None and order.round < latest.round:
            raise _past(order.round, latest.round)
        self._open_shares(db, stored, terms, keys, order)
        if latest is None or latest.round < order.round:
            secure_store.begin_round(db, order.run, order.round, order.digest)
        elif latest.digest != order.digest:
            raise Refusal(
                "secure-round-other-order",
                f"round {order.round} of run {order.run} began with another order",
            )
        return terms, keys, secure_store.secrets(db, order.run)[order.round]

    def _open_shares(
        self,
        db: sqlite3.Connection,
        stored: secure_store.StoredRun,
        terms: Terms,
        keys: Sequence[KeysMessage],
        order: MaskedOrder,
    ) -> None:
        """Open the shares that were sealed for this institution, at their first delivery.

        A share that does not open then never will, and is absent from later answers; the server
        names its dealer. The channel key opens nothing more and is erased, so that no lie of the
        server leaves it beside later rounds.
        """
        if stored.delivered:
            return
        if not order.sealed:
            raise Refusal(
                "secure-shares-missing",
                f"run {order.run} sent {self._name} no shares of the other institutions",
            )
        if len(order.sealed) != len(terms.names):
            raise Refusal(
                "secure-shares-length", "the number of sealed shares is not that of names"
            )
        opened = secure_keys.opened(terms, self._name, stored.channel or b"", keys, order.sealed)
        for dealer, shares in opened.items():
            later = {number: pair for number, pair in shares.items() if number >= order.round}
            secure_store.add_shares(db, order.run, dealer, later)
        secure_store.delivered(db, order.run)

    def mask(self, order: MaskedOrder, words: np.ndarray) -> MaskedMessage:
        """Mask this round's vector. Calls `begin` first.

        Args:
            order: The round's order.
            words: ``(d,)`` int64, noise included.

        Returns:
            The masked vector, or the one that another process has stored meanwhile: two that were
            trained under one key may differ in their last bits, and only one may leave.

        Raises:
            Refusal: As `begin`, ``secure-words-length``, ``secure-words-range`` if a word is not
                below 2^62 / n in size.
        """
        with secure_store.opened(self._path) as db:
            terms, keys, (private, seed) = self._begin(db, order)
        secure_checks.check_words(terms, words)
        own = X25519PrivateKey.from_private_bytes(private)
        bound = secure_aggregation.transcript(keys)
        pairs = {
            peer.name: secure_aggregation.pair_key(
                secure_aggregation.agree(own, peer.mask(order.round), peer.name),
                terms,
                bound,
                order.round,
                order.digest,
                (self._name, peer.name),
            )
            for peer in keys
            if peer.name != self._name
        }
        masked = words.astype("<i8").view("<u8")
        masks.apply(
            masked,
            add=[seed, *(key for name, key in pairs.items() if name > self._name)],
            subtract=[key for name, key in pairs.items() if name < self._name],
        )
        with secure_store.opened(self._path) as db:
            stored = self._round(db, order.run, order.round).masked
            if stored is None:
                stored = masked.tobytes()
                secure_store.add_masked(db, order.run, order.round, stored)
        return MaskedMessage(name=self._name, round=order.round, words=stored)

    def sign_list(self, order: ListOrder) -> ListMessage:
        """Sign the survivors of a round: one list a round.

        Raises:
            Refusal: ``secure-list-unmasked``, ``-names``, ``-excluded``, ``-short`` or ``-second``.
        """
        with secure_store.opened(self._path) as db:
            stored, terms = self._run(db, order.run)
            current = self._round(db, order.run, order.round)
            if current.masked is None:
                raise _unmasked(order.round)
            secure_checks.check_list(terms, self._name, order.survivors)
            if current.list is not None:
                if current.list != order.to_bytes():
                    raise Refusal(
                        "secure-list-second",
                        f"another list of round {order.round} of run {order.run} was signed",
                    )
                signature = current.signature or b""
            else:
                signature = secure_aggregation.sign(
                    self._key, _list_statement(stored, terms, current, order.survivors)
                )
                secure_store.add_list(
                    db, order.run, order.round, listed=order.to_bytes(), signature=signature
                )
        return ListMessage(name=self._name, round=order.round, signature=signature)

    def unmask(self, order: UnmaskOrder) -> UnmaskMessage:
        """Reveal shares for the list that this institution signed, if enough others signed it.

        ``before_unmask`` has returned before this does.

        Raises:
            Refusal: ``secure-unmask-unsigned`` or ``secure-unmask-signatures``.
        """
        with secure_store.opened(self._path) as db:
            stored, terms = self._run(db, order.run)
            current = self._round(db, order.run, order.round)
            if current.list is None:
                raise Refusal(
                    "secure-unmask-unsigned",
                    f"{self._name} signed no list of round {order.round} of run {order.run}",
                )
            survivors = ListOrder.from_bytes(current.list).survivors
            statement = _list_statement(stored, terms, current, survivors)
            secure_checks.check_signatures(terms, self._peers, survivors, order, statement)
            held = secure_store.shares(db, order.run, order.round)
        self._before_unmask(order.run, order.round, current.digest, survivors)
        shares = tuple(
            held[name][name in survivors] if name in held else b"" for name in terms.names
        )
        return UnmaskMessage(name=self._name, round=order.round, shares=shares)

    def terms(self, run: str) -> Terms:
        """The terms of a run that has keys here. Raises `Refusal` as `begin` does."""
        with secure_store.opened(self._path) as db:
            return self._run(db, run)[1]

    def _run(self, db: sqlite3.Connection, run: str) -> tuple[secure_store.StoredRun, Terms]:
        stored = secure_store.run(db, run)
        if stored is None:
            raise Refusal("secure-run-unknown", f"{self._name} has no keys for run {run}")
        if stored.ended:
            raise Refusal("secure-run-ended", f"the secrets of run {run} are erased")
        terms = Terms.from_bytes(stored.terms)
        if (
            not self._peers.keys() >= {*terms.names}
            or secure_aggregation.roster_digest(terms, self._peers) != stored.roster
        ):
            raise Refusal(
                "secure-roster-changed",
                f"pinned keys changed since the setup of run {run}; begin a new run",
            )
        return stored, terms

    def _round(self, db: sqlite3.Connection, run: str, number: int) -> secure_store.StoredRound:
        """The round that is under way."""
        latest = secure_store.latest_round(db, run)
        if latest is None or latest.round < number:
            raise _unmasked(number)
        if latest.round > number:
            raise _past(number, latest.round)
        return latest


def _peer_keys(stored: secure_store.StoredRun) -> list[KeysMessage]:
    if stored.peers is None:
        raise Refusal("secure-setup-unfinished", f"run {stored.run} has not shared its secrets")
    return [KeysMessage.from_bytes(keys) for keys in SharesOrder.from_bytes(stored.peers).keys]


def _list_statement(
    stored: secure_store.StoredRun,
    terms: Terms,
    current: secure_store.StoredRound,
    survivors: Sequence[str],
) -> bytes:
    bound = secure_aggregation.transcript(_peer_keys(stored))
    return secure_aggregation.list_statement(terms, bound, current.round, current.digest, survivors)


def _past(number: int, latest: int) -> Refusal:
    return Refusal("secure-round-past", f"round {number} is over: round {latest} began")


def _unmasked(number: int) -> Refusal:
    return Refusal("secure-list-unmasked", f"round {number} has no masked vector of this one")
