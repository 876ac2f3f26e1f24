r"""HetLoRA: heterogeneous ranks, by truncation and zero-padding.

An institution of rank k starts from the first k rows of the global A and columns of the global B,
with B times s / s_k, so that the product s_k B_k A_k is that of the global factors. Its change is
padded with zeros to the global rank, and then factors are averaged as in fedavg.

The gradient of B_k is s_k / s times that of the same columns under the global scale s, and so is a
step. The change of B_k therefore counts s / s_k times: it is then the step that an institution of
the global scale would take. The ratio the other way round would restore the institution's own
product, but a step of half the rank would count four times as much as one of the whole rank, and
its noise twice as much.

That is exact for a step of SGD. A step of Adam or AdamW does not grow with the gradient, and still
counts s / s_k times: an institution of half the rank takes half the step in B (under rsLoRA 0.71 of
it). In A, where it sees the global gradient, it takes the whole step under both.

The paper pads the factors themselves, so a row that a share q of the institutions holds is
multiplied by q in every round, whatever they learn. Here the change is padded: an institution
without a row counts with its weight as no change of it.

The paper's pruning of ranks by the institutions themselves and its weights by the norm of their
products are not here: ranks are fixed, and weights are the run's.

DoRA's magnitudes and a head are plain tensors: their weighted mean.

Reference: Cho et al. (2024), Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
Models (HetLoRA), arXiv 2401.06432.
"""

import dataclasses
from collections.abc import Iterable

import torch

from fedlora.models.adapters import AdapterState, Factors, factor_names
from strategies import fedavg
from strategies.base import Round, Strategy, Weighted


def start(this_round: Round, rank: int) -> AdapterState:
    """The first ``rank`` rows and columns of the global factors, under the scale of that rank."""
    if rank == this_round.before.rank:
        return this_round.before
    part, ratio = this_round.before.cut(rank), _ratio(this_round, rank)
    return part.updated(
        {factor_names(path)[1]: layer.b * ratio for path, layer in part.layers().items()}
    )


def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
    """Weighted mean of every tensor, with the global adapter's values for rows that one lacks.

    Args:
        this_round: The round, whose global adapter pads.
        updates: Validated, any order. A ``(r_k, d_in)``, B ``(d_out, r_k)``; other tensors alike.

    Returns:
        A new adapter of the global adapter's shapes, float32. Memory as `fedavg`.
    """
    padded = (
        (dataclasses.replace(update, adapter=_padded(this_round, update.adapter)), weight)
        for update, weight in updates
    )
    return fedavg.aggregate(this_round, padded)


def _padded(this_round: Round, state: AdapterState) -> AdapterState:
    before, rank = this_round.before, state.rank
    if rank == before.rank:
        return state
    ratio, padded = _ratio(this_round, rank), dict(state)
    for path, own in state.layers().items():
        whole = before.factors(path)
        first = whole.b[:, :rank]
        a = torch.cat([own.a, whole.a[rank:]])
        b = torch.cat([first + ratio * (own.b - ratio * first), whole.b[:, rank:]], 1)
        padded |= Factors(a, b).named(path)
    return AdapterState(padded)


def _ratio(this_round: Round, rank: int) -> float:
    """The global scale over that of a rank, at most 1."""
    return this_round.scale(this_round.before.rank) / this_round.scale(rank)


STRATEGY = Strategy(aggregate=aggregate, start=start)
