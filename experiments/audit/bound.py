r"""A lower bound on epsilon from one run with canaries (Steinke, Nasr and Jagielski, 2023).

A fair coin decides for each of m canaries whether it is in the training records. An attacker ranks
them, guesses "in" for the highest scores and "out" for the lowest, and abstains in between. If the
run is (epsilon, delta)-DP, at most about r e^epsilon / (1 + e^epsilon) of r guesses are right. More
right guesses refute the claim.

Reference: arXiv 2305.08846, Theorem 5.2 for (epsilon, delta).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

GUESSED_SHARES = (0.1, 0.25, 0.5, 1.0)
"""Shares of guessed canaries. `audit` tries all, so each has a part of the error probability."""

MAX_EPSILON = 50.0  # above every possible bound: m canaries show at most about ln m


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The lower bound on epsilon that the guesses show.

    Args:
        epsilon: The run is not (epsilon, delta)-DP for any smaller epsilon, with ``confidence``.
        guesses: The number of guesses, for the share of canaries with the largest bound.
        right: The number of right guesses.
        canaries: The number of canaries, guessed or not.
        confidence: The confidence of the bound.
    """

    epsilon: float
    guesses: int
    right: int
    canaries: int
    confidence: float


def p_value(*, guesses: int, right: int, canaries: int, epsilon: float, delta: float) -> float:
    r"""Bound the probability of ``right`` or more right guesses under (epsilon, delta)-DP.

    Args:
        guesses: r, the number of guesses.
        right: v, the number of right guesses.
        canaries: m, the number of canaries.
        epsilon: The claimed epsilon.
        delta: The claimed delta.

    Returns:
        :math:`f(v) + 2 m \delta \max_{1 \le i \le v} (f(v - i) - f(v)) / i`, at most 1, with
        :math:`f(v) = P[\mathrm{Bin}(r, e^\epsilon / (1 + e^\epsilon)) \ge v]`.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(right - 1, guesses, chance))
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    steepest = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, tail + 2 * canaries * delta * steepest)


def lower_bound(
    *, guesses: int, right: int, canaries: int, delta: float, confidence: float
) -> float:
    """Return the largest epsilon that the right guesses refute, 0 if they refute none.

    Args:
        guesses: As in `p_value`.
        right: As in `p_value`.
        canaries: As in `p_value`.
        delta: As in `p_value`.
        confidence: 1 minus the probability of refuting a true claim.
    """

    def refuted(epsilon: float) -> bool:
        p = p_value(guesses=guesses, right=right, canaries=canaries, epsilon=epsilon, delta=delta)
        return p <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, MAX_EPSILON
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def largest(canaries: int, delta: float, confidence: float) -> float:
    """Return the bound of `audit` when every guess is right."""
    guesses = 2 * (canaries // 2)
    return lower_bound(
        guesses=guesses,
        right=guesses,
        canaries=canaries,
        delta=delta,
        confidence=1 - (1 - confidence) / len(GUESSED_SHARES),
    )


def audit(
    scores: NDArray[np.floating],
    inside: NDArray[np.bool_],
    *,
    delta: float,
    confidence: float = 0.95,
) -> Bound:
    """Guess by scores and bound epsilon.

    Args:
        scores: A score of each canary ``(m,)``; a higher score means "in".
        inside: Whether each canary is in ``(m,)``, by fair coins independent of the scores.
        delta: The claimed delta.
        confidence: The confidence of the bound, over all ``GUESSED_SHARES`` (Bonferroni).

    Raises:
        ValueError: With fewer than two canaries.
    """
    m = len(scores)
    if m < 2:
        raise ValueError(f"{m} canaries are too few for a bound; at least 2 are needed")
    order = np.argsort(-scores, kind="stable")
    found: list[Bound] = []
    for share in GUESSED_SHARES:
        half = max(1, min(m // 2, round(share * m / 2)))  # no canary is guessed both ways
        right = int(inside[order[:half]].sum() + (~inside[order[m - half :]]).sum())
        epsilon = lower_bound(
            guesses=2 * half,
            right=right,
            canaries=m,
            delta=delta,
            confidence=1 - (1 - confidence) / len(GUESSED_SHARES),
        )
        found.append(
            Bound(epsilon=epsilon, guesses=2 * half, right=right, canaries=m, confidence=confidence)
        )
    return max(found, key=lambda bound: bound.epsilon)
