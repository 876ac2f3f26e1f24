"""The server's role in secure aggregation: it collects messages, checks them, and unmasks a sum.

`SecureSetup` is a run's setup, `SecureRound` one round of it. Both are made of messages: after a
restart the server gives stored messages to new objects, or asks for them again, because an
institution answers the same order with the same message. Only the list of a round must be stored
before it is sent (`SecureRound.list_order`), because an institution signs one list a round.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.secure_aggregation import (
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
    """

    def __init__(self, terms: Terms, peers: Mapping[str, ec.EllipticCurvePublicKey]) -> None: ...

    def add_keys(self, message: KeysMessage) -> None:
        """Add an institution's keys.

        Raises:
            Refusal: ``secure-unknown-institution`` or ``secure-keys-*``.
        """

    def shares_order(self) -> SharesOrder:
        """The message to all institutions once all keys are there.

        Raises:
            Refusal: ``secure-keys-missing`` that names the institutions, ``secure-keys-repeated``
                or ``secure-keys-small-order``.
        """
        ...

    def add_shares(self, message: SharesMessage) -> None:
        """Add an institution's sealed shares.

        Raises:
            Refusal: ``secure-unknown-institution`` or ``secure-shares-length``.
        """

    def sealed_for(self, name: str) -> tuple[bytes, ...]:
        """The shares that all sealed for one institution, in the order of names.

        Raises:
            Refusal: ``secure-setup-unfinished`` that names the institutions without shares.
        """
        ...


class SecureRound:
    """One round: masked vectors are added as they arrive, and kept as their sum only.

    Args:
        setup: The finished setup.
        number: The round, from 1.
        digest: `MaskedOrder.digest`.
        listed: After a restart, the list that was sent before it.
    """

    culprits: dict[str, str]
    """Institution -> code of what it did wrong in this round: ``secure-wrong-share``,
    ``secure-absent-share``. A dealer and a holder of one wrong share cannot be told apart if only
    that share is wrong; the holder is named."""

    def __init__(
        self, setup: SecureSetup, number: int, digest: bytes, *, listed: ListOrder | None = None
    ) -> None: ...

    def masked_order(self, name: str, *, with_shares: bool) -> MaskedOrder:
        """The order for an institution; ``with_shares`` until one of its vectors arrived."""
        ...

    def add_masked(self, message: MaskedMessage) -> None:
        """Add an institution's masked vector to the sum.

        Raises:
            Refusal: ``secure-unknown-institution``, ``secure-other-round``,
                ``secure-words-length``, ``secure-words-repeated``, or ``secure-words-late`` if the
                list was made without it.
        """

    def list_order(self) -> ListOrder:
        """The list of this round's survivors. Store it before it is sent.

        Raises:
            Refusal: ``secure-survivors`` if they are too few: the round is given up. After a
                restart also if vectors of the stored list are absent.
        """
        ...

    def add_signature(self, message: ListMessage) -> None:
        """Add an institution's signature over the list.

        Raises:
            Refusal: ``secure-unlisted``, ``secure-other-round`` or ``secure-list-signature``.
        """

    def unmask_order(self) -> UnmaskOrder:
        """The message that asks the survivors for shares.

        Raises:
            Refusal: ``secure-list-signatures`` if fewer than the threshold signed: the round is
                given up.
        """
        ...

    def add_shares(self, message: UnmaskMessage) -> None:
        """Add an institution's shares of this round.

        Raises:
            Refusal: ``secure-unlisted``, ``secure-other-round`` or ``secure-shares-length``.
        """

    def total(self) -> np.ndarray:
        """The sum of the survivors' vectors, ``(d,)`` int64.

        Raises:
            Refusal: ``secure-shares-few`` if fewer than the threshold sent shares, or
                ``secure-shares-wrong`` that names the institution whose secret the shares do not
                give. The round is given up; more shares may be added first.
        """
        ...
