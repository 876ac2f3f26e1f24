"""DP-SGD around per-example gradients: Poisson sampling; clipping and noise, each checked.

Opacus supplies the optimizer's order of events (`DPOptimizer`), the sampler's contract and the
accountants. This module draws noise and samples from keyed `RandomSource`s, one for each purpose,
clips in place and checks every step. A failed check ends the training with a `Refusal`; nothing is
released.

Reference: Abadi et al. (2016), arXiv 1607.00133; automatic clipping: Bu et al. (2023),
arXiv 2206.07136.
"""

# torch and Opacus type some of their functions in part only
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from fedlora.errors import Refusal
from fedlora.privacy.noise_grid import on_grid
from fedlora.privacy.streams import RandomSource

CLIPPING_MARGIN = 1 - 4e-7
"""Gradients are scaled to this share of the bound, so that rounding (two float32 products, 1.2e-7)
never takes one above it."""

MAX_NOISE_SIGMAS = 7.0
"""A step's noise may be off by this many standard errors; false alarms are rarer than 1e-11."""

MAX_FINITE_NORM = 1e12
"""A gradient with a larger norm counts as not finite: scaling it would lose float32 precision."""

AUTOMATIC_GAMMA = 0.01
"""Stabiliser of automatic clipping, as in Bu et al."""


class PoissonSampler(UniformWithReplacementSampler):
    """Opacus' Poisson sampler, drawing from a `RandomSource`.

    Each unit is in each batch with probability ``sample_rate``.

    Args:
        units: Number of units.
        sample_rate: Probability in (0, 1].
        steps: Batches to draw.
        source: The random source of the draws.
    """

    def __init__(self, *, units: int, sample_rate: float, steps: int, source: RandomSource) -> None:
        super().__init__(num_samples=units, sample_rate=sample_rate, steps=steps)
        self._source = source

    def __iter__(self) -> Generator[list[int]]:
        for _ in range(self.steps):
            yield np.flatnonzero(self._source.uniform(self.num_samples) < self.sample_rate).tolist()


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """Clipping of a unit's gradient to norm C; both kinds have sensitivity C.

    Args:
        max_grad_norm: C.
        kind: ``flat`` scales a gradient to norm C when its norm is larger. ``automatic`` multiplies
            every gradient by C / (norm + `AUTOMATIC_GAMMA`): its norm is below C, and near C only
            where it was far above gamma.
    """

    max_grad_norm: float
    kind: str

    def clip(self, gradients: Sequence[torch.Tensor]) -> None:
        """Clip in place. A unit's gradient that is not finite, by `MAX_FINITE_NORM`, becomes zero.

        Args:
            gradients: ``(units, *shape)`` of each parameter; a unit's norm is over all of them.

        Raises:
            Refusal: ``guard-not-clipped`` if a norm is above C afterwards.
        """
        if not len(gradients[0]):
            return
        norms = _norms(gradients)
        bad = ~(norms <= MAX_FINITE_NORM)  # also nan and inf
        if bad.any():
            for g in gradients:
                g[bad] = 0.0
            norms = norms.masked_fill(bad, 0.0)
        factors = self.factors(norms)
        for g in gradients:
            g.mul_(factors.to(g.device, g.dtype).view(-1, *[1] * (g.dim() - 1)))
        norms = _norms(gradients)
        if not bool((norms <= self.max_grad_norm).all()):
            raise Refusal(
                "guard-not-clipped",
                f"after clipping a gradient has norm {float(norms.max()):.6g}; "
                f"the bound is {self.max_grad_norm:g}",
            )

    def factors(self, norms: torch.Tensor) -> torch.Tensor:
        """Scale of each unit's gradient. ``norms`` (units,) float64, finite."""
        if self.kind == "automatic":
            return self.max_grad_norm * CLIPPING_MARGIN / (norms + AUTOMATIC_GAMMA)
        return (self.max_grad_norm * CLIPPING_MARGIN / (norms + 1e-6)).clamp(max=1.0)


