"""Low-rank products without the large matrix: the best approximation of a sum of B A."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence

import torch

from fedlora.adapters import Factors
from strategies.products import Product

MIN_SINGULAR_SHARE = 1e-9
"""A singular value below this share of the largest one counts as zero."""


def truncated_svd(products: Sequence[Product], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The leading singular triplets of a sum of products c B A, without computing the sum.

    Stacked, the sum is one product L R whose inner dimension is the sum of all ranks. With
    :math:`R R^\top = W W^\top` (Cholesky) the left singular vectors of L R are those of L W, so the
    eigenvectors of the small :math:`(LW)^\top L W` give their span. Squaring the singular values
    loses precision; the product itself is therefore decomposed within that span. Rows of R are
    normalised to length 1, so that a large A does not hide the product of another.

    Args:
        products: At least one.
        rank: The most triplets.

    Returns:
        U ``(d_out, q)``, orthonormal columns, and S V^T ``(q, d_in)``, orthogonal rows by falling
        length, float64; q is at most ``rank``, and less where the sum has a lower rank.
    """
    left, right = _stacked(products)
    lengths = right.norm(dim=1)
    lengths[lengths == 0] = 1.0
    left *= lengths
    right /= lengths[:, None]
    gram = right @ right.T
    tiny = 1e-13 * float(gram.diagonal().sum())
    if not tiny > 0:
        return left[:, :0], right[:0]
    gram.diagonal().add_(tiny)
    w = torch.linalg.cholesky(gram)
    del gram
    values = w.T @ (left.T @ left) @ w
    vectors = torch.linalg.eigh((values + values.T) / 2)[1][:, -rank:]
    basis = torch.linalg.qr(left @ (w @ vectors))[0]
    u, s, vt = torch.linalg.svd((basis.T @ left) @ right, full_matrices=False)
    used = int((s > MIN_SINGULAR_SHARE * s[0]).sum()) if float(s[0]) > 0 else 0
    return basis @ u[:, :used], s[:used, None] * vt[:used]


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
