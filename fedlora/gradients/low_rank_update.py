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

from fedlora.gradients.packing import Packing, Spans


class LowRankUpdate(torch.autograd.Function):
    """``base + s x A^T B^T``, gradients of A and B summed over the batch, or per example or unit.

    Args of ``apply``:
        x: ``(n, ..., d_in)``, any float dtype.
        base: ``(n, ..., d_out)``; the result has its dtype.
        a: float32 ``(r, d_in)``, or ``(units, r, d_in)``.
        b: float32 ``(d_out, r)``, or ``(units, d_out, r)``. Either may be frozen.
        scaling: s.
        unit: The unit of each example ``(n,)`` int64; None when example i is unit i.
        own: Whether units have values of their own; else all have the first unit's. Units whose
            examples are sorted by unit in a packed row are then computed unit by unit.
        row: The packing if ``x`` is one packed row, ``(1, T, d_in)``.
        apart: Round the update to the base's dtype before it is added, as PEFT does on quantised
            bases; on others the sum is rounded once, as PEFT does there.
    """

    # Ten arguments: torch tracks gradients of arguments only, not of what an object holds.
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        x: torch.Tensor,
        base: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        unit: torch.Tensor | None,
        own: bool,
        row: Packing | None,
        apart: bool,
    ) -> torch.Tensor:
        """The sum, ``(n, ..., d_out)``."""
        of: Examples = row or len(x)
        units = max(len(factor) if factor.dim() == 3 else 0 for factor in (a, b))
        if own and units and unit is not None and row is not None:
            spans = row.spans(unit, units)
            of, unit = (of, unit) if spans is None else (spans, None)
        b_t = _values(b, 1, unit, own).mT
        u = _product(x.reshape(-1, x.shape[-1]).float(), _values(a, 0, unit, own).mT, of)
        u *= scaling
        ctx.save_for_backward(x, u, a, b)
        ctx.scaling, ctx.unit, ctx.own, ctx.of = scaling, unit, own, of
        rows = base.reshape(-1, base.shape[-1])
        if apart:
            out = rows + _product(u, b_t, of).to(rows.dtype)
        else:
            out = _product(u, b_t, of, plus=rows.float()).to(rows.dtype)
        # not `view`: of a view autograd forbids changes in place, which some models make
        return torch.ops.aten._unsafe_view(out, base.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of x, base, a and b; None for each that is frozen."""
        x, u, a, b = cast(tuple[torch.Tensor, ...], ctx.saved_tensors)
        for_x, _, for_a, for_b, *_ = cast(tuple[bool, ...], ctx.needs_input_grad)
        of, unit, own = ctx.of, ctx.unit, ctx.own
        g = grads[0].reshape(-1, grads[0].shape[-1]).float()
        grad_x = grad_a = grad_b = None
        if for_x or for_a:
            gu = _product(g, _values(b, 1, unit, own), of)
            gu *= ctx.scaling
            if for_x:
                grad_x = _product(gu, _values(a, 0, unit, own), of).to(x.dtype).view(x.shape)
            if for_a:
                inputs = x.reshape(-1, x.shape[-1])
                grad_a = _factor_gradient(_columns(gu, a.shape[-2]), inputs, of, a, unit)
        if for_b:
            grad_b = _factor_gradient(g, _columns(u, b.shape[-1]), of, b, unit)
        return grad_x, grads[0], grad_a, grad_b, None, None, None, None, None


Examples = Packing | Spans | int
"""Places of examples in a packed row, or of units with values of their own; or a number of examples
of equal length in turn."""


def _product(
    rows: torch.Tensor, factor: torch.Tensor, of: Examples, plus: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows ``(N, p)`` of n examples times a factor ``(p, q)``, or one for each ``(n, p, q)``.

    With `Spans` it is one for each unit.

    Returns:
        ``(N, q)``, with ``plus`` of the same shape added.
    """
    if factor.dim() == 2:
        return rows @ factor if plus is None else torch.addmm(plus, rows, factor)
    if not isinstance(of, int):
        return of.product(rows, factor, plus)
    each = rows.view(of, -1, rows.shape[-1])
    if plus is None:
        return torch.bmm(each, factor).flatten(0, 1)
    return torch.baddbmm(plus.view(of, -1, plus.shape[-1]), each, factor).flatten(0, 1)


def _values(
    factor: torch.Tensor, rank_dim: int, unit: torch.Tensor | None, own: bool
) -> torch.Tensor:
    """A factor's values, padded with zeros to a rank of 8, 16, ...

    Products with fewer columns are computed by kernels that treat rows differently by their place
    in a batch, so that a row's result would depend, in its last bits, on the others.

    Returns:
        ``(p, q)``, or where units have their own ``(n, p, q)``, each example's.
    """
    values = factor
    if factor.dim() == 3:
        values = factor[0] if not own else factor if unit is None else factor[unit]
    rank_dim -= 2
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
    left: torch.Tensor,
    right: torch.Tensor,
    of: Examples,
    factor: torch.Tensor,
    unit: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of a factor: per unit if it is expanded, else summed over all rows."""
    p, q = factor.shape[-2:]
    if factor.dim() == 2:
        return (left.float().T @ right.float())[:p, :q]
    if not isinstance(of, int):
        each = of.outer(left, right)
    else:
        each = torch.bmm(_each(left, of).mT, _each(right, of))
    each = each[:, :p, :q]
    if unit is None:
        return each
    return each.new_zeros(factor.shape).index_add_(0, unit, each)


def _each(rows: torch.Tensor, n: int) -> torch.Tensor:
    """``(n * t, p)`` as float32 ``(n, t, p)``."""
    return rows.float().view(n, -1, rows.shape[-1])
