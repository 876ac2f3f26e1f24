r"""FLoRA: factors are stacked, so their sum is exact, and every round starts fresh factors.

With weights :math:`p_k` and scales :math:`s_k` the sum :math:`\sum_k p_k s_k B_k A_k` is the
product of two stacked matrices. It goes into the layers' residual, a frozen pair of factors that
the base carries: nothing is written into the base, so quantised bases work. Ranks may be
heterogeneous. In each round institutions start from B = 0 and a fresh A, which here all
institutions of a rank share, so that it is part of the order.

A residual above ``Round.residual_rank`` is cut back to the nearest one of that rank; the round's
``aggregation_error`` is then the loss.

DoRA's direction is that of W + residual + s B A: its magnitudes and a head are plain tensors, and
their weighted mean is exact.

Reference: Wang et al. (2024), FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
Low-Rank Adaptations, arXiv 2409.05976.
"""

from collections.abc import Iterable

import torch

from fedlora.models.adapters import AdapterState, Factors, residual_names
from fedlora.models.lora import fresh_a
from fedlora.privacy.streams import RandomSource
from strategies.base import Round, Strategy, Weighted
from strategies.collected import collect
from strategies.lowrank import carried, recompressed


def start(this_round: Round, rank: int) -> AdapterState:
    """Fresh factors of this rank, whose product is zero, beside the residuals of the base."""
    tensors = dict(this_round.before.cut(rank))
    for path, old in this_round.before.layers().items():
        source = RandomSource.seeded("stack", this_round.seed, this_round.number, path)
        a = fresh_a((rank, old.a.shape[1]), source)
        tensors |= Factors(a, old.b.new_zeros(len(old.b), rank)).named(path)
    return AdapterState(tensors)


def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
    """The residuals with the stack of all updates, magnitudes and head; the factors stay.

    Args:
        this_round: The round, for the residuals so far and the scale of every rank r_k.
        updates: Validated, any order. A ``(r_k, d_in)``, B ``(d_out, r_k)``; other tensors alike.

    Returns:
        New residuals, float32, of rank ``Round.residual_rank`` at most; up to that bound they are
        exact but for rounding. Memory: beside the updates (`collected`), a few ``(d, sum r_k)``
        matrices of one layer.
    """
    result: dict[str, torch.Tensor] = {}
    with collect(updates) as everyone:
        if not len(everyone):
            return AdapterState({})
        for path, old in this_round.before.layers().items():
            products = [*carried(old), *everyone.products(this_round, path)]
            pair = recompressed(products, this_round.residual_rank)
            result |= zip(residual_names(path), pair, strict=True)
        for name in this_round.before.only(("magnitude", "head")):
            result[name] = everyone.mean(name)
    return AdapterState(result)


STRATEGY = Strategy(aggregate=aggregate, start=start)
