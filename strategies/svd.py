r"""FlexLoRA: the mean of the products, cut back to rank r.

With weights :math:`p_k`, scales :math:`s_k` and the rank-r truncation of a singular value
decomposition,

.. math::
    s B A = \mathrm{SVD}_r\Big(\sum_k p_k s_k B_k A_k\Big) = U S V^\top

The result is the best rank-r adapter for the exact mean of the products, which fedavg misses. Ranks
may be heterogeneous: the part of the global product that an institution was not sent is then added
to its update, so that an institution without training changes nothing. (The paper does not add it,
which shrinks the global product.)

A product has many pairs of factors, :math:`A = G V^\top` and :math:`B = U S G^{-1} / s` for any
invertible G. The chosen A is nearest to the mean A: the old A plus the mean of the institutions'
changes of A. Equal factors of all institutions are therefore returned as they are, unless their A
is below the bound of the next paragraph, and an A that no institution changed stays, so that a
server optimizer sees no step that no institution took. (With the A nearest to the old A, the growth
of A in training would all go into B, round after round.)

The i-th singular value of the new A is at least that of the old A, or half of the old A's root mean
square singular value if that is less: B stays of a size from which it can be trained further. A
direction that the mean does not use keeps an A from the row space of the mean A, and B = 0 there,
so that it can still be learned.

DoRA's magnitudes and a head are plain tensors: their weighted mean.

Reference: Bai et al. (2024), Federated Fine-tuning of Large Language Models under Heterogeneous
Tasks and Client Resources (FlexLoRA), arXiv 2402.11505.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Iterable, Sequence

import torch

from fedlora.models.adapters import AdapterState, Factors
from strategies.base import Round, Strategy, Weighted
from strategies.collected import Collected, collect
from strategies.lowrank import truncated_svd
from strategies.products import Product, product

MIN_SINGULAR_SHARE = 0.01
"""A singular value of an A is at least this share of their root mean square."""


def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
    """The best rank-r approximation of the mean product, layer by layer in float64.

    Args:
        this_round: The round, for rank and old A of its global adapter and the scale of every r_k.
        updates: Validated, any order. A ``(r_k, d_in)``, B ``(d_out, r_k)``; other tensors alike.

    Returns:
        A new adapter of the global adapter's shapes, float32. The product is within 1e-5 (relative,
        Frobenius) of the truncated SVD. Memory: beside the updates (`collected`), a few
        ``(d, sum r_k)`` matrices of one layer; no ``(d_out, d_in)`` matrix.
    """
    result: dict[str, torch.Tensor] = {}
    with collect(updates) as everyone:
        if not len(everyone):
            return AdapterState({})
        for path, old in this_round.before.layers().items():
            products = everyone.products(this_round, path)
            near = _mean_a(this_round, everyone, path, [a for _, _, a in products])
            products += _unsent(this_round, everyone, path)
            pair = truncated(products, near, old.a, this_round.scale(len(old.a)))
            result |= Factors(*pair).named(path)
        for name in this_round.before.only(("magnitude", "head")):
            result[name] = everyone.mean(name)
    return AdapterState(result)


def _mean_a(
    this_round: Round, everyone: Collected, path: str, sent: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The old A ``(r, d_in)`` plus the mean of the institutions' changes of it, float64."""
    starts, of = this_round.starts(everyone.institutions)
    near = this_round.before.factors(path).a.double()
    for share, number, a in zip(everyone.shares, of, sent, strict=True):
        near[: len(a)] += share * (a.double() - starts[number].factors(path).a.double())
    return near


def _unsent(this_round: Round, everyone: Collected, path: str) -> list[Product]:
    """The parts of the global product that institutions of lower ranks were not sent, by shares.

    Added to an update, its part leaves the institution's change: none without training.
    """
    starts, of = this_round.starts(everyone.institutions)
    found: list[Product] = []
    for number, state in enumerate(starts):
        share = math.fsum(s for s, i in zip(everyone.shares, of, strict=True) if i == number)
        if state is not this_round.before and share:
            for sign, each in ((1.0, this_round.before), (-1.0, state)):
                scale, b, a = product(this_round, each.factors(path))
                found.append((sign * share * scale, b, a))
    return found


def start(this_round: Round, rank: int) -> AdapterState:
    """The best approximation of that rank of the global product, as factors with its own scale."""
    before = this_round.before
    if rank == before.rank:
        return before
    cut = dict(before)
    for path, old in before.layers().items():
        first = old.a[:rank]
        pair = truncated([product(this_round, old)], first, first, this_round.scale(rank))
        cut |= Factors(*pair).named(path)
    return AdapterState(cut)


def truncated(
    products: Sequence[Product], near: torch.Tensor, old: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Factors of rank r of :math:`\frac1s \sum_k c_k B_k A_k` whose A is nearest to a given one.

    Args:
        products: c_k, B_k ``(d_out, r_k)``, A_k ``(r_k, d_in)`` each; at least one.
        near: The given A, ``(r, d_in)``.
        old: The old A, ``(r, d_in)``; its singular values bound those of the new A from below.
        scale: The s of the result.

    Returns:
        A ``(r, d_in)`` and B ``(d_out, r)``, float32.
    """
    u, sv = truncated_svd(products, near.shape[0])  # (d_out, used), (used, d_in)
    used = len(sv)
    s = sv.norm(dim=1)
    near = near.double()
    v = _completed(sv / s[:, None], near)
    p, g, t = torch.linalg.svd(near @ v.T, full_matrices=False)  # G = p g t, (r, len(v))
    size = float(old.norm()) / math.sqrt(len(old)) or 1.0
    g = g.maximum(torch.linalg.svdvals(old.double()).clamp(size * MIN_SINGULAR_SHARE, size / 2))
    new_b = (u * s) @ (t.T / g @ p.T)[:used] / scale
    return ((p * g) @ t @ v).float(), new_b.float()


def _completed(v: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Rows of ``v``, orthonormal, and more from the rows of ``near`` until there are as many."""
    missing = min(near.shape) - len(v)
    if not missing:
        return v
    rest = near - (near @ v.T) @ v
    return torch.cat([v, torch.linalg.svd(rest, full_matrices=False)[2][:missing]])


STRATEGY = Strategy(aggregate=aggregate, start=start)
