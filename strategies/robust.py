"""Rules that bound the influence of a few bad institutions on the global adapter.

- ``median``, ``trimmed-mean`` (Yin et al. 2018, arXiv 1803.01498): each coordinate of each factor
  by itself, as the mean without the f largest and smallest values, or as the median (the mean of
  the middle two where n is even). These rules need a strategy that averages each factor by itself:
  fedavg, ffa, rolora, fedsa.
- ``krum``, ``multi-krum`` (Blanchard et al. 2017, NeurIPS): an update is scored by its squared
  distances to its n - f - 2 nearest others; krum takes the best one, multi-krum the n - f best.
- ``norm-bound`` (Sun et al. 2019, arXiv 1911.07963): a change longer than the cohort's median is
  scaled down to it.

Distances and lengths are those of the products s B A with magnitudes and head (`products`). A large
A with a small B has a harmless product, but does harm once averaged with other factors. Lengths of
factors therefore count too: norm-bound limits each of the two to its median; krum adds the two
squared distances, each over the median squared length. Krum and norm-bound only choose weights, and
the strategy then takes its mean, so they work with every strategy whose institutions send all that
they train: not with fedsa. Institutions report their own weights, so none counts more than the
median weight. All rules read updates only: under DP they are post-processing.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from fedlora.arrays import Floats
from fedlora.config.sections import COORDINATE_WISE
from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState, kind
from fedlora.wire.messages import ClientUpdate
from strategies import products
from strategies.base import Aggregate, Round, Weighted
from strategies.collected import Collected, collect


def tolerated(byzantine: float, updates: int) -> int:
    """The assumed number of bad updates: ``byzantine``, or below 1 that share of the updates."""
    return int(byzantine) if byzantine >= 1 else math.floor(byzantine * updates + 1e-9)


def enough(rule: str, byzantine: float, updates: int) -> bool:
    """Whether there are enough updates: n > 2 f; for krum and multi-krum n >= 2 f + 3."""
    least = 2 * tolerated(byzantine, updates) + (3 if rule.endswith("krum") else 1)
    return updates >= least


def aggregate(
    this_round: Round, updates: Iterable[Weighted], *, rule: str, byzantine: float, mean: Aggregate
) -> tuple[AdapterState, dict[str, str]]:
    """One round under a rule.

    Args:
        this_round: The round, as for a strategy.
        updates: The updates, as for a strategy.
        rule: The name of the rule, as above.
        byzantine: See `tolerated`.
        mean: The strategy's aggregate.

    Returns:
        The new adapter, and institution -> reason for those that had no weight.

    Raises:
        Refusal: ``too-few-updates`` when there are not `enough` updates.
    """
    with collect(updates) as everyone:
        count = len(everyone)
        if not enough(rule, byzantine, count):
            raise Refusal(
                "too-few-updates",
                f"{rule} with federation.byzantine {byzantine:g} cannot use {count} updates",
            )
        bad = tolerated(byzantine, count)
        if rule in COORDINATE_WISE:
            cut = bad if rule == "trimmed-mean" else (count - 1) // 2
            return _coordinates(this_round, everyone, cut), {}
        changes = _changes(this_round, everyone)
        most = statistics.median(everyone.weights)
        weights = [min(weight, most) for weight in everyone.weights]
        if rule == "norm-bound":
            return _bounded(this_round, everyone, weights, changes, mean), {}
        kept = nearest(_comparable(changes), bad, 1 if rule == "krum" else count - bad)
        weights = [weight if i in kept else 0.0 for i, weight in enumerate(weights)]
        out = {
            name: f"not-chosen-by-{rule}"
            for name, weight in zip(everyone.institutions, weights, strict=True)
            if not weight
        }
        return mean(this_round, everyone.weighted(weights)), out


def _changes(this_round: Round, everyone: Collected) -> list[Floats]:
    """Inner products ``(n, n)`` of the updates' changes since the adapters in their orders.

    The first are those of the products with magnitudes and head, the second those of the factors.
    """
    starts, of = this_round.starts(everyone.institutions)

    def tensors(name: str) -> list[torch.Tensor]:
        before = [state[name] for state in starts]
        sent = kind(name) in this_round.parts
        return [*(everyone.tensors(name) if sent else (before[i] for i in of)), *before]

    inner = products.factors(this_round, tensors) + products.vectors(this_round, tensors)
    plain = products.vectors(this_round, tensors, ("A", "B"))
    return [products.changes(each, of) for each in (inner, plain)]


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


def _bounded(
    this_round: Round,
    everyone: Collected,
    weights: Sequence[float],
    changes: Sequence[Floats],
    mean: Aggregate,
) -> AdapterState:
    """The mean of updates that are scaled towards the start, which joins as one more update.

    The scaled update c w_k + (1 - c) w has a change that is c times as long: of factors, where the
    strategy averages factors, and of products, where it averages products. The mean of scaled
    updates is the mean of all w_k with weights c, and of w with the remaining weight.
    """
    share = np.ones(len(everyone))
    for lengths in map(products.norms, changes):
        bound = float(np.median(lengths))
        shorter = np.divide(bound, lengths, where=lengths > bound, out=np.ones_like(lengths))
        share = np.minimum(share, shorter)
    scaled = [weight * float(part) for weight, part in zip(weights, share, strict=True)]
    before = ClientUpdate(
        institution="", round=this_round.number, adapter=this_round.before.only(this_round.parts)
    )

    def updates() -> Iterable[Weighted]:
        yield before, math.fsum(weights) - math.fsum(scaled)
        yield from everyone.weighted(scaled)

    # twice as many: the global adapter weighs as much as all updates at most
    return mean(dataclasses.replace(this_round, asked=2 * len(everyone)), updates())


def _coordinates(this_round: Round, everyone: Collected, cut: int) -> AdapterState:
    """The mean of each coordinate without its ``cut`` largest and smallest values."""
    result: dict[str, torch.Tensor] = {}
    for name in this_round.before.only(this_round.parts):
        stack = np.sort(np.stack([t.numpy() for t in everyone.tensors(name)]), axis=0)
        middle = stack[cut : len(stack) - cut].mean(axis=0, dtype=np.float64)
        result[name] = torch.tensor(middle, dtype=torch.float32)
    return AdapterState(result)
