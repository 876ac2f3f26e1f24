r"""The low-rank update of a layer's output, with gradients of A and B per example.

With ``u = s x A^T`` the update of example i is ``u_i B^T``, and for its output gradient ``g_i``

    dB_i = g_i^T u_i        dA_i = s (g_i B)^T x_i        dx_i = s (g_i B) A

so the forward is one product for the whole batch, and only dA and dB are computed per example, in
batched products of as many operations as their sum. Inputs are kept in the base's dtype; the update
is computed in float32.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from typing import Any, cast

import torch
import torch.nn.functional as F

from fedlora.gradients.packing import Packing


class LowRankUpdate(torch.autograd.Function):
    """``base + s x A^T B^T``, gradients of A and B summed over the batch, or per example.

    Args of ``apply``:
        x: ``(n, ..., d_in)``, any float dtype.
        base: ``(n, ..., d_out)``; the result has its dtype.
        a: float32 ``(r, d_in)``, or ``(n, r, d_in)`` with equal values for each example.
        b: float32 ``(d_out, r)``, or ``(n, d_out, r)``. Either may be frozen.
        scaling: s.
        row: The packing if ``x`` is one packed row, ``(1, T, d_in)``.
        apart: Round the update to the base's dtype before it is added, as PEFT does on quantised
            bases; on others the sum is rounded once, as PEFT does there.
    """

    # torch tracks gradients of arguments only, not of what an object holds
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        row: Packing | None,
        apart: bool,
    ) -> torch.Tensor:
        """The sum, ``(n, ..., d_out)``."""
        u = x.reshape(-1, x.shape[-1]).float() @ _values(a, -2).mT
        u *= scaling
        ctx.save_for_backward(x, u, a, b)
        ctx.scaling, ctx.row = scaling, row
        rows, b_t = base.reshape(-1, base.shape[-1]), _values(b, -1).mT
        if apart:
            out = rows + (u @ b_t).to(rows.dtype)
        else:
            out = torch.addmm(rows.float(), u, b_t).to(rows.dtype)
        # not `view`: of a view autograd forbids changes in place, which some models make
        return torch.ops.aten._unsafe_view(out, base.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of x, base, a and b; None for each that is frozen."""
        x, u, a, b = cast(tuple[torch.Tensor, ...], ctx.saved_tensors)
        for_x, _, for_a, for_b, *_ = cast(tuple[bool, ...], ctx.needs_input_grad)
        g = grads[0].reshape(-1, grads[0].shape[-1]).float()
        of: Packing | int = ctx.row or len(x)
        grad_x = grad_a = grad_b = None
        if for_x or for_a:
            gu = g @ _values(b, -1)
            gu *= ctx.scaling
            if for_x:
                grad_x = (gu @ _values(a, -2)).to(x.dtype).view(x.shape)
            if for_a:
                inputs = x.reshape(-1, x.shape[-1])
                grad_a = _factor_gradient(_columns(gu, a.shape[-2]), inputs, of, a)
        if for_b:
            grad_b = _factor_gradient(g, _columns(u, b.shape[-1]), of, b)
        return grad_x, grads[0], grad_a, grad_b, None, None, None


def _values(factor: torch.Tensor, rank_dim: int) -> torch.Tensor:
    """A factor's values ``(p, q)``, padded with zeros to a rank of 8, 16, ...

    Products with fewer columns are computed by kernels that treat rows differently by their place
    in a batch, so that a row's result would depend, in its last bits, on the others.
    """
    values = factor[0] if factor.dim() == 3 else factor
    missing = -values.shape[rank_dim] % 8
    if not missing:
        return values
    return F.pad(values, (0, 0, 0, missing) if rank_dim == -2 else (0, missing))


def _columns(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """The first columns of rows that are padded as `_values` are.

    Of rank 1 all: products of one column are computed by a kernel whose last bits depend on the
    place in a batch. The other columns are zeros, and the gradient is cut to the factor's shape.
    """
    return rows[:, :rank] if rank > 1 else rows


def _factor_gradient(
    left: torch.Tensor, right: torch.Tensor, of: Packing | int, factor: torch.Tensor
) -> torch.Tensor:
    """Gradient of a factor: per example if it is expanded, else summed over all rows.

    ``of`` is the packing, or the number of examples of equal length in turn.
    """
    p, q = factor.shape[-2:]
    if factor.dim() == 2:
        return (left.float().T @ right.float())[:p, :q]
    if isinstance(of, int):
        left, right = (rows.float().view(of, -1, rows.shape[-1]) for rows in (left, right))
        return torch.bmm(left.mT, right)[:, :p, :q]
    return of.outer(left, right)[:, :p, :q]
