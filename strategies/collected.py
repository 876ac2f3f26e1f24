"""All updates of a round in a fixed order, for strategies that cannot fold them in one by one."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from fedlora.models.adapters import factor_names
from strategies.base import Round, Weighted
from strategies.products import Product


class Collected:
    """Updates sorted by institution.

    In a deployment their tensors are views of the files in which replies arrive.

    Args:
        updates: Updates of different institutions, in any order.

    Attributes:
        institutions: Their names, sorted.
        weights: The weight of each, not normalised.
        shares: The weights divided by their sum.
    """

    def __init__(self, updates: Iterable[Weighted]) -> None:
        ordered = sorted(updates, key=lambda entry: entry[0].institution)
        self._updates = [update for update, _ in ordered]
        self.institutions = [update.institution for update in self._updates]
        self.weights = [weight for _, weight in ordered]
        total = math.fsum(self.weights)
        self.shares = [weight / total for weight in self.weights]

    def __len__(self) -> int:
        return len(self._updates)

    def tensors(self, name: str) -> list[torch.Tensor]:
        """The tensor of this name of every update, float32."""
        return [update.adapter[name] for update in self._updates]

    def products(self, this_round: Round, path: str) -> list[Product]:
        """Each update's product in the layer at a module path, with its share and scale."""
        a, b = (self.tensors(name) for name in factor_names(path))
        return [
            (share * this_round.scale(len(right)), left, right)
            for share, left, right in zip(self.shares, b, a, strict=True)
        ]

    def mean(self, name: str) -> torch.Tensor:
        """The weighted mean of this tensor, float32; summed in float64."""
        return sum(
            (t.double() * p for p, t in zip(self.shares, self.tensors(name), strict=True)),
            start=torch.zeros((), dtype=torch.float64),
        ).float()

    def weighted(self, weights: Sequence[float]) -> Iterator[Weighted]:
        """The updates under other weights; those of weight 0 are left out."""
        return ((u, w) for u, w in zip(self._updates, weights, strict=True) if w)
