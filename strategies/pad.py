r"""HetLoRA: heterogeneous ranks, by truncation and zero-padding.

An institution of rank k starts from the first k rows of the global A and columns of the global B.
Its change of them is padded with zeros to the global rank, and then factors are averaged as in
fedavg. B carries the ratio of the scales, so that s_k B_k A_k is the institution's own product.

The paper pads the factors themselves, so a row that a share q of the institutions holds is
multiplied by q in every round, whatever they learn. Here the change is padded, so an institution
without a row does not influence it.

DoRA's magnitudes and a head are plain tensors: their weighted mean.

Reference: Cho et al. (2024), Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
Models (HetLoRA), arXiv 2401.06432.
"""

import dataclasses
from collections.abc import Iterable

import torch

from fedlora.adapters import AdapterState, Factors, factor_names
from strategies import fedavg
from strategies.base import Round, Strategy, Weighted


def start(this_round: Round, rank: int) -> AdapterState:
    """The first ``rank`` rows and columns of the global factors, under the scale of that rank."""
    if rank == this_round.before.rank:
        return this_round.before
    return _scaled(
        this_round.before.cut(rank),
        this_round.scale(this_round.before.rank) / this_round.scale(rank),
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
    before = this_round.before
    if state.rank == before.rank:
        return state
    state = _scaled(state, this_round.scale(state.rank) / this_round.scale(before.rank))
    padded = dict(state)
    for path, own in state.layers().items():
        whole, rank = before.factors(path), len(own.a)
        a = torch.cat([own.a, whole.a[rank:]])
        b = torch.cat([own.b, whole.b[:, rank:]], 1)
        padded |= Factors(a, b).named(path)
    return AdapterState(padded)


def _scaled(state: AdapterState, factor: float) -> AdapterState:
    """The adapter with its B times a factor."""
    scaled = {factor_names(path)[1]: layer.b * factor for path, layer in state.layers().items()}
    return state.updated(scaled)


STRATEGY = Strategy(aggregate=aggregate, start=start)
