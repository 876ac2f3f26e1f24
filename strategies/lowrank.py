"""Low-rank products without the large matrix: the best approximation of a sum of B A."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence

import torch

from fedlora.models.adapters import Factors
from strategies.products import Product

ZERO_SINGULAR_SHARE = 1e-9
"""A singular value below this share of the largest one counts as zero."""


def truncated_svd(products: Sequence[Product], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The leading singular triplets of a sum of products c B A, without computing the sum.

    Stacked, the sum is one product :math:`L R^\top` whose inner dimension is the sum of all ranks.
    With :math:`L = P S` and :math:`R = Q T` (QR) the singular values of the sum are those of the
    small :math:`S T^\top`. A column of S has the length of its column of L and is rounded by that
    length, as in T. A factor whose partner is zero therefore adds nothing, however large it is, and
    a large A beside a small B, or the reverse, costs no precision.

    Args:
        products: At least one.
        rank: The most triplets.

    Returns:
        U ``(d_out, q)``, orthonormal columns, and S V^T ``(q, d_in)``, orthogonal rows by falling
        length, float64; q is at most ``rank``, and less where the sum has a lower rank.
    """
    left, right = _stacked(products)
    p, s = torch.linalg.qr(left)
    q, t = torch.linalg.qr(right.T)
    u, values, vt = torch.linalg.svd(s @ t.T, full_matrices=False)
    used = min(rank, int((values > ZERO_SINGULAR_SHARE * values[0]).sum()))
    return p @ u[:, :used], values[:used, None] * (vt[:used] @ q.T)


def _stacked(products: Sequence[Product]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left ``(d_out, R)`` and right ``(R, d_in)``, float64, whose product is the sum of c B A."""
    _, b, a = products[0]
    ranks = [len(each) for _, _, each in products]
    left = torch.empty(len(b), sum(ranks), dtype=torch.float64)
    right = torch.empty(sum(ranks), a.shape[1], dtype=torch.float64)
    columns, rows = left.split(ranks, 1), right.split(ranks)
    for (c, b, a), column, row in zip(products, columns, rows, strict=True):
        row.copy_(a)
        column.copy_(b).mul_(c)
    return left, right


def recompressed(products: Sequence[Product], bound: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair of factors for a sum of products.

    Args:
        products: At least one.
        bound: The largest rank of the result.

    Returns:
        A ``(R, d_in)`` and B ``(d_out, R)``, float32. Up to the bound the factors are stacked,
        which is exact. Above it they are factors of the nearest product of that rank, each with
        the root of the singular values.
    """
    _, first_b, first_a = products[0]
    bound = min(bound, first_b.shape[0], first_a.shape[1])
    kept = [product for product in products if product[0]]
    if sum(len(a) for _, _, a in kept) <= bound:
        left, right = _stacked(kept)
        return right.float(), left.float()
    u, sv = truncated_svd(kept, bound)
    if not len(sv):  # a factor of rank 0 cannot be sent
        return first_a[:1].clone(), torch.zeros_like(first_b[:, :1])
    root = sv.norm(dim=1).sqrt()
    return (sv / root[:, None]).float(), (u * root).float()


def carried(layer: Factors) -> list[Product]:
    """The residual of a layer as a product, or an empty list."""
    if layer.residual is None:
        return []
    a, b = layer.residual
    return [(1.0, b, a)]
