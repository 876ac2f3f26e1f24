r"""Institution-level DP: noise hides the influence of an institution's whole data.

With updates :math:`\Delta_k = w_k - w`, each clipped to norm C, and m institutions that answered,

.. math::
    w' = w + \frac1m \Big(\sum_k \Delta_k \min(1, C / |\Delta_k|)
    + \mathcal N(0, \sigma^2 C^2 I)\Big)

Guarantee: w' is one Gaussian mechanism of noise multiplier sigma under replacing one institution's
update by zero; participation, and so m, is public. The guarantee holds against observers of global
adapters, not against the server, which sees the updates. Weights are equal: a larger weight would
raise an institution's influence above C / m. The noise is added to the sum, so a smaller cohort
than planned has more noise in its mean, never less. What voids the guarantee: a seed that others
know.

Reference: McMahan et al. (2018), Learning Differentially Private Recurrent Language Models,
arXiv 1710.06963; zero-out adjacency: Kairouz et al. (2021), arXiv 2103.00039.
"""

from collections.abc import Sequence

import torch

from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState
from fedlora.privacy.noise_grid import on_grid
from fedlora.privacy.streams import RandomSource
from fedlora.wire.messages import ClientUpdate


def aggregate(
    before: AdapterState,
    updates: Sequence[ClientUpdate],
    *,
    max_norm: float,
    noise_multiplier: float,
    answered: int,
    source: RandomSource,
) -> AdapterState:
    """The noised mean of clipped updates.

    Args:
        before: The global adapter from which the institutions started.
        updates: At least one, validated (finite, same keys and shapes), sorted by institution.
        max_norm: C, over all tensors of an update together (L2).
        noise_multiplier: sigma > 0.
        answered: m, at least the number of updates: an invalid answer counts as zero, so that m
            does not reveal whether an answer was valid.
        source: The random source of the noise; fresh for every round.

    Returns:
        A new adapter, float32. Sums and noise are float64, rounded to one grid before the mean.

    Raises:
        Refusal: ``guard-no-noise`` for a noise multiplier that is not above 0.
    """
    if not noise_multiplier > 0:
        raise Refusal(
            "guard-no-noise", f"noise multiplier is {noise_multiplier}; DP needs one above 0"
        )
    total = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in before.items()}
    for update in updates:
        delta = {name: update.adapter[name].double() - t.double() for name, t in before.items()}
        norm = float(torch.stack([t.square().sum() for t in delta.values()]).sum().sqrt())
        share = min(1.0, max_norm / norm) if norm > 0 else 0.0
        for name, tensor in delta.items():
            total[name].add_(tensor, alpha=share)
    noise = torch.as_tensor(source.normal(sum(t.numel() for t in total.values())))
    deviation = noise_multiplier * max_norm
    start, result = 0, dict[str, torch.Tensor]()
    for name, tensor in total.items():
        part = noise[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
        noised = on_grid(tensor + deviation * part, deviation)
        result[name] = (before[name].double() + noised / answered).float()
    return AdapterState(result)
