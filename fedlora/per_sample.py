r"""Exact per-example gradients for LoRA, rsLoRA and DoRA on any frozen base.

Opacus records activations with hooks, which fails for DoRA. Here the forward of each trained layer
is replaced, and in expanded mode a leaf of shape ``(units, *shape)`` takes the place of every
trained parameter, so that autograd keeps its gradient per unit. The base layer is only called,
never inspected, so quantised bases work too.

With ``u = s x A^T`` the low-rank update of example i is ``u_i B^T``, and for its output gradient
``g_i``

    dB_i = g_i^T u_i        dA_i = s (g_i B)^T x_i        dx_i = s (g_i B) A

so the forward is one product for the whole batch, and only dA and dB are made per example (batched
products of the same number of operations as their sum). Inputs are kept in the base's dtype and the
update is computed in float32.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from fedlora.adapters import ADAPTER, frozen_weight, is_linear, is_quantized, residual
from fedlora.encoder import HEAD
from fedlora.errors import Refusal
from fedlora.packing import Packing, active
from fedlora.streams import RandomSource


class _LowRankUpdate(torch.autograd.Function):
    """``base + s x A^T B^T``, gradients of A and B summed over the batch, or per example or unit.

    Args of ``apply``:
        x: ``(n, ..., d_in)``, any float dtype.
        base: ``(n, ..., d_out)``; the result has its dtype.
        a: float32 ``(r, d_in)``, or ``(units, r, d_in)``.
        b: float32 ``(d_out, r)``, or ``(units, d_out, r)``. Either may be frozen.
        scaling: s.
        unit: The unit of each example ``(n,)`` int64; None when example i is unit i.
        own: Whether units may have other values than the first.
        row: The places of the examples if ``x`` is one packed row, ``(1, T, d_in)``.
        apart: Round the update to the base's dtype before it is added, as PEFT does on quantised
            bases; on others the sum is rounded once, as PEFT does there.
    """

    # Ten arguments: torch tracks gradients of arguments only, not of an object's contents.
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
        of, b_t = row or len(x), _values(b, 1, unit, own).mT
        u = _product(x.reshape(-1, x.shape[-1]).float(), _values(a, 0, unit, own).mT, of)
        u *= scaling
        ctx.save_for_backward(x, u, a, b)
        ctx.scaling, ctx.unit, ctx.own, ctx.of = scaling, unit, own, of
        rows = base.reshape(-1, base.shape[-1])
        if apart:
            out = rows + _product(u, b_t, of).to(rows.dtype)
        else:
            out = _product(u, b_t, of, plus=rows.float()).to(rows.dtype)
        return out.view(base.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
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
                grad_a = _factor_gradient(gu[:, : a.shape[-2]], inputs, of, a, unit)
        if for_b:
            grad_b = _factor_gradient(g, u[:, : b.shape[-1]], of, b, unit)
        return grad_x, grads[0], grad_a, grad_b, None, None, None, None, None


Examples = Packing | int
"""The places of examples: those of a packed row, or equal lengths one after the other."""


def _product(
    rows: torch.Tensor, factor: torch.Tensor, of: Examples, plus: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows ``(N, p)`` of n examples times one factor ``(p, q)``, or times their own ``(n, p, q)``.

    Returns:
        ``(N, q)``, with ``plus`` of the same shape added.
    """
    if factor.dim() == 2:
        return rows @ factor if plus is None else torch.addmm(plus, rows, factor)
    if isinstance(of, Packing):
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


