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
        this_round: The round, for the names of all tensors and the scale.
        tensors: Returns A ``(r_k, d_in)`` and B ``(d_out, r_k)``, float32.
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
    """Inner products of n adapters' tensors of some parts, ``(n, n)``; 0 without such tensors."""
    total: Floats | float = 0.0
    for name in this_round.before.only(parts):
        rows = torch.stack([t.flatten() for t in tensors(name)]).double()
        total = total + (rows @ rows.T).numpy()
    return np.asarray(total)


def changes(inner: Floats) -> Floats:
    """Inner products of n adapters' changes since their start, ``(n, n)``.

    Args:
        inner: The inner products of the n adapters and, after them, the start.
    """
    return inner[:-1, :-1] - inner[:-1, -1:] - inner[-1:, :-1] + inner[-1, -1]
