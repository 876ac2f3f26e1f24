"""What a promise of (epsilon, delta) means for an attacker who suspects that a unit was trained on.

Two readings of one promise. By epsilon: the odds of a suspicion become at most e^epsilon times as
large, except where the privacy loss L is above epsilon. The accountant bounds how often that is: it
is rarer than that bound, but not as rare as delta, which is the mean of what exceeds. By the noise:
the epsilon at many deltas bounds the attack's error rates (f-DP; Wasserman & Zhou 2010,
Dong, Roth & Su 2022, arXiv 1905.02383), much closer at large epsilons.

In the field's terms ``suspicion`` is the posterior for a prior, ``found`` the largest true positive
rate at a false positive rate, ``right`` the largest accuracy of membership inference at equal
priors.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fedlora.privacy import composition
from fedlora.privacy.composition import Event

PRIORS = (0.01, 0.5)
"""The attacker's suspicions before the run for which the suspicion after it is stated."""
FALSE_ALARMS = (0.001, 0.01)
"""Shares of units wrongly accused for which the share of units found is stated."""
_DELTAS = (1e-3, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_FACTORS = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
_MAX_EXPONENT = 700.0  # exp of more overflows; every bound is 1 long before


def suspicion(prior: float, epsilon: float) -> float:
    """Return the largest suspicion after the run, where the privacy loss is at most epsilon.

    Args:
        prior: The suspicion before the run, in (0, 1).
        epsilon: At least 0; inf gives 1.
    """
    return 1 / (1 + (1 - prior) / prior * math.exp(-epsilon))


def bounds(history: Iterable[Event], epsilon: float, delta: float) -> dict[str, Any]:
    """Bound what an attacker learns of one unit from everything that a history released.

    Guarantee: no attack does better, whatever else the attacker knows. The accountant, which is
    tight, supplies the points of the trade-off curve.

    Args:
        history: All releases about the unit.
        epsilon: The history's promised epsilon.
        delta: The promised delta.

    Returns:
        ``suspicion``: suspicion before -> the most after, except with the probability
        ``exceeded`` at most;
        ``found``: share of units wrongly accused -> the largest share of units found;
        ``right``: the largest share of right answers to "was it in or out", where both are
        equally likely. Keys are texts, values shares.
    """
    events = tuple(history)
    points = [(epsilon, delta)]
    for one in _DELTAS:
        points.append((composition.epsilon(events, one), one))
        if not points[-1][0]:
            break  # a larger delta says no more
    points = [(min(e, _MAX_EXPONENT), d) for e, d in points]
    return {
        "suspicion": {f"{prior:g}": suspicion(prior, epsilon) for prior in PRIORS},
        "exceeded": _exceeded(events, epsilon, delta),
        "found": {f"{rate:g}": _found(points, rate) for rate in FALSE_ALARMS},
        "right": min((math.exp(e) + d) / (1 + math.exp(e)) for e, d in points),
    }


def group_delta(epsilon: float, delta: float, units: int) -> float:
    """The delta of the promise for so many units together; its epsilon is ``units`` times as large.

    It is the sum of delta e^(i epsilon) over i below ``units``. From 1 on it promises nothing.
    """
    return delta * math.fsum(math.exp(min(i * epsilon, _MAX_EXPONENT)) for i in range(units))


def largest(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest value of each figure of several `bounds`, at least one."""

    def each(key: str) -> dict[str, float]:
        return {name: max(one[key][name] for one in found) for name in found[0][key]}

    return {
        "suspicion": each("suspicion"),
        "exceeded": max(one["exceeded"] for one in found),
        "found": each("found"),
        "right": max(one["right"] for one in found),
    }


def _exceeded(events: Sequence[Event], epsilon: float, delta: float) -> float:
    """Bound the probability that the privacy loss L is above epsilon.

    delta(e) is the mean of max(0, 1 - exp(e - L)), so it is at least P(L > epsilon) times
    1 - exp(e - epsilon), for every e below epsilon.
    """
    if not events or math.isinf(epsilon):
        return 0.0
    least = 1.0
    for factor in _FACTORS:
        if (larger := delta * factor) < 1:
            gap = epsilon - composition.epsilon(events, larger)
            if gap > 0:
                least = min(least, larger / -math.expm1(-gap))
    return least


def _found(points: Iterable[tuple[float, float]], rate: float) -> float:
    """Bound the share of members found where a share ``rate`` of others is wrongly accused.

    Each point (e, d) gives two lines: TPR <= e^e FPR + d, and 1 - FPR <= e^e (1 - TPR) + d.
    """
    return min(
        min(math.exp(e) * rate + d, 1 - math.exp(-e) * (1 - d - rate), 1.0) for e, d in points
    )
