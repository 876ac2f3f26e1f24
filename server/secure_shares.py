"""The secrets of a round from shares, some of which may be wrong or absent.

Each secret is checked against what its institution published before the run, so a wrong secret is
never used. With wrong shares, the server looks for the polynomial on which most lie
(`secure.shamir.correct`), and where that cannot find as many liars as may collude, it leaves out
one institution after the other, then two, until a secret is right. The shares that do not lie on
the polynomial are the wrong ones.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedlora.errors import Refusal
from fedlora.secure import shamir
from fedlora.secure.secure_aggregation import Terms

MAX_TRIES = 2000
"""Sets of shares that are tried for one secret."""

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
            if _finds_all(terms, len(present)):  # as many liars as may collude: so it is the dealer
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

    def checked(value: int) -> bytes | None:
        if value >= 2 ** (8 * shamir.SECRET_BYTES):
            return None
        secret = value.to_bytes(shamir.SECRET_BYTES, "big")
        return secret if is_right(secret) else None

    def wrong(value_at: Callable[[int], int]) -> set[str]:
        return {
            holder
            for holder in order
            if value_at(terms.points[holder]) != int.from_bytes(shares[holder], "big")
        }

    points = {terms.points[holder]: shares[holder] for holder in order}
    first = dict(itertools.islice(points.items(), terms.threshold))
    if (secret := checked(shamir.combine(first))) is not None:
        return secret, set()
    line = shamir.correct(points, terms.threshold)
    if line is not None and (secret := checked(shamir.value(line, 0))) is not None:
        return secret, wrong(lambda at: shamir.value(line, at))
    if _corrects(terms, len(order)):
        return None
    for chosen in itertools.islice(_subsets(order, terms.threshold), 1, MAX_TRIES):
        some = {terms.points[holder]: shares[holder] for holder in chosen}
        if (secret := checked(shamir.combine(some))) is not None:
            return secret, wrong(lambda at, some=some: shamir.combine(some, at))
    return None


def _corrects(terms: Terms, present: int) -> bool:
    """Whether `secure.shamir.correct` finds as many wrong shares as institutions may collude."""
    return present - terms.threshold >= 2 * terms.colluding


def _finds_all(terms: Terms, present: int) -> bool:
    """Whether as many wrong shares as institutions may collude are found, whoever has them."""
    sets = sum(math.comb(present, count) for count in range(terms.colluding + 1))
    spare = present - terms.threshold
    return _corrects(terms, present) or (terms.colluding <= spare and sets <= MAX_TRIES)


def _subsets(order: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Sets of holders: the first, then those without one, two, ... of all."""
    spare = len(order) - size
    left_out = itertools.chain.from_iterable(
        itertools.combinations(range(len(order)), count) for count in range(spare + 1)
    )
    for out in left_out:
        yield [holder for i, holder in enumerate(order) if i not in out][:size]
