"""An institution's role in secure aggregation: its keys, its masked vectors, and what it reveals.

Each method answers one message of ``fedlora.secure_aggregation``. All that a later answer needs is
in the party's store before an answer is returned, so a process that was killed goes on with a new
object on the same store, and an answer that was lost is given again.

Guaranteed, as long as the store is not lost or replaced by an older copy: in one round this
institution masks one vector, signs one list, and reveals for each institution one kind of share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

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


class SecureParty:
    """One institution in the protocol.

    Args:
        store: The file of this role's state (``client.secure_store``); created by the first run.
        name: This institution.
        key: Its P-384 key, which signs.
        peers: The pinned P-384 key of each institution, this one included, by name. A run may have
            fewer institutions than there are pinned keys, never others.
        before_unmask: Called with run and round before shares of a round are returned: the point
            of no return. It must store durably that the round is spent, may be called again for
            the same round, and stops the answer by raising.
    """

    def __init__(
        self,
        *,
        store: Path,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        peers: Mapping[str, ec.EllipticCurvePublicKey],
        before_unmask: Callable[[str, int], None],
    ) -> None: ...

    def keys(self, terms: Terms) -> KeysMessage:
        """Make the keys of a run (first exchange of the setup); the same terms, the same answer.

        The caller has checked that its own settings allow these terms.

        Raises:
            Refusal: ``secure-name-missing``, ``secure-own-key``, ``secure-unknown-institution``,
                ``secure-shared-key``, ``secure-curve``, or ``secure-terms-changed``.
        """
        ...

    def shares(self, order: SharesOrder) -> SharesMessage:
        """Check all keys and seal the shares of this institution's secrets (second exchange).

        Raises:
            Refusal: ``secure-run-unknown``, ``secure-roster-changed``, ``secure-keys-*``, or
                ``secure-other-keys``.
        """
        ...

    def begin(self, order: MaskedOrder) -> None:
        """Begin a round, before any training: check the order, store it, erase earlier rounds.

        Raises:
            Refusal: ``secure-setup-unfinished``, ``secure-shares-missing``, ``secure-digest``,
                ``secure-round-range``, ``secure-round-past``, ``secure-round-other-order``.
        """
        ...

    def mask(self, order: MaskedOrder, words: np.ndarray) -> MaskedMessage:
        """Mask this round's vector. Calls `begin` first.

        Args:
            order: The round's order.
            words: ``(d,)`` int64, noise included: the same whenever the order is the same.

        Raises:
            Refusal: As `begin`, ``secure-words-length``, ``secure-words-range`` if a word is not
                below 2^62 / n in size, ``secure-words-changed`` if the round masked other words.
        """
        ...

    def sign_list(self, order: ListOrder) -> ListMessage:
        """Sign the survivors of a round: one list a round.

        Raises:
            Refusal: ``secure-list-unmasked``, ``-names``, ``-excluded``, ``-short`` or ``-second``.
        """
        ...

    def unmask(self, order: UnmaskOrder) -> UnmaskMessage:
        """Reveal shares for the list that this institution signed, if enough others signed it.

        ``before_unmask`` has returned before this does.

        Raises:
            Refusal: ``secure-unmask-unsigned`` or ``secure-unmask-signatures``.
        """
        ...

    def forget(self, run: str) -> None:
        """Erase all secrets of a run that has ended. The run cannot be set up again."""
        ...
