"""Membership inference on real rows: attacks that distinguish training rows from others by loss.

References: Yeom et al. (2018), arXiv 1709.01604 (loss); Carlini et al. (2022), arXiv 2112.03570
(LiRA, and the reason to report true positive rates at low false positive rates).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedlora.arrays import Floats

LOW_RATES = (0.01, 0.001)
Bools = NDArray[np.bool_]


def measure(scores: Floats, member: Bools, confidence: float) -> dict[str, Any]:
    """ROC of an attack, ready for JSON.

    Args:
        scores: A score of each row ``(n,)``; a higher score means "member". Rows are distinct,
            because the intervals assume independence.
        member: Whether each row is a member ``(n,)``.
        confidence: The confidence of the intervals.

    Returns:
        ``auc`` with its interval (Hanley and McNeil). ``tpr`` at each of ``LOW_RATES`` with at
        least 1 / rate non-members, with exact intervals (Clopper and Pearson, for the chosen
        threshold). ``members`` and ``others``: numbers of rows. ``roc``: pairs of false and true
        positive rates.
    """
    members, others = scores[member], scores[~member]
    n, m = len(members), len(others)
    auc = float(stats.mannwhitneyu(members, others).statistic / (n * m))
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (m - 1) * (q2 - auc**2)) / (n * m)
    margin = float(stats.norm.ppf((1 + confidence) / 2)) * max(variance, 0.0) ** 0.5
    descending = np.sort(others)[::-1]
    tpr: dict[str, Any] = {}
    for rate in (rate for rate in LOW_RATES if rate * m >= 1):
        threshold = descending[int(rate * m)]  # at most this share of the others scores higher
        hits = int((members > threshold).sum())
        interval = stats.binomtest(hits, n).proportion_ci(confidence, method="exact")
        tpr[f"{rate:g}"] = {"value": hits / n, "low": interval.low, "high": interval.high}
    grid = np.unique(np.quantile(scores, np.linspace(0, 1, 101)))[::-1]
    return {
        "auc": {"value": auc, "low": max(0.0, auc - margin), "high": min(1.0, auc + margin)},
        "tpr": tpr,
        "members": n,
        "others": m,
        "roc": [[float((others >= t).mean()), float((members >= t).mean())] for t in grid],
    }


def logit_confidence(losses: Floats) -> Floats:
    """Return the logit of exp(-loss), which LiRA assumes to be normally distributed."""
    clipped = np.clip(losses, 1e-7, 50.0)
    return -np.log(np.expm1(clipped))


def lira(target: Floats, shadows: Floats, inside: Bools) -> Floats:
    """Return the log-likelihood ratio of each row's confidence: shadows with and without the row.

    Args:
        target: Confidences ``(n,)`` of the attacked model, from `logit_confidence`.
        shadows: Confidences of the shadow models ``(s, n)``; nan where a row was not measured.
        inside: Whether each shadow model had the row ``(s, n)``.

    Returns:
        ``(n,)`` scores. Deviations are pooled over rows, as the paper does with few models. A row
        that all or no shadow models had is scored by its one mean, and a row that none measured
        by 0.
    """
    means: list[Floats] = []
    deviations: list[float] = []
    measured = np.isfinite(shadows)
    for which in (inside & measured, ~inside & measured):
        count = which.sum(0)
        total = np.where(which, shadows, 0.0).sum(0)
        mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        centred = np.where(which & (count > 1), shadows - mean, np.nan)
        spread = float(np.sqrt(np.nanmean(centred**2))) if (count > 1).any() else 1.0
        means.append(mean)
        deviations.append(max(spread, 1e-6))
    mean_in = np.where(np.isnan(means[0]), means[1], means[0])
    mean_out = np.where(np.isnan(means[1]), means[0], means[1])
    ratio = stats.norm.logpdf(target, mean_in, deviations[0]) - stats.norm.logpdf(
        target, mean_out, deviations[1]
    )
    return np.where(measured.any(0), ratio, 0.0)


def exposure(losses: Sequence[float] | Floats, others: Floats) -> Floats:
    """Return the exposure of secrets in bits: log2 of all candidates over the rank of the true one.

    Args:
        losses: The loss of each secret ``(n,)``.
        others: The losses of c alternatives to each secret ``(n, c)``.

    Returns:
        ``(n,)``, at most log2(c + 1), about 1.44 on average when nothing is learned.

    Reference: Carlini et al. (2019), arXiv 1802.08232.
    """
    own = np.asarray(losses)[:, None]
    ranks = 1 + (others < own).sum(1) + 0.5 * (others == own).sum(1)
    return np.log2(others.shape[1] + 1) - np.log2(ranks)
