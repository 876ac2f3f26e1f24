r"""FLoRA: factors are stacked, so their sum is exact, and every round starts fresh factors.

With weights :math:`p_k` and the scale s the sum :math:`\sum_k p_k s B_k A_k` is the
product of two stacked matrices. It goes into the layers' residual, a frozen pair of factors that
the base carries: nothing is written into the base, so quantised bases work. In each
round institutions start from B = 0 and a fresh A, which here all share, so that it is part of the
order.

A residual above `RESIDUAL_RANK` is cut back to the nearest one of that rank.

DoRA's direction is that of W + residual + s B A: its magnitudes and a head are plain tensors, and
their weighted mean is exact.

Reference: Wang et al. (2024), FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
Low-Rank Adaptations, arXiv 2409.05976.
"""

from collections.abc import Iterable

import torch

from fedlora.config.sections import RESIDUAL_RANK
from fedlora.models.adapters import AdapterState, Factors, residual_names
from fedlora.models.lora import fresh_a
from fedlora.privacy.streams import RandomSource
from strategies.base import Round, Strategy, Weighted
from strategies.collected import Collected
from strategies.lowrank import carried, recompressed


def start(this_round: Round) -> AdapterState:
    """Fresh factors, whose product is zero, beside the residuals of the base."""
    tensors = dict(this_round.before)
    for path, old in this_round.before.layers().items():
        source = RandomSource.seeded("stack", this_round.seed, this_round.number, path)
        fresh = Factors(fresh_a(tuple(old.a.shape), source), torch.zeros_like(old.b))
        tensors |= fresh.named(path)
    return AdapterState(tensors)


def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
    """The residuals with the stack of all updates, magnitudes and head; the factors stay.

    Args:
        this_round: The round, for the residuals so far and the scale.
        updates: Validated, any order. A ``(r, d_in)``, B ``(d_out, r)``; other tensors alike.

    Returns:
        New residuals, float32, of rank `RESIDUAL_RANK` at most; up to that bound they are
        exact but for rounding. Memory: beside the updates (`collected`), a few ``(d, sum r_k)``
        matrices of one layer.
    """
    everyone, result = Collected(updates), dict[str, torch.Tensor]()
    if not len(everyone):
        return AdapterState({})
    for path, old in this_round.before.layers().items():
        products = [*carried(old), *everyone.products(this_round, path)]
        result |= zip(residual_names(path), recompressed(products, RESIDUAL_RANK), strict=True)
    for name in this_round.before.only(("magnitude", "head")):
        result[name] = everyone.mean(name)
    return AdapterState(result)


STRATEGY = Strategy(aggregate=aggregate, start=start)
