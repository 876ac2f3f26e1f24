"""Rules that bound the influence of a few bad institutions on the global adapter.

- ``median`` (Yin et al. 2018, arXiv 1803.01498): each coordinate of each factor by itself (the mean
  of the middle two where n is even). It needs a strategy that averages each factor by itself.
- ``multi-krum`` (Blanchard et al. 2017, NeurIPS): an update is scored by its squared distances to
  its n - f - 2 nearest others, and the n - f best ones are taken.

Distances are those of the products s B A with magnitudes and head (`products`). A large A with a
small B has a harmless product, but does harm once averaged with other factors. So the squared
distances of the factors count too, each of the two over its median squared length. multi-krum only
chooses weights, and the strategy then takes its mean, so it works with every strategy whose
institutions send all that they train: not with fedsa. Institutions report their own weights, so
none counts more than the median weight. Both rules read updates only: under DP they are
post-processing.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from fedlora.arrays import Floats
from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState, kind
from strategies import products
from strategies.base import Aggregate, Round, Weighted
from strategies.collected import Collected


def tolerated(share: float, updates: int) -> int:
    """The assumed number of bad updates: that share of the updates."""
    return math.floor(share * updates + 1e-9)


def enough(rule: str, share: float, updates: int) -> bool:
    """Whether there are enough updates: one for the median; for multi-krum n >= 2 f + 3."""
    return updates >= (1 if rule == "median" else 2 * tolerated(share, updates) + 3)


def aggregate(
    this_round: Round, updates: Iterable[Weighted], *, rule: str, share: float, mean: Aggregate
) -> tuple[AdapterState, dict[str, str]]:
    """One round under a rule.

    Args:
        this_round: The round, as for a strategy.
        updates: The updates, as for a strategy.
        rule: ``median`` or ``multi-krum``.
        share: The share of bad updates that multi-krum assumes.
        mean: The strategy's aggregate.

    Returns:
        The new adapter, and institution -> reason for those that had no weight.

    Raises:
        Refusal: ``too-few-updates`` when there are not `enough` updates.
    """
    everyone = Collected(updates)
    count = len(everyone)
    if not enough(rule, share, count):
        raise Refusal(
            "too-few-updates", f"{rule} of a share of {share:g} cannot use {count} updates"
        )
    if rule == "median":
        return _median(this_round, everyone), {}
    most, bad = statistics.median(everyone.weights), tolerated(share, count)
    kept = nearest(_comparable(_changes(this_round, everyone)), bad, count - bad)
    weights = [min(w, most) if i in kept else 0.0 for i, w in enumerate(everyone.weights)]
    out = {
        name: f"not-chosen-by-{rule}"
        for i, name in enumerate(everyone.institutions)
        if i not in kept
    }
    return mean(this_round, everyone.weighted(weights)), out


def _changes(this_round: Round, everyone: Collected) -> list[Floats]:
    """Inner products ``(n, n)`` of the updates' changes since the adapter in their orders.

    The first are those of the products with magnitudes and head, the second those of the factors.
    """
    start = this_round.start

    def tensors(name: str) -> list[torch.Tensor]:
        sent = kind(name) in this_round.parts
        return [*(everyone.tensors(name) if sent else [start[name]] * len(everyone)), start[name]]

    inner = products.factors(this_round, tensors) + products.vectors(this_round, tensors)
    plain = products.vectors(this_round, tensors, ("A", "B"))
    return [products.changes(each) for each in (inner, plain)]


def _comparable(changes: Sequence[Floats]) -> Floats:
    """The sum of inner products, each in units of its median squared length."""
    total: Floats = np.zeros_like(changes[0])
    for each in changes:
        total = total + each / (float(np.median(np.diagonal(each))) or 1.0)
    return total


def nearest(changes: Floats, bad: int, keep: int) -> set[int]:
    """Krum's choice.

    Args:
        changes: Inner products, ``(n, n)``.
        bad: f.
        keep: The number of updates to choose.

    Returns:
        Indices of the ``keep`` lowest scores; among equals the first ones.
    """
    square = np.diagonal(changes)
    distances = square[:, None] + square[None, :] - 2 * changes
    np.fill_diagonal(distances, np.inf)
    neighbours = max(1, len(changes) - bad - 2)
    scores = np.sort(distances, axis=1)[:, :neighbours].sum(1)
    return {int(i) for i in np.argsort(scores, kind="stable")[:keep]}


def _median(this_round: Round, everyone: Collected) -> AdapterState:
    """The median of each coordinate, computed in float64."""
    return AdapterState(
        {
            name: torch.tensor(
                np.median(np.stack([t.double().numpy() for t in everyone.tensors(name)]), axis=0),
                dtype=torch.float32,
            )
            for name in this_round.before.only(this_round.parts)
        }
    )
