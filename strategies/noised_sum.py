r"""The step of DP-SGD on the union of all institutions' records, from the sum of their vectors.

Each vector is an institution's sum of clipped gradients on a grid, plus its share of noise
(`secure.noise_shares`). With the size classes :math:`N_u` of the institutions in the sum, the
sample rate q, the grid's spacing g and the learning rate :math:`\eta`, the new adapter is

.. math:: w - \eta \, \frac{g \sum_u x_u}{q \sum_u N_u}

Reference: Abadi et al. (2016), arXiv 1607.00133; sums of noise shares: Kairouz, Liu and Steinke
(2021), arXiv 2102.06387.
"""

import torch

from fedlora.arrays import Int64
from fedlora.models.adapters import AdapterState


def step(before: AdapterState, total: Int64, scale: float) -> AdapterState:
    r"""Move an adapter against a sum of gradients.

    Args:
        before: The trained parts before the round, float32.
        total: The sum of the vectors, int64 ``(d,)``, the tensors of ``before`` one after another.
        scale: The length of a move for one step of the grid, :math:`\eta g / (q \sum N_u)`.

    Returns:
        A new adapter, computed in float64 and rounded once.
    """
    moved: dict[str, torch.Tensor] = {}
    start = 0
    for name, tensor in before.items():
        part = torch.as_tensor(total[start : start + tensor.numel()]).view(tensor.shape)
        moved[name] = (tensor.double() - scale * part.double()).float()
        start += tensor.numel()
    return AdapterState(moved)
