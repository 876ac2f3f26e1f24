r"""FlexLoRA: the mean of the products, cut back to rank r.

With weights :math:`p_k`, the scale s and the rank-r truncation of a singular value
decomposition,

.. math::
    s B A = \mathrm{SVD}_r\Big(\sum_k p_k s B_k A_k\Big) = U S V^\top

The result is the best rank-r adapter for the exact mean of the products, which fedavg misses. The
paper's ranks by institution are not here: all have one.

A product has many pairs of factors, :math:`A = G V^\top` and :math:`B = U S G^{-1} / s` for any
invertible G. The chosen A is nearest to the mean A. Equal factors of all institutions are therefore
returned as they are, unless their A is below the bound of the next paragraph, and an A that no
institution changed stays, so that a server optimizer sees no step that no institution took. (With
the A nearest to the old A, the growth of A in training would all go into B, round after round.)

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
from strategies.collected import Collected
from strategies.lowrank import truncated_svd
from strategies.products import Product

MIN_SINGULAR_SHARE = 0.01
"""A singular value of an A is at least this share of their root mean square."""


def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
    """The best rank-r approximation of the mean product, layer by layer in float64.

    Args:
        this_round: The round, for rank and old A of its global adapter and the scale.
        updates: Validated, any order. A ``(r, d_in)``, B ``(d_out, r)``; other tensors alike.

    Returns:
        A new adapter of the global adapter's shapes, float32. The product is within 1e-5 (relative,
        Frobenius) of the truncated SVD. Memory: beside the updates (`collected`), a few
        ``(d, sum r_k)`` matrices of one layer; no ``(d_out, d_in)`` matrix.
    """
    everyone, result = Collected(updates), dict[str, torch.Tensor]()
    if not len(everyone):
        return AdapterState({})
    for path, old in this_round.before.layers().items():
        products = everyone.products(this_round, path)
        near = sum(
            (
                share * a.double()
                for share, (_, _, a) in zip(everyone.shares, products, strict=True)
            ),
            start=torch.zeros_like(old.a, dtype=torch.float64),
        )
        pair = truncated(products, near, old.a, this_round.scale(len(old.a)))
        result |= Factors(*pair).named(path)
    for name in this_round.before.only(("magnitude", "head")):
        result[name] = everyone.mean(name)
    return AdapterState(result)


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


STRATEGY = Strategy(aggregate=aggregate)
