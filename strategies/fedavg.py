r"""Federated averaging of the factors: :math:`A = \sum_k p_k A_k`, :math:`B = \sum_k p_k B_k`.

Averaging A and B apart is not averaging BA: the difference is a product of the institutions'
deviations, small when they take few local steps from a common start. Magnitudes are averaged too:
DoRA's magnitude is a plain vector and its mean is exact.

Reference: McMahan et al. (2017), arXiv 1602.05629; for LoRA under DP: Liu et al. (2023), DP-LoRA,
arXiv 2312.17493.
"""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from fedlora.arrays import Int64
from fedlora.models.adapters import AdapterState
from strategies.base import Round, Strategy, Weighted

CHUNK = 1 << 16  # values at a time: the scratch arrays stay in the processor's cache


def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
    """Weighted mean of every tensor, folded in as updates arrive.

    Each weighted value is rounded to a multiple of ``Round.grid`` and added to an int64, which is
    exact: the order of arrival changes no bit. The mean is off by at most ``grid / 2`` over the
    mean weight before it is rounded to float32: for 128 institutions 1.4e-14 with uniform weights,
    2e-10 over the mean size otherwise.

    Args:
        this_round: The round, for its grid.
        updates: Validated: same keys and shapes, float32, no weighted value above ``Round.limit``.

    Returns:
        A new adapter, float32. The inputs are not modified. Memory: one update, the sums (twice an
        adapter) and, when the updates are gone, the result.
    """
    total: dict[str, Int64] = {}
    weights: list[float] = []
    for update, weight in updates:
        _fold(total, update.adapter, weight / this_round.grid)
        weights.append(weight)
        del update  # frees memory before the next one arrives
    unit = this_round.grid / (
        math.fsum(weights) or 1.0
    )  # fsum is exact, so no order matters here either
    return AdapterState(
        {name: torch.as_tensor((total.pop(name) * unit).astype(np.float32)) for name in list(total)}
    )


def _fold(total: dict[str, Int64], adapter: AdapterState, scale: float) -> None:
    """Add an adapter to the sums; a loop in the caller would keep its last tensor, and its file."""
    for name, tensor in adapter.items():
        if name not in total:
            total[name] = np.zeros(tensor.shape, np.int64)
        _add(total[name], tensor.numpy(), scale)


def _add(total: Int64, values: npt.NDArray[np.float32], scale: float) -> None:
    """Add ``scale * values``, each rounded to an integer, to ``total`` in place."""
    sums, flat = total.reshape(-1), values.reshape(-1)
    for start in range(0, len(sums), CHUNK):
        term = np.multiply(flat[start : start + CHUNK], scale, dtype=np.float64)
        sums[start : start + CHUNK] += np.rint(term, out=term).astype(np.int64)


STRATEGY = Strategy(aggregate=aggregate)
