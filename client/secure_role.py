"""An institution's part in a run with secure aggregation: protocol, configuration and ledger.

`client.secure_party` is the protocol by itself. Here its terms are those of the configuration that
the institution follows, its digest is that of the order that was received, and its point of no
return is in the ledger.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from client import secure_store
from client.ledger import Ledger
from client.secure_party import SecureParty
from fedlora.arrays import Int64
from fedlora.config.config import RunConfig
from fedlora.errors import Refusal
from fedlora.secure import secure_order
from fedlora.secure.secure_aggregation import (
    KeysMessage,
    MaskedMessage,
    MaskedOrder,
    Terms,
)
from fedlora.wire.messages import TrainOrder


def erase(store: Path, ledger: Path, run: str) -> bool:
    """Erase the secrets of a run that has ended: its masks, shares and noise.

    The run cannot go on at this institution, and cannot be set up again. The store says that a run
    has ended only after the ledger's keys are wiped, so that an interrupted call can be repeated.

    Args:
        store: The file of the institution's keys and shares.
        ledger: The file of its privacy ledger.
        run: The run's identity.

    Returns:
        Whether the ledger has a charge of the run. If another ledger was charged, that one keeps
        the key of the last round's noise.
    """
    with Ledger.open(ledger) as opened:
        charged = run in opened.runs()
        opened.end_run(run)
    with secure_store.opened(store) as db:
        secure_store.end(db, run)
    return charged


@dataclass(frozen=True, kw_only=True)
class SecureRole:
    """An institution in secure aggregation: its part that needs the configuration or the ledger.

    Args:
        config: The run, as this institution follows it.
        name: The institution.
        store: The file of its keys and shares.
        ledger: The file of its privacy ledger.
        key: Its P-384 key.
        peers: The pinned key of each institution, this one included.
    """

    config: RunConfig
    name: str
    store: Path
    ledger: Path
    key: ec.EllipticCurvePrivateKey
    peers: Mapping[str, ec.EllipticCurvePublicKey]

    def party(self) -> SecureParty:
        """The protocol by itself, which answers the messages that need no configuration."""
        return SecureParty(
            store=self.store,
            name=self.name,
            key=self.key,
            peers=self.peers,
            before_unmask=self._before_unmask,
        )

    def keys(self, terms: Terms, parameters: int) -> KeysMessage:
        """Make the keys of a run whose terms are those of the configuration.

        Args:
            terms: The server's terms.
            parameters: The length of this run's vectors.

        Raises:
            Refusal: ``secure-terms-mismatch``, or those of `SecureParty.keys`.
        """
        self._check_terms(terms, parameters)
        with contextlib.suppress(OSError):  # the store then says what is wrong with its place
            self.store.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.party().keys(terms)

    def begin(self, order: TrainOrder) -> tuple[int, Int64 | None]:
        """Begin a round, before its charge.

        Returns:
            The number of institutions of the run, and the round's vector where it was masked
            before.

        Raises:
            Refusal: ``secure-order-missing`` for an order without a masked one,
                ``secure-order-mismatch`` if that is of another order,
                ``secure-terms-mismatch`` if the configuration is not that of the setup, or those of
                `SecureParty.begin`.
        """
        masked = self._masked(order)
        found = (masked.run, masked.round, masked.digest, order.participations)
        rounds = self.config.federation.rounds  # all are asked in each: all plan the same noise
        if found != (order.run, order.round, secure_order.digest(order, self.config), rounds):
            raise Refusal(
                "secure-order-mismatch",
                f"round {order.round} of run {order.run} is bound to another order, or plans noise "
                f"for {order.participations} of {rounds} rounds",
            )
        party = self.party()
        terms = party.terms(order.run)
        # the configuration comes with each message, and may have changed since the setup
        self._check_terms(terms, secure_order.parameters(order.adapter, self.config))
        sent = party.begin(masked)
        return len(terms.names), None if sent is None else _of_order(sent, order)

    def mask(self, order: TrainOrder, words: Int64) -> Int64:
        """Mask the vector of a round that began.

        Args:
            order: The round's order.
            words: ``(d,)``, with noise.

        Returns:
            ``(d,)``; without the peers' part in the protocol it is uniform noise.

        Raises:
            Refusal: As `SecureParty.mask`.
        """
        party = self.party()
        # a round may train fewer parameters than another; nothing is known of the words beyond
        whole = np.zeros(party.terms(order.run).parameters, np.int64)
        whole[: len(words)] = words
        return _of_order(party.mask(self._masked(order), whole), order)

    def _check_terms(self, terms: Terms, parameters: int) -> None:
        """Refuse terms that are not those of the configuration and the length of its vectors."""
        privacy = self.config.privacy
        wanted = {
            "honest": privacy.honest,
            "colluding": privacy.colluding,
            "rounds": self.config.federation.rounds,
            "parameters": parameters,
            "mechanism": secure_order.mechanism(self.config),
        }
        for name, value in wanted.items():
            if getattr(terms, name) != value:
                raise Refusal(
                    "secure-terms-mismatch",
                    f"the terms of run {terms.run} have {name} {getattr(terms, name)!r}, and the "
                    f"run's configuration has {value!r}",
                )

    def _masked(self, order: TrainOrder) -> MaskedOrder:
        if order.masked is None:
            raise Refusal(
                "secure-order-missing",
                f"round {order.round} of run {order.run} asks for a vector without a mask",
            )
        return order.masked

    def _before_unmask(
        self, run: str, number: int, digest: bytes, survivors: Sequence[str]
    ) -> None:
        with Ledger.open(self.ledger) as ledger:
            ledger.close_round(run, number, digest, survivors)


def _of_order(message: MaskedMessage, order: TrainOrder) -> Int64:
    """The words of what an order trains; the message has those of the longest round."""
    trained = sum(tensor.numel() for tensor in order.adapter.only(order.parts).values())
    return np.frombuffer(message.words, "<i8")[:trained].astype(np.int64)
