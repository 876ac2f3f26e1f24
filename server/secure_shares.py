"""The secrets of a round from shares, some of which may be wrong or absent.

Each secret is checked against what its institution published before the run, so a wrong secret is
never used. With wrong shares, the server leaves out one institution after the other, then two,
until a secret is right; the shares that do not lie on the polynomial are the wrong ones.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedlora import shamir
from fedlora.errors import Refusal
from fedlora.secure_aggregation import Terms

MAX_TRIES = 2000
"""Sets of shares that are tried for one secret: all pairs of wrong shares of 60 institutions."""

WRONG, ABSENT = "secure-wrong-share", "secure-absent-share"


@dataclass(frozen=True, kw_only=True)
class Revealed:
    """The outcome of `reveal`.

    Args:
        secrets: Institution -> 32 bytes; complete if there is no refusal.
        culprits: Institution -> `WRONG` or `ABSENT`.
        refusal: The reason why a secret is not known.
    """

    secrets: Mapping[str, bytes]
    culprits: Mapping[str, str]
    refusal: Refusal | None


def reveal(
    terms: Terms,
    held: Mapping[str, Mapping[str, bytes]],
    is_right: Callable[[str, bytes], bool],
) -> Revealed:
    """Combine the shares of all secrets.

    Args:
        terms: The run's terms.
        held: Dealer of a secret -> holder -> share; empty bytes for a share that it could not open.
        is_right: Whether 32 bytes are the secret of a dealer.
    """
    secrets: dict[str, bytes] = {}
    faults: list[tuple[str, str, str]] = []  # holder, dealer, code
    lost: dict[str, str] = {}
    refusal: Refusal | None = None
    distrusted: set[str] = set()
    for dealer, shares in held.items():
        present = {h: s for h, s in shares.items() if len(s) == shamir.SHARE_BYTES}
        faults += [(holder, dealer, ABSENT) for holder in shares if holder not in present]
        if len(present) < terms.threshold:
            refusal = refusal or Refusal(
                "secure-shares-few",
                f"{len(present)} institutions sent a share of {dealer}'s secret, below "
                f"{terms.threshold}; the round is given up",
            )
            continue
        found = _search(terms, present, distrusted, lambda s, d=dealer: is_right(d, s))
        if found is None:
            lost[dealer] = WRONG
            refusal = refusal or Refusal(
                "secure-shares-wrong",
                f"the shares of {dealer}'s secret do not give it; the round is given up",
            )
            continue
        secrets[dealer], wrong = found
        distrusted |= wrong
        faults += [(holder, dealer, WRONG) for holder in sorted(wrong)]
    return Revealed(secrets=secrets, culprits=_culprits(terms, faults) | lost, refusal=refusal)


def _culprits(terms: Terms, faults: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """More than t holders are not all dishonest: then it is the dealer. Else it is the holder."""
    of_dealer = Counter(dealer for _, dealer, _ in faults)
    return {
        dealer if of_dealer[dealer] > terms.colluding else holder: code
        for holder, dealer, code in faults
    }


def _search(
    terms: Terms,
    shares: Mapping[str, bytes],
    distrusted: set[str],
    is_right: Callable[[bytes], bool],
) -> tuple[bytes, set[str]] | None:
    """The secret, and the holders of wrong shares as far as they had to be found."""
    order = sorted(shares, key=lambda holder: (holder in distrusted, holder))
    for tries, chosen in enumerate(_subsets(order, terms.threshold)):
        points = {terms.points[holder]: shares[holder] for holder in chosen}
        value = shamir.combine(points)
        if value < 2 ** (8 * shamir.SECRET_BYTES):
            secret = value.to_bytes(shamir.SECRET_BYTES, "big")
            if is_right(secret):
                suspects = [h for h in order if h not in chosen] if tries else []
                return secret, {
                    holder
                    for holder in suspects
                    if shamir.combine(points, terms.points[holder])
                    != int.from_bytes(shares[holder], "big")
                }
    return None


def _subsets(order: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Up to `MAX_TRIES` sets of holders: the first, then those without one, two, ... of all."""
    spare = len(order) - size
    left_out = itertools.chain.from_iterable(
        itertools.combinations(range(len(order)), count) for count in range(spare + 1)
    )
    for out in itertools.islice(left_out, MAX_TRIES):
        yield [holder for i, holder in enumerate(order) if i not in out][:size]