def _factor_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    of: Examples,
    factor: torch.Tensor,
    unit: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of a factor: per unit if the factor is expanded, else summed over all rows."""
    if factor.dim() == 2:
        return left.float().T @ right.float()
    if isinstance(of, Packing):
        each = of.outer(left, right)
    else:
        each = torch.bmm(_each(left, of).mT, _each(right, of))
    if unit is None:
        return each
    return each.new_zeros(factor.shape).index_add_(0, unit, each)


def _each(rows: torch.Tensor, n: int) -> torch.Tensor:
    """``(n * t, p)`` as float32 ``(n, t, p)``."""
    return rows.float().view(n, -1, rows.shape[-1])


@dataclass
class _Mode:
    """The state that all trained layers of one model share in their forward.

    Args:
        leaves: Parameter -> its leaf ``(units, *shape)``; empty in plain mode.
        examples: The first dimension of every input.
        unit: Unit of each example ``(examples,)``; None when example i is unit i.
        own: Whether units have different values.
        rows: The random source of the dropout of each example in a batch; empty: no dropout.
    """

    leaves: dict[nn.Parameter, torch.Tensor]
    examples: int = 0
    unit: torch.Tensor | None = None
    own: bool = False
    rows: Sequence[RandomSource] = ()

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The leaf of a parameter, or in plain mode the parameter."""
        return self.leaves.get(parameter, parameter)

    def by_example(self, parameter: nn.Parameter) -> torch.Tensor:
        """A row for each example ``(examples, *shape)``: of the leaf, or of a frozen parameter."""
        if parameter not in self.leaves:
            return parameter.expand(self.examples, *parameter.shape)
        leaf = self.leaves[parameter]
        return leaf if self.unit is None else leaf[self.unit]

    def check(self, name: str, x: torch.Tensor, flat: bool) -> None:
        """Refuse an input in which an example is not one entry of the first dimension.

        A packed row gives the places of its examples, and only pooled inputs have an entry for each
        of them. Shapes can fit by coincidence: `fedlora.exactness` has shown, at a size where they
        cannot, that the first dimension of this layer's input is that of examples.
        """
        row = active()
        fits = x.shape[0] == self.examples and (x.dim() >= 3 or flat)
        if row is not None:
            fits = row.examples == self.examples and (
                x.shape[:-1] == (self.examples,) if flat else x.shape[:-1] == (1, row.total)
            )
        if self.leaves and not fits:
            raise Refusal(
                "guard-batch-coupled",
                f"{name} got an input of shape {tuple(x.shape)} for {self.examples} "
                "examples; per-example gradients need inputs (examples, tokens, features): choose "
                "other adapter.target-modules",
            )


