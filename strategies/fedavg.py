r"""Federated averaging of the factors: :math:`A = \sum_k p_k A_k`, :math:`B = \sum_k p_k B_k`.

Averaging A and B apart is not averaging BA: the difference is a product of the institutions'
deviations, small when they take few local steps from a common start. Magnitudes are averaged too:
DoRA's magnitude is a plain vector and its mean is exact.

Reference: McMahan et al. (2017), arXiv 1602.05629; for LoRA under DP: Liu et al. (2023), DP-LoRA,
arXiv 2312.17493.
"""

import math
from collections.abc import Iterable

import torch

from fedlora.models.adapters import AdapterState
from strategies.base import Round, Strategy, Weighted


def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
    """Weighted mean of every tensor, folded in as updates arrive.

    Args:
        this_round: The round.
        updates: Validated: same keys and shapes, float32.

    Returns:
        A new adapter, float32, summed in float64. The inputs are not modified. Memory: one update
        and the sums (twice an adapter).
    """
    total: dict[str, torch.Tensor] = {}
    weights: list[float] = []
    for update, weight in updates:
        for name, tensor in update.adapter.items():
            if name not in total:
                total[name] = torch.zeros(tensor.shape, dtype=torch.float64)
            total[name].add_(tensor, alpha=weight)
            del tensor
        weights.append(weight)
        del update  # frees memory before the next one arrives
    whole = math.fsum(weights) or 1.0
    return AdapterState({name: (total.pop(name) / whole).float() for name in list(total)})


STRATEGY = Strategy(aggregate=aggregate)
