"""DP-SGD around per-example gradients: Poisson sampling; clipping and noise, each checked.

Noise and samples come from keyed `RandomSource`s, one for each purpose. A failed check ends the
training with a `Refusal`; nothing is released.

Reference: Abadi et al. (2016), arXiv 1607.00133.
"""

# torch types some of its functions in part only
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Callable, Generator, Mapping

import numpy as np
import torch

from fedlora.arrays import Int64
from fedlora.errors import Refusal
from fedlora.privacy.noise_grid import on_grid
from fedlora.privacy.streams import RandomSource

SLACK = 2.0**-11
"""Gradients are clipped to C / (1 + SLACK), so that one unit moves a computed sum by at most C.
What floats add to C is below 2^-12 for up to `noise_shares.MAX_BATCH` expected units in a batch;
docs/privacy-accounting.md has the proof."""

_MARGIN = 1 - 4e-7
"""Gradients are scaled to this share of the bound, so that rounding (two float32 products, 1.2e-7)
never takes one above it."""

MAX_NOISE_SIGMAS = 7.0
"""A step's noise may be off by this many standard errors; false alarms are rarer than 1e-11."""

MAX_FINITE_NORM = 1e12
"""A gradient with a larger norm counts as not finite: scaling it would lose float32 precision."""


def poisson_batches(
    *, units: int, sample_rate: float, steps: int, source: RandomSource
) -> Generator[Int64]:
    """Batches in which each unit is with probability ``sample_rate``, independently.

    Args:
        units: Number of units.
        sample_rate: Probability in (0, 1].
        steps: Batches to draw.
        source: The random source of the draws.
    """
    for _ in range(steps):
        yield np.flatnonzero(source.uniform(units) < sample_rate)


def clip(gradients: torch.Tensor, max_grad_norm: float) -> None:
    """Clip each unit's gradient to norm C / (1 + `SLACK`), in place.

    A gradient that is not finite, by `MAX_FINITE_NORM`, becomes zero, so that no abort reveals
    anything about a record.

    Args:
        gradients: float32 ``(units, numbers)``.
        max_grad_norm: C.

    Raises:
        Refusal: ``guard-not-clipped`` if a norm is above the bound afterwards.
    """
    if not len(gradients):
        return
    bound = max_grad_norm / (1 + SLACK)
    norms = _norms(gradients)
    bad = ~(norms <= MAX_FINITE_NORM)  # also nan and inf
    if bad.any():
        gradients[bad] = 0.0
        norms = norms.masked_fill(bad, 0.0)
    gradients.mul_(clip_factors(norms, bound).to(gradients.dtype)[:, None])
    norms = _norms(gradients)
    if not bool((norms <= bound).all()):
        raise Refusal(
            "guard-not-clipped",
            f"after clipping a gradient has norm {float(norms.max()):.6g}; the bound is {bound:g}",
        )


def clip_factors(norms: torch.Tensor, bound: float) -> torch.Tensor:
    """Scale of each unit's gradient. ``norms`` ``(units,)`` float64, finite."""
    return (bound * _MARGIN / (norms + 1e-6)).clamp(max=1.0)


class PrivateOptimizer:
    r"""An optimizer whose gradient is a sum of clipped gradients with keyed noise, checked.

    Guarantee: the gradient handed to the wrapped optimizer is
    :math:`\frac{1}{L}(\sum_u \mathrm{clip}(g_u) + \mathcal N(0, \sigma^2 C^2 I))`, where the noise
    has the planned deviation (checked). L is a public constant.

    Args:
        optimizer: Over exactly the parameters that are trained.
        named: Name -> parameter, in the order of a sum's numbers.
        noise_multiplier: :math:`\sigma > 0`.
        max_grad_norm: C, of `clip`.
        expected_batch_size: L, public; the noisy sum is divided by it.
        source: The random source of the noise.
        after_noise: Called when the gradients are noised, before the optimizer's step.

    Raises:
        Refusal: ``guard-no-noise`` if the noise multiplier is not a finite number above 0.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        named: Mapping[str, torch.nn.Parameter],
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        source: RandomSource,
        after_noise: Callable[[], None] = lambda: None,
    ) -> None:
        if not (noise_multiplier > 0 and math.isfinite(noise_multiplier)):
            raise Refusal(
                "guard-no-noise", f"noise multiplier is {noise_multiplier}; DP needs one above 0"
            )
        self._optimizer, self._named, self._source = optimizer, named, source
        self._deviation = noise_multiplier * max_grad_norm
        self._expected, self._after_noise = expected_batch_size, after_noise

    def _draw(self, count: int) -> np.ndarray:
        return self._source.normal(count)

    def step(self, total: torch.Tensor) -> None:
        """Add noise to a sum of clipped gradients, take a step, check that each parameter changed.

        Noise is added in float64 and the result rounded to one grid.

        Args:
            total: float64 ``(numbers,)``.

        Raises:
            Refusal: When a guard trips (``guard-*``). Nothing of the model must be released then.
        """
        noise = self._draw(len(total)) * self._deviation
        check_noise(noise, self._deviation)
        noised = on_grid(total + torch.from_numpy(noise).to(total.device), self._deviation)
        mean = noised / self._expected
        before = [p.detach().clone() for p in self._named.values()]
        parts = mean.split([p.numel() for p in self._named.values()])
        for p, part in zip(self._named.values(), parts, strict=True):
            p.grad = part.view(p.shape).to(p.dtype)
        self._after_noise()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for (name, p), old in zip(self._named.items(), before, strict=True):
            if torch.equal(p.detach(), old):
                raise Refusal("guard-no-step", f"the step left {name} unchanged")


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


def _norms(gradients: torch.Tensor) -> torch.Tensor:
    """``(units,)`` norms, accumulated in float64: nothing overflows or vanishes."""
    return torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
