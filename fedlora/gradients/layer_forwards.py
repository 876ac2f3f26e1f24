"""The forwards of trained layers, with gradients that autograd keeps per example."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from fedlora.errors import Refusal
from fedlora.gradients.lora_layers import ADAPTER, frozen_weight, is_quantized, residual
from fedlora.gradients.low_rank_update import LowRankUpdate
from fedlora.gradients.packing import Packing, active
from fedlora.models.encoder import HEAD
from fedlora.privacy.streams import RandomSource


@dataclass
class Mode:
    """The state that the forwards of all trained layers of one model share.

    Args:
        leaves: Parameter -> its leaf ``(examples, *shape)``; empty in plain mode.
        examples: First dimension that every input must have.
        rows: The random source of each example's dropout; empty: no dropout.
    """

    leaves: dict[nn.Parameter, torch.Tensor]
    examples: int = 0
    rows: Sequence[RandomSource] = ()

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The leaf of a parameter, or in plain mode the parameter."""
        return self.leaves.get(parameter, parameter)

    def by_example(self, parameter: nn.Parameter) -> torch.Tensor:
        """A row for each example ``(examples, *shape)``: of the leaf, or of a frozen parameter."""
        alike = parameter.expand(self.examples, *parameter.shape)
        return self.leaves.get(parameter, alike)

    def check(self, name: str, x: torch.Tensor, flat: bool) -> None:
        """Refuse an input in which an example is not one entry of the first dimension.

        In a packed row the packing places examples, and only pooled inputs have an entry for each.
        Shapes can fit by coincidence: `gradients.exactness` has shown, at a size where they cannot,
        that the first dimension of this layer's input is that of examples.
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

    The probability is met to 1 / 65536.
    """
    n = math.prod(shape)
    kept = source.words(-(-n // 4)).view(np.uint16)[:n] >= round(rate * 65536)
    return torch.from_numpy(kept.astype(np.float32) / np.float32(1 - rate)).view(*shape)


class AdaptedLayer:
    """The forward of a linear layer with low-rank factors, equal to PEFT's."""

    def __init__(self, name: str, layer: LoraLayer, mode: Mode) -> None:
        self.name, self.layer, self.mode = name, cast(Any, layer), mode
        self.base = layer.get_base_layer()
        self.apart = is_quantized(self.base)
        self.dropout = cast(float, getattr(layer.lora_dropout[ADAPTER], "p", 0.0))
        self.flat = name.rpartition(".")[2] == HEAD  # pooled: one row an example
        self.a = cast(nn.Parameter, layer.lora_A[ADAPTER].weight)
        self.b = cast(nn.Parameter, layer.lora_B[ADAPTER].weight)
        self.magnitude: nn.Parameter | None = None
        if ADAPTER in layer.lora_magnitude_vector:
            self.magnitude = cast(nn.Parameter, layer.lora_magnitude_vector[ADAPTER].weight)
        # A, B and the residual (which is replaced, never changed) with their norm.
        self._norm: tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Factors and magnitude, trained or frozen."""
        return [p for p in (self.a, self.b, self.magnitude) if p is not None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output ``(..., d_out)`` for an input ``(..., d_in)``, in the base's dtype."""
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
        """The packing of the layer's input; None where each example has its own entry."""
        return None if self.flat else active()

    def _masks(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout masks of the shape of ``x``, each example's from a source of its own."""
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
        """The output without the factors: the base, with the residual if the layer has one."""
        out = cast(torch.Tensor, self.base(x))
        pair = residual(self.layer)
        if pair is None:
            return out
        return cast(
            torch.Tensor,
            LowRankUpdate.apply(x, out, *pair, 1.0, self._row(), self.apart),
        )

    def _update(self, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        a, b = self.mode.of(self.a), self.mode.of(self.b)
        scaling = cast(float, self.layer.scaling[ADAPTER])
        return cast(
            torch.Tensor,
            LowRankUpdate.apply(x, base, a, b, scaling, self._row(), self.apart),
        )

    def _dora(
        self,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        result: torch.Tensor,
        magnitude: nn.Parameter,
    ) -> torch.Tensor:
        """``m / |W + sBA| (W + sBA) x + bias``; dropout touches only what is added to the base."""
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

    @torch.inference_mode(False)  # training also uses norms that an evaluation stored
    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        """Row norms of W + sBA, float32 ``(d_out,)``; constants to autograd (DoRA, section 4.3).

        W is the base weight with the residual.

        The result is stored until the values of A or B change: fused optimizers write without a new
        tensor version.
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


class Head:
    """The forward of a trained linear head on ``(n, d_in)`` or ``(n, t, d_in)``."""

    def __init__(self, name: str, layer: nn.Linear, mode: Mode) -> None:
        self.name, self.layer, self.mode = name, layer, mode

    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias."""
        return list(self.layer.parameters())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(..., classes)``."""
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
