r"""Lengths and angles of products s B A, from their factors, without ``(d_out, d_in)`` matrices.

.. math::
    \langle s_i B_i A_i, s_j B_j A_j \rangle
    = s_i s_j \operatorname{tr}\big((B_i^\top B_j)(A_j A_i^\top)\big)

Two factor pairs with the same product are the same here, whatever their basis. Tensors other than
factors (DoRA's magnitudes, a head) count as plain vectors beside the products.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fedlora.arrays import Floats
from fedlora.models.adapters import Factors, factor_names
from strategies.base import Round

Tensors = Callable[[str], Sequence[torch.Tensor]]
"""The tensor of this name of each of n adapters."""
Product = tuple[float, torch.Tensor, torch.Tensor]
"""c, B ``(d_out, R)`` and A ``(R, d_in)`` of a product c B A."""


def factors(this_round: Round, tensors: Tensors) -> Floats:
    """Inner products of n adapters' products s B A, summed over all layers, float64 ``(n, n)``.

    Rounding is 1e-16 of the squared norms, so a distance below 1e-8 of the norms cannot be
    distinguished from zero.

    Args:
        this_round: The round, for the names of all tensors and the scale of each rank.
        tensors: Returns A ``(r_k, d_in)`` and B ``(d_out, r_k)``, float32; ranks may differ.
    """
    layers = list(this_round.before.layers())

    def each(number: int) -> list[Product]:
        a, b = (tensors(name) for name in factor_names(layers[number]))
        return [(this_round.scale(len(t)), u, t) for t, u in zip(a, b, strict=True)]

    return inner(len(layers), each)


def product(this_round: Round, layer: Factors) -> Product:
    """A layer's s B A."""
    return this_round.scale(len(layer.a)), layer.b, layer.a


def inner(layers: int, each: Callable[[int], Sequence[Product]]) -> Floats:
    """Inner products of n products, summed over the layers, float64 ``(n, n)``.

    Args:
        layers: The number of layers.
        each: Number of a layer -> its n products.
    """
    total: Floats | float = 0.0
    for number in range(layers):
        found = each(number)
        ranks = [len(a) for _, _, a in found]
        right = torch.cat([a for _, _, a in found]).double()  # (R, d_in)
        left = torch.cat([b.T.double() * c for c, b, _ in found])  # (R, d_out)
        entries = ((left @ left.T) * (right @ right.T)).numpy()  # (R, R)
        starts = np.cumsum([0, *ranks[:-1]])
        total = total + np.add.reduceat(np.add.reduceat(entries, starts, 0), starts, 1)
    return np.asarray(total)


def vectors(
    this_round: Round, tensors: Tensors, parts: Sequence[str] = ("magnitude", "head")
) -> Floats:
    """Inner products of n adapters' tensors of some parts, ``(n, n)``; 0 without such tensors.

    Factors of different ranks count as padded with zeros.
    """
    total: Floats | float = 0.0
    for name in this_round.before.only(parts):
        found = [t.reshape(len(t), -1) for t in tensors(name)]
        shape = (max(t.shape[i] for t in found) for i in (0, 1))
        padded = torch.zeros(len(found), *shape, dtype=torch.float64)
        for place, t in zip(padded, found, strict=True):
            place[: t.shape[0], : t.shape[1]] = t
        padded = padded.flatten(1)
        total = total + (padded @ padded.T).numpy()
    return np.asarray(total)


def changes(inner: Floats, start: Sequence[int]) -> Floats:
    """Inner products of n adapters' changes since their starts, ``(n, n)``.

    Args:
        inner: The inner products of the n adapters and, after them, all starts.
        start: The index of each adapter's start.
    """
    n = len(start)
    pick = np.eye(len(inner))[:n]
    pick[np.arange(n), n + np.asarray(start, dtype=int)] = -1.0
    return pick @ inner @ pick.T


def norms(inner: Floats) -> Floats:
    """Lengths ``(n,)`` from inner products; a square that rounding made negative counts as 0."""
    return np.sqrt(np.maximum(np.diagonal(inner), 0.0))
