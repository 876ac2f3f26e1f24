r"""Lengths and angles of products s B A, from their factors: no ``(d_out, d_in)`` matrix is made.

.. math::
    \langle s_i B_i A_i, s_j B_j A_j \rangle
    = s_i s_j \operatorname{tr}\big((B_i^\top B_j)(A_j A_i^\top)\big)

Two factor pairs with the same product are the same here, whatever their basis. What is no factor
(DoRA's magnitudes, a head) counts as a plain vector beside the products.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedlora.adapters import kind
from strategies.base import Round

Floats = npt.NDArray[np.float64]
Tensors = Callable[[str], Sequence[torch.Tensor]]
"""The tensor of this name of each of n adapters."""


def factors(round: Round, tensors: Tensors) -> Floats:
    """Inner products of n adapters' products s B A, summed over all layers, float64 ``(n, n)``.

    Rounding is 1e-16 of the squared norms, so a distance below 1e-8 of the norms is not told from
    zero.

    Args:
        round: Names of all tensors, and the scale of each rank.
        tensors: Gives A ``(r_k, d_in)`` and B ``(d_out, r_k)``, float32; ranks may differ.
    """
    total: Floats | float = 0.0
    for name in round.before:
        if kind(name) == "A":
            a, b = tensors(name), tensors(name.replace(".lora_A.", ".lora_B."))
            right = torch.cat(list(a)).double()  # (R, d_in)
            left = torch.cat([t.T.double() * round.scale(t.shape[1]) for t in b])  # (R, d_out)
            entries = ((left @ left.T) * (right @ right.T)).numpy()  # (R, R)
            starts = np.cumsum([0, *(len(t) for t in a[:-1])])
            total = total + np.add.reduceat(np.add.reduceat(entries, starts, 0), starts, 1)
    return np.asarray(total)


def vectors(round: Round, tensors: Tensors) -> Floats:
    """Inner products of n adapters' magnitudes and heads, ``(n, n)``; 0 if they have none."""
    total: Floats | float = 0.0
    for name in round.before:
        if kind(name) not in ("A", "B"):
            rows = torch.stack([t.flatten() for t in tensors(name)]).double()
            total = total + (rows @ rows.T).numpy()
    return np.asarray(total)


def changes(inner: Floats) -> Floats:
    """Inner products of the first n - 1 adapters' differences to the last, ``(n - 1, n - 1)``."""
    return inner[:-1, :-1] - inner[:-1, -1:] - inner[-1:, :-1] + inner[-1, -1]


def norms(inner: Floats) -> Floats:
    """Lengths ``(n,)`` from inner products; what rounding made negative is 0."""
    return np.sqrt(np.maximum(np.diagonal(inner), 0.0))
