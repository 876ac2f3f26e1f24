"""What an institution checks in a round of secure aggregation before it masks, signs or reveals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.errors import Refusal
from fedlora.secure import noise_shares, secure_aggregation
from fedlora.secure.secure_aggregation import Terms, UnmaskOrder


def check_words(terms: Terms, words: np.ndarray) -> None:
    """Check that the sum of n such vectors cannot wrap.

    Args:
        terms: The run's terms.
        words: ``(d,)`` int64.

    Raises:
        Refusal: ``secure-words-length`` or ``secure-words-range``.
    """
    if words.dtype != np.int64 or words.shape != (terms.parameters,):
        raise Refusal(
            "secure-words-length",
            f"a vector has {terms.parameters} words of int64, not {words.shape} {words.dtype}",
        )
    bound = noise_shares.largest_word(len(terms.names))
    if words.max() >= bound or words.min() <= -bound:
        raise Refusal(
            "secure-words-range",
            f"a word is not below {bound} in size: the sum of {len(terms.names)} could wrap; "
            "raise max-grad-norm or lower the noise",
        )


def check_list(terms: Terms, name: str, survivors: Sequence[str]) -> None:
    """Check that the sum over a list shows no vector by itself.

    Args:
        terms: The run's terms.
        name: This institution.
        survivors: The names of the list.

    Raises:
        Refusal: ``secure-list-names``, ``secure-list-excluded`` or ``secure-list-short``.
    """
    if list(survivors) != sorted({*survivors} & {*terms.names}):
        raise Refusal("secure-list-names", "a list is not sorted, repeats or adds a name")
    if name not in survivors:
        raise Refusal("secure-list-excluded", f"a list has not {name}, which masked a vector")
    if len(survivors) < terms.least_survivors:
        raise Refusal(
            "secure-list-short",
            f"a list of {len(survivors)} institutions is below {terms.least_survivors}",
        )


def check_signatures(
    terms: Terms,
    peers: Mapping[str, ec.EllipticCurvePublicKey],
    survivors: Sequence[str],
    order: UnmaskOrder,
    statement: bytes,
) -> None:
    """Check that T survivors signed the list. Further signatures are not looked at.

    Args:
        terms: The run's terms.
        peers: Pinned keys.
        survivors: The list that this institution signed.
        order: The signatures, one place for each survivor.
        statement: The signed bytes.

    Raises:
        Refusal: ``secure-unmask-signatures``.
    """
    valid = 0
    if len(order.signatures) == len(survivors):
        for name, signature in zip(survivors, order.signatures, strict=True):
            valid += bool(signature) and secure_aggregation.is_signed(
                peers[name], signature, statement
            )
            if valid == terms.threshold:
                return
    raise Refusal(
        "secure-unmask-signatures",
        f"the signed list of round {order.round} has {valid} valid signatures, below "
        f"{terms.threshold}",
    )
