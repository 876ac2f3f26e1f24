r"""FedEx-LoRA: fedavg, with the rest of the exact mean in a frozen residual of the layer.

The mean of the products is the product of the means and a rest of low rank,

.. math::
    \sum_k p_k s B_k A_k = s \bar B \bar A + \Big(\sum_k p_k s B_k A_k - s \bar B \bar A\Big)

Institutions continue from the mean factors on a layer that carries the rest. Nothing is written
into the base, so quantised bases work. A residual above `RESIDUAL_RANK` is cut back to the nearest
one of that rank.

DoRA's direction is that of W + residual + s B A: its magnitudes and a head are plain tensors, and
their weighted mean is exact.

Reference: Singhal et al. (2024), FedEx-LoRA: Exact Aggregation for Federated and Efficient
Fine-Tuning of Foundation Models, arXiv 2410.09432.
"""

from collections.abc import Iterable

from fedlora.config.sections import RESIDUAL_RANK
from fedlora.models.adapters import AdapterState, residual_names
from strategies import fedavg
from strategies.base import Round, Strategy, Weighted
from strategies.collected import Collected
from strategies.lowrank import carried, recompressed
from strategies.products import product


def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
    """The mean of every tensor, and residuals with the rest of the mean product.

    Args:
        this_round: The round; its global adapter has the residuals so far, its scale is the s of
            s B A.
        updates: Validated, any order; same keys and shapes.

    Returns:
        A new adapter with residuals, float32, of rank `RESIDUAL_RANK` at most; up to that
        bound its product is exact but for rounding. Memory: beside the updates (`collected`), the
        sums of fedavg, and a few ``(d, sum r_k)`` matrices of one layer.
    """
    everyone = Collected(updates)
    if not len(everyone):
        return AdapterState({})
    mean = fedavg.aggregate(this_round, everyone.weighted(everyone.weights))
    result = dict(mean)
    for path, layer in mean.layers().items():
        scale, b, a = product(this_round, layer)
        old = carried(this_round.before.factors(path))
        products = [*old, *everyone.products(this_round, path), (-scale, b, a)]
        result |= zip(residual_names(path), recompressed(products, RESIDUAL_RANK), strict=True)
    return AdapterState(result)


STRATEGY = Strategy(aggregate=aggregate)