def dropout_mask(source: RandomSource, shape: Sequence[int], rate: float) -> torch.Tensor:
    """Draw a mask, float32 of ``shape``: 0 with probability ``rate``, else 1 / (1 - rate).

    The probability is exact to 1 / 65536.
    """
    n = math.prod(shape)
    kept = source.words(-(-n // 4)).view(np.uint16)[:n] >= round(rate * 65536)
    return torch.from_numpy(kept.astype(np.float32) / np.float32(1 - rate)).view(*shape)


class _AdaptedLayer:
    """The forward of a linear layer with low-rank factors, equal to PEFT's."""

    def __init__(self, name: str, layer: LoraLayer, mode: _Mode) -> None:
        self.name, self.layer, self.mode = name, cast(Any, layer), mode
        self.base = layer.get_base_layer()
        self.apart = is_quantized(self.base)
        self.dropout = cast(float, getattr(layer.lora_dropout[ADAPTER], "p", 0.0))
        self.flat = name.rpartition(".")[2] == HEAD  # pooled: one row for each example
        self.a = cast(nn.Parameter, layer.lora_A[ADAPTER].weight)
        self.b = cast(nn.Parameter, layer.lora_B[ADAPTER].weight)
        self.magnitude: nn.Parameter | None = None
        if ADAPTER in layer.lora_magnitude_vector:
            self.magnitude = cast(nn.Parameter, layer.lora_magnitude_vector[ADAPTER].weight)
        # Of which A, B and residual (which is replaced, never changed).
        self._norm: tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor] | None = None

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.a, self.b, self.magnitude) if p is not None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.layer.disable_adapters:
            return cast(torch.Tensor, self.base(x))
        result = self._frozen(x)
        self.mode.check(self.name, x, self.flat)
        dropped = None
        if self.dropout and self.mode.rows:
            dropped = x.float() * self._masks(x)
        if self.magnitude is None:
            return self._update(x if dropped is None else dropped, result)
        return self._dora(x, dropped, result, self.magnitude)

    def _row(self) -> Packing | None:
        """The places of examples in the layer's input; None where each example has an entry."""
        return None if self.flat else active()

    def _masks(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout masks of the shape of ``x``; each example's mask has its own source."""
        rows, row = self.mode.rows, self._row()
        shapes = [x.shape[1:]] * len(rows)
        if row is not None:
            shapes = [(length, x.shape[-1]) for length in row.lengths]
        masks = [
            dropout_mask(source.child(self.name), shape, self.dropout)
            for source, shape in zip(rows, shapes, strict=True)
        ]
        if row is None:
            return torch.stack(masks).to(x.device)
        filler = x.new_ones(row.total - row.used, x.shape[-1], dtype=torch.float32)
        return torch.cat([*(mask.to(x.device) for mask in masks), filler])[None]

    def _frozen(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output without its factors: that of the base and of any residual."""
        out = cast(torch.Tensor, self.base(x))
        pair = residual(self.layer)
        if pair is None:
            return out
        return cast(
            torch.Tensor,
            _LowRankUpdate.apply(x, out, *pair, 1.0, None, False, self._row(), self.apart),
        )

    def _update(self, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        a, b = self.mode.of(self.a), self.mode.of(self.b)
        scaling = cast(float, self.layer.scaling[ADAPTER])
        mode = self.mode
        return cast(
            torch.Tensor,
            _LowRankUpdate.apply(
                x, base, a, b, scaling, mode.unit, mode.own, self._row(), self.apart
            ),
        )

    def _dora(
        self,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        result: torch.Tensor,
        magnitude: nn.Parameter,
    ) -> torch.Tensor:
        """``m / |W + sBA| (W + sBA) x + bias``; dropout applies to the added update only."""
        bias = cast(torch.Tensor | None, self.base.bias)
        linear = (result if dropped is None else self._frozen(dropped.to(x.dtype))).float()
        if bias is not None:
            linear = linear - bias.float()
        kept = bias if dropped is None else result.float() - linear
        m = magnitude if not self.mode.leaves else self.mode.by_example(magnitude)
        scale = m / self.weight_norm()  # (d_out,) or (n, d_out)
        if self.mode.leaves:
            row = self._row()
            if row is None:
                scale = scale.view(len(x), *[1] * (x.dim() - 2), -1)
            else:
                scale = row.spread(scale)[None]
        out = scale * self._update(x if dropped is None else dropped, linear)
        return (out if kept is None else out + kept).to(result.dtype)

    @torch.inference_mode(
        False
    )  # training must be able to use a result that an evaluation keeps here
    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        """Row norms of W + sBA, float32 ``(d_out,)``; constants to autograd (DoRA, section 4.3).

        W is the base weight with the residual.

        Kept until A or B changes, by value: fused optimizers write without counting up a tensor's
        version.
        """
        pair = residual(self.layer)
        if self._norm is None or not (
            torch.equal(self._norm[0], self.a)
            and torch.equal(self._norm[1], self.b)
            and self._norm[2] is pair
        ):
            scaling = cast(float, self.layer.scaling[ADAPTER])
            weight = torch.addmm(frozen_weight(self.layer), self.b, self.a, alpha=scaling)
            self._norm = (self.a.clone(), self.b.clone(), pair, weight.norm(dim=1))
        return self._norm[3]


class _Head:
    """The forward of a trained linear head on ``(n, d_in)`` or ``(n, t, d_in)``."""

    def __init__(self, name: str, layer: nn.Linear, mode: _Mode) -> None:
        self.name, self.layer, self.mode = name, layer, mode

    def parameters(self) -> list[nn.Parameter]:
        return list(self.layer.parameters())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = cast(nn.Parameter, self.layer.weight)
        bias = cast(nn.Parameter | None, self.layer.bias)
        if not self.mode.leaves:
            return F.linear(x, weight, bias)
        self.mode.check(self.name, x, flat=True)
        rows = x.reshape(len(x), -1, x.shape[-1])
        out = torch.bmm(rows, self.mode.by_example(weight).mT)
        if bias is not None:
            out = out + self.mode.by_example(bias)[:, None]
        return out.view(*x.shape[:-1], -1)


class PerSampleAdapters:
    """Replaces the forward of trained layers, so that one model trains with and without DP.

    In plain mode autograd fills ``p.grad`` as always. In expanded mode::

        with per_sample.expanded(len(batch)):
            losses(model, batch).sum().backward()
            per_sample.collect()  # p.grad_sample (units, *shape) of each trained parameter

    Guarantee: ``grad_sample[k]`` is the gradient of the summed losses of unit k's examples, as if
    each had been computed alone, for models in which `fedlora.exactness` finds no flaw. Layers and
    inputs for which this cannot hold are refused. What voids it: a loss that mixes examples.

    Args:
        model: A model with an adapter attached; its trained layers are changed.

    Raises:
        Refusal: ``guard-no-gradient`` if another layer is trained; ``guard-batch-coupled`` if a
            layer computes with statistics of the batch.
    """

    def __init__(self, model: PeftModel) -> None:
        self._mode = _Mode({})
        self.has_dropout = False  # whether `draw_dropout` has an effect
        self.has_magnitude = False
        self.layers: dict[str, nn.Module] = {}  # layers with a replaced forward
        self._named: dict[str, nn.Parameter] = {}
        covered: set[nn.Parameter] = set()
        if experts := [key for key in MIXTURES if _has(model.config.to_dict(), key)]:
            raise Refusal(
                "guard-batch-coupled",
                f"the base routes tokens to experts ({experts[0]}), whose products have as many "
                "rows as tokens came, so a gradient depends on other examples; choose a dense one",
            )
        for name, module in model.named_modules():
            if _couples_examples(module):
                raise Refusal(
                    "guard-batch-coupled",
                    f"{name} ({type(module).__name__}) computes with statistics of the whole "
                    "batch, so an example's gradient depends on others; choose a model without it",
                )
            forward: _AdaptedLayer | _Head | None = None
            if isinstance(module, LoraLayer) and is_linear(module.get_base_layer()):
                forward = _AdaptedLayer(name, module, self._mode)
                self.has_dropout |= forward.dropout > 0
                self.has_magnitude |= forward.magnitude is not None
            elif isinstance(module, ModulesToSaveWrapper):
                module = module.modules_to_save[ADAPTER]
                if isinstance(module, nn.Linear):
                    forward = _Head(name, module, self._mode)
            if forward is not None:
                cast(Any, module).forward = forward
                self.layers[name] = cast(nn.Module, module)
                covered.update(forward.parameters())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if parameter not in covered:
                    raise Refusal(
                        "guard-no-gradient",
                        f"{name} is trained but no layer gives its per-example gradient; freeze it",
                    )
                self._named[name] = parameter

    @contextmanager
    def expanded(
        self,
        n_units: int,
        unit_of_example: torch.Tensor | None = None,
        values: Mapping[str, torch.Tensor] | None = None,
    ) -> Generator[None]:
        """Give each trained parameter a leaf per unit; forward, backward and `collect` go inside.

        Args:
            n_units: Number of units of privacy in the batch.
            unit_of_example: Unit of each example, int64 ``(b,)`` in [0, n_units); None when example
                i is unit i.
            values: The value of each trained parameter for each unit, float32 ``(n_units,
                *shape)``, so that products are computed example by example; None: the model's
                values.

        Raises:
            ValueError: For values under DoRA, whose norms are those of one A and B.
        """
        if values is not None and self.has_magnitude:
            raise ValueError("units cannot have different values under DoRA")
        device = next(iter(self._named.values())).device
        unit = None if unit_of_example is None else unit_of_example.to(device)
        for name, parameter in self._trained().items():
            alike = parameter.detach().expand(n_units, *parameter.shape)
            leaf = alike if values is None else values[name]
            self._mode.leaves[parameter] = leaf.requires_grad_()
        self._mode.examples = n_units if unit is None else len(unit)
        self._mode.unit, self._mode.own = unit, values is not None
        try:
            yield
        finally:
            self._mode.leaves.clear()
            self._mode.unit, self._mode.own = None, False

    def draw_dropout(self, rows: Sequence[RandomSource]) -> None:
        """Draw dropout for the next batches from a source for each row, until the next call.

        A row's mask then depends on its source and the layer only, not on its place in a batch,
        and is the same again when activations are recomputed.

        Args:
            rows: A source for each example of a batch; empty switches dropout off.
        """
        self._mode.rows = rows

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._named.items() if p.requires_grad}

    def collect(self) -> None:
        """Set ``p.grad_sample``, float32 ``(units, *shape)``, on each trained parameter.

        Raises:
            Refusal: ``guard-no-gradient`` if a parameter got no gradient; nothing is set then.
        """
        for name, parameter in self._trained().items():
            if parameter not in self._mode.leaves or self._mode.leaves[parameter].grad is None:
                raise Refusal(
                    "guard-no-gradient",
                    f"{name} got no per-example gradient; call collect after backward, inside "
                    "expanded, with a loss that depends on it",
                )
        for parameter, leaf in self._mode.leaves.items():
            cast(Any, parameter).grad_sample = leaf.grad
            leaf.grad = None


def _has(config: Mapping[str, Any], key: str) -> bool:
    """Whether a configuration, or one inside it, has a value under this key."""
    inner = (value for value in config.values() if isinstance(value, Mapping))
    return bool(config.get(key)) or any(_has(cast(Mapping[str, Any], v), key) for v in inner)


def pop_grad_sample(name: str, parameter: nn.Parameter) -> torch.Tensor:
    """Remove a parameter's per-example gradient and return it, float32 ``(units, *shape)``.

    Args:
        name: The parameter's name, for the error.
        parameter: The parameter, after `PerSampleAdapters.collect`.

    Raises:
        Refusal: ``guard-no-gradient`` if there is none.
    """
    gradient: torch.Tensor | None = getattr(parameter, "grad_sample", None)
    if gradient is None:
        raise Refusal("guard-no-gradient", f"{name} has no per-example gradient")
    del cast(Any, parameter).grad_sample
    return gradient


MIXTURES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts in configurations of mixtures."""


def _couples_examples(module: nn.Module) -> bool:
    """Whether it is BatchNorm, or LLM.int8() with outlier columns, which depend on the batch."""
    state = getattr(module, "state", None)
    return isinstance(module, _BatchNorm) or getattr(state, "threshold", 0.0) > 0
