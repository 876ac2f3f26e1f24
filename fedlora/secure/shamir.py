"""Shamir's secret sharing over the prime 2^256 + 297: a secret has 32 bytes, a share 33.

A secret is the value at 0 of a random polynomial of degree threshold - 1, the share of the
institution at point x >= 1 the value at x. Any ``threshold`` shares give the secret; fewer are
independent of it.

Reference: Shamir (1979), How to share a secret.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Iterable, Mapping, Sequence

PRIME = 2**256 + 297
"""The least prime above 2^256."""
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """The shares of a secret, one for each point, under fresh randomness of the operating system.

    Args:
        secret: 32 bytes.
        threshold: Number of shares that give the secret.
        points: Distinct numbers in [1, PRIME).
    """
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return evaluate([*coefficients, int.from_bytes(secret, "big")], points)


def evaluate(coefficients: Sequence[int], points: Sequence[int]) -> list[bytes]:
    """The values of a polynomial at points, 33 bytes each; the highest coefficient comes first."""
    lowest_first = coefficients[::-1]
    return [value(lowest_first, point).to_bytes(SHARE_BYTES, "big") for point in points]


def combine(shares: Mapping[int, bytes], at: int = 0) -> int:
    """The value at a point of the polynomial through shares; at 0 it is the secret.

    Args:
        shares: Point -> share, as many as the threshold.
        at: The point.
    """
    if at in shares:
        return int.from_bytes(shares[at], "big") % PRIME
    weights = _weights(tuple(shares), at)
    total = sum(w * int.from_bytes(s, "big") for w, s in zip(weights, shares.values(), strict=True))
    return total % PRIME


def value(coefficients: Sequence[int], at: int) -> int:
    """The value of a polynomial; the lowest coefficient comes first."""
    found = 0
    for coefficient in reversed(coefficients):
        found = (found * at + coefficient) % PRIME
    return found


@functools.lru_cache(maxsize=4)
def _weights(points: tuple[int, ...], at: int) -> list[int]:
    """Lagrange's weights: the value at ``at`` is the sum of weight times value at the points."""
    whole = _product(at - point for point in points)
    return [
        whole * inverse * pow(at - point, -1, PRIME) % PRIME
        for point, inverse in zip(points, _inverses(points), strict=True)
    ]


@functools.lru_cache(maxsize=4)
def _inverses(points: tuple[int, ...]) -> list[int]:
    """For each point the inverse of the product of its differences to the others."""
    return [
        pow(_product(point - other for other in points if other != point), -1, PRIME)
        for point in points
    ]


def _product(factors: Iterable[int]) -> int:
    product = 1
    for factor in factors:
        product = product * factor % PRIME
    return product
