r"""Federated averaging of the factors: :math:`A = \sum_k p_k A_k`, :math:`B = \sum_k p_k B_k`.

Averaging A and B apart is not averaging BA: the difference is a product of the institutions'
deviations, small when they take few local steps from a common start. Magnitudes are averaged alike:
DoRA's is a plain vector and its mean is exact.

Reference: McMahan et al. (2017), arXiv 1602.05629; for LoRA under DP: Liu et al. (2023), DP-LoRA,
arXiv 2312.17493.
"""

from collections.abc import Sequence

import torch

from fedlora.adapters import AdapterState
from fedlora.wire import ClientUpdate
from strategies.base import Strategy


def aggregate(updates: Sequence[ClientUpdate], weights: Sequence[float]) -> AdapterState:
    """Weighted mean of every tensor, summed in float64 in the order given.

    Args:
        updates: At least one; same keys and shapes, float32.
        weights: One each, summing to 1.

    Returns:
        A new adapter, float32. The inputs are not modified.
    """
    total = {
        name: torch.zeros(t.shape, dtype=torch.float64) for name, t in updates[0].adapter.items()
    }
    for update, weight in zip(updates, weights, strict=True):
        for name, tensor in update.adapter.items():
            total[name].add_(tensor.double(), alpha=weight)
    return AdapterState({name: tensor.float() for name, tensor in total.items()})


STRATEGY = Strategy(aggregate=aggregate, reference="arXiv 2312.17493")
