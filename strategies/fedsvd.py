r"""FedSVD: FFA-LoRA whose shared A becomes orthonormal after every round.

A is frozen during a round; only B is trained and sent. The server takes the mean of the B and
factors its product with A anew, by a singular value decomposition:

.. math::
    \Big(\sum_k p_k B_k\Big) A = U S V^\top, \qquad A' = V^\top, \qquad B' = U S

Both factors go out with the next orders. The product, its rank and its scale stay, so averaging is
exact as with FFA-LoRA, and the norms of DoRA, which read the product only, stay too. Now
:math:`A' A'^\top = I`: a gradient of B is no longer than that of the whole product, and noise on B
is as long in B A as in B. DoRA's magnitude and a head are trained and averaged with B.

The rows of A' span the space of the old A's rows, so no round leaves the space of the first A.
Two orthonormal A of one space differ by a rotation alone, and a step of plain SGD does not see it:
:math:`A^\top A` is the same. After its first factoring FedSVD therefore takes FFA-LoRA's steps,
from an orthonormal A; Adam at the institutions, which takes each coordinate by itself, sees the
rotation.

Reference: Lee et al. (2025), FedSVD: Adaptive Orthogonalization for Private Federated Learning with
LoRA, arXiv 2505.12805.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterable

import torch

from fedlora.models.adapters import AdapterState, Factors
from strategies import fedavg
from strategies.base import Round, Strategy, Weighted


def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
    """The weighted mean of what was sent, with each layer's product in its singular factors.

    Args:
        this_round: Its global adapter gives the A of every update; its grid is fedavg's.
        updates: Validated, any order: B ``(d_out, r)``, magnitudes and head, no A.

    Returns:
        A new adapter with A, B and the other trained parts, float32; empty without updates. A layer
        whose mean B is zero keeps its A to the last bit. Memory: fedavg's, and a few
        ``(d, r)`` matrices of one layer in float64; no ``(d_out, d_in)`` one.
    """
    mean = fedavg.aggregate(this_round, updates)
    if not mean:
        return mean
    result = dict(mean)
    for path, layer in this_round.before.updated(mean).layers().items():
        result |= Factors(*orthonormal(layer.a, layer.b)).named(path)
    return AdapterState(result)


def orthonormal(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Factors of the same product B A, A with orthonormal rows.

    With :math:`A^\top = Q R` the product is :math:`(B R^\top) Q^\top`, and a singular value
    decomposition :math:`U S W^\top` of the narrow :math:`B R^\top` gives :math:`B' = U S` and
    :math:`A' = W^\top Q^\top`. Where B has less than full rank, A' has its r rows still, in the
    space of the old ones, and the columns of B' that go with them are zero to rounding.

    Args:
        a: A ``(r, d_in)``, r at most d_in and d_out.
        b: B ``(d_out, r)``.

    Returns:
        A' ``(r, d_in)`` and B' ``(d_out, r)``, float32, computed in float64; the columns of B' are
        orthogonal, by falling length. For a B of zeros the given factors.
    """
    if not b.any():
        return a, b
    q, r = torch.linalg.qr(a.double().T)  # (d_in, r), (r, r)
    u, s, wt = torch.linalg.svd(b.double() @ r.T, full_matrices=False)
    return (wt @ q.T).float(), (u * s).float()


STRATEGY = Strategy(aggregate=aggregate)
