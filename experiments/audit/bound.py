r"""A lower bound on epsilon from one run with canaries (Steinke, Nasr and Jagielski, 2023).

Each of m canaries is in the training records or not by a fair coin of its own. An attacker ranks
them, says "in" of the highest scores and "out" of the lowest ones, and abstains in between. If the
run is (epsilon, delta)-DP, of r guesses at most about r e^epsilon / (1 + e^epsilon) can be right:
more of them refute the claim.

Reference: arXiv 2305.08846, Theorem 5.2 for (epsilon, delta).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

SHARES = (0.1, 0.25, 0.5, 1.0)
"""Shares of the canaries that are guessed. All are tried, so each has its part of the error."""

LARGEST = 50.0  # epsilon that no audit reaches: with m canaries it shows at most about ln m


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What the guesses show.

    Args:
        epsilon: The run is not (epsilon, delta)-DP for any smaller epsilon, with ``confidence``.
        guesses: Guesses of the share of canaries that shows the most.
        right: How many of them are right.
        canaries: All, guessed or not.
        confidence: Of the statement.
    """

    epsilon: float
    guesses: int
    right: int
    canaries: int
    confidence: float


def p_value(*, guesses: int, right: int, canaries: int, epsilon: float, delta: float) -> float:
    r"""The most probable that ``right`` or more of the guesses are under (epsilon, delta)-DP.

    Args:
        guesses: r, those that were not abstained from.
        right: v of them.
        canaries: m.
        epsilon: Claimed.
        delta: Claimed.

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
    """The largest epsilon that so many right guesses refute, 0 if they refute none.

    Args:
        guesses: As in `p_value`.
        right: As in `p_value`.
        canaries: As in `p_value`.
        delta: As in `p_value`.
        confidence: 1 - the chance of refuting a claim that is true.
    """

    def refuted(epsilon: float) -> bool:
        p = p_value(guesses=guesses, right=right, canaries=canaries, epsilon=epsilon, delta=delta)
        return p <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, LARGEST
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def most(canaries: int, delta: float, confidence: float) -> float:
    """The epsilon that `audit` gives when every guess is right."""
    return lower_bound(
        guesses=canaries,
        right=canaries,
        canaries=canaries,
        delta=delta,
        confidence=1 - (1 - confidence) / len(SHARES),
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
        scores: Of each canary ``(m,)``, higher where it seems to be in.
        inside: Which of them are ``(m,)``, each by a fair coin that the scores did not see.
        delta: The claimed one.
        confidence: Of the bound, over all of ``SHARES`` together (Bonferroni).

    Raises:
        ValueError: With fewer than two canaries.
    """
    m = len(scores)
    if m < 2:
        raise ValueError(f"{m} canaries say nothing; at least 2 are needed")
    order = np.argsort(-scores, kind="stable")
    found: list[Bound] = []
    for share in SHARES:
        half = max(1, round(share * m / 2))
        right = int(inside[order[:half]].sum() + (~inside[order[m - half :]]).sum())
        epsilon = lower_bound(
            guesses=2 * half,
            right=right,
            canaries=m,
            delta=delta,
            confidence=1 - (1 - confidence) / len(SHARES),
        )
        found.append(
            Bound(epsilon=epsilon, guesses=2 * half, right=right, canaries=m, confidence=confidence)
        )
    return max(found, key=lambda bound: bound.epsilon)