class PrivateOptimizer(DPOptimizer):
    r"""`DPOptimizer` with keyed noise and a check on every step.

    ``p.summed_grad`` holds the sum of gradients that `Clipping.clip` has clipped and checked, and
    ``p.grad_sample`` no unit (`client.private_training`); units that are there are clipped and
    added first.

    Guarantee: the gradient handed to the wrapped optimizer is
    :math:`\frac{1}{L}(\sum_u \mathrm{clip}(g_u) + \mathcal N(0, \sigma^2 C^2 I))`, where each
    unit's clipped gradient has norm at most C (checked), and the noise has the planned deviation
    (checked). A unit whose gradient is not finite contributes zero, so that no abort reveals
    anything about a record. L is a public constant.

    Args:
        optimizer: Over exactly the parameters that are trained.
        names: Parameter -> name, for errors.
        noise_multiplier: :math:`\sigma > 0`.
        clipping: C and the kind of clipping.
        expected_batch_size: L, public; the noisy sum is divided by it.
        source: The random source of the noise.

    Raises:
        Refusal: ``guard-no-noise`` if the noise multiplier is not a finite number above 0.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        names: Mapping[torch.nn.Parameter, str],
        noise_multiplier: float,
        clipping: Clipping,
        expected_batch_size: float,
        source: RandomSource,
    ) -> None:
        if not (noise_multiplier > 0 and math.isfinite(noise_multiplier)):
            raise Refusal(
                "guard-no-noise", f"noise multiplier is {noise_multiplier}; DP needs one above 0"
            )
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping.max_grad_norm,
            expected_batch_size=expected_batch_size,  # pyright: ignore[reportArgumentType]
        )
        self._names = names
        self._clipping = clipping
        self._source = source

    def clip_and_accumulate(self) -> None:
        """Clip ``p.grad_sample`` (units, *shape) in place and add its sum to ``p.summed_grad``."""
        params: list[Any] = self.params
        self._clipping.clip([p.grad_sample for p in params])
        for p in params:
            total = p.grad_sample.sum(0, dtype=torch.float64)
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total

    def add_noise(self) -> None:
        """``p.grad`` = ``p.summed_grad`` + noise, added in float64 and rounded to one grid."""
        deviation = self.noise_multiplier * self.max_grad_norm
        params: list[Any] = self.params
        noise = self._draw(sum(p.numel() for p in params)) * deviation
        check_noise(noise, deviation)
        start = 0
        for p in params:
            part = torch.from_numpy(noise[start : start + p.numel()]).view(p.shape).to(p.device)
            p.grad = on_grid(p.summed_grad.double() + part, deviation).to(p.dtype)
            start += p.numel()

    def _draw(self, count: int) -> np.ndarray:
        return self._source.normal(count)

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One Opacus step, then a check that each parameter changed.

        Raises:
            Refusal: When a guard trips (``guard-*``). Nothing of the model must be released then.
        """
        for p in self.params:
            if getattr(p, "grad_sample", None) is None:
                raise Refusal("guard-no-gradient", f"{self._names[p]} has no per-example gradient")
        before = [p.detach().clone() for p in self.params]
        super().step()
        for p, old in zip(self.params, before, strict=True):
            if torch.equal(p.detach(), old):
                raise Refusal("guard-no-step", f"the step left {self._names[p]} unchanged")


def check_noise(noise: np.ndarray, deviation: float) -> None:
    """Refuse noise whose measured mean square does not fit ``deviation``.

    Under the right noise, n (mean square / deviation^2) is chi-square with n degrees of freedom;
    its Wilson-Hilferty transform is standard normal, and 7 standard errors are a false alarm of
    below 1e-11 a step.

    Args:
        noise: (n,) float64.
        deviation: Planned standard deviation.

    Raises:
        Refusal: ``guard-noise``.
    """
    n = noise.size
    ratio = float(np.mean(np.square(noise))) / deviation**2
    z = (np.cbrt(ratio) - (1 - 2 / (9 * n))) / math.sqrt(2 / (9 * n))
    if not abs(z) <= MAX_NOISE_SIGMAS:
        raise Refusal(
            "guard-noise",
            f"noise has deviation {math.sqrt(ratio) * deviation:.6g}; {deviation:.6g} was planned",
        )


def _norms(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """(units,) norms over all parameters, accumulated in float64: nothing overflows or vanishes."""
    norms = [
        torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1, dtype=torch.float64)
        for g in gradients
    ]
    return torch.stack([n.to(norms[0].device) for n in norms]).square().sum(0).sqrt()
