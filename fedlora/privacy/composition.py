"""Epsilon of a whole history of noisy releases.

Every release is a sampled Gaussian mechanism: each unit (a record, or all records of one
customer) enters independently with probability q, its contribution is clipped to norm C, and
Gaussian noise of deviation sigma * C is added to the sum. Neighbouring data sets differ by adding
or removing one unit. Under secure aggregation the noise is a sum of discrete shares; `epsilon` then
adds the small cost of their difference from a Gaussian.

Opacus supplies the mathematics: numerical composition of privacy loss variables ("prv", tight,
what a run states) or Renyi differential privacy ("rdp", looser, which a ledger may choose since it
also covers noise that is chosen after earlier releases). Every figure is an upper bound.

References:
    Mironov, Talwar & Zhang (2019), Renyi DP of the sampled Gaussian mechanism, arXiv 1908.10530.
    Gopi, Lee & Wutschitz (2021), Numerical composition of differential privacy, arXiv 2106.02848.
"""

# Opacus has no type stubs and leaves some arguments untyped.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fedlora.arrays import Floats
from fedlora.errors import InputError
from fedlora.secure import noise_shares

ORDERS = (*map(float, range(2, 64)), 72.0, 96.0, 128.0, 192.0, 256.0, 512.0)
"""Whole Renyi orders, for which Opacus' formula is a finite sum."""
_ROUNDING = 1e-12  # on log A(alpha) of a step, for rounding
_MAX_GRID = 1 << 20  # points of the privacy loss grid: at most 130 MB
_MAX_LOSS = 300.0  # exp(loss) must stay far inside float64; above it the RDP bound is used

# Of delta, for the discreteness of shares of noise; below a tenth of a permille of epsilon.
_DISCRETE_PART = 2.0**-10
# Minus the log of a probability that is negligible beside any delta.
_NEGLIGIBLE = 91.0


@dataclass(frozen=True, kw_only=True, order=True)
class Event:
    """Some steps of one sampled Gaussian mechanism.

    Args:
        noise_multiplier: Deviation of the noise divided by the sensitivity, > 0.
        sample_rate: Probability that a unit takes part in a step, in (0, 1].
        steps: Number of steps, >= 1.
        shares: The number of discrete shares whose sum is the noise (`secure.noise_shares`); 0 for
            noise that one institution adds as a whole.

    Raises:
        InputError: If a value is out of its bounds.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    shares: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.noise_multiplier < math.inf):
            raise InputError(
                f"noise_multiplier is {self.noise_multiplier}, but must be a finite number above 0"
            )
        if not (0 < self.sample_rate <= 1):
            raise InputError(
                f"sample_rate is {self.sample_rate}, but must be above 0 and at most 1"
            )
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}, but must be at least 1")
        if self.shares < 0:
            raise InputError(f"shares is {self.shares}, but must be at least 0")

    def alone(self) -> Event:
        """The steps for somebody who can subtract every share of noise but one."""
        if not self.shares:
            return self
        sigma = self.noise_multiplier / math.sqrt(self.shares)
        return replace(self, noise_multiplier=sigma, shares=1)


History = tuple[Event, ...]


def compose(events: Iterable[Event]) -> History:
    """Bring events into canonical form: steps of equal mechanisms added up, sorted.

    Epsilon does not depend on the order of the steps, so equal spending always has the same form
    (and one cache entry).
    """
    steps: Counter[tuple[float, float, int]] = Counter()
    for event in events:
        mechanism = float(event.noise_multiplier), float(event.sample_rate), event.shares
        steps[mechanism] += event.steps
    return tuple(
        Event(noise_multiplier=sigma, sample_rate=rate, steps=count, shares=shares)
        for (sigma, rate, shares), count in sorted(steps.items())
    )


def epsilon(history: Iterable[Event], delta: float, accountant: str = "prv") -> float:
    """Bound the epsilon that a history has spent at ``delta``.

    Guarantee: the true epsilon is at most the returned number, which is finite and not negative.
    Where the PRV method cannot guarantee its figure (a loss above 300, a delta near float
    precision, a grid that does not fit in memory) the RDP bound, also sound, is returned instead.
    Results are cached for the life of the process.

    Args:
        history: All releases about the same data, in any order; an empty history gives 0.
        delta: The delta of the epsilon, in (0, 1).
        accountant: ``"prv"`` or ``"rdp"``.

    Raises:
        InputError: If delta or the accountant is out of bounds, the noise is so small that no
            finite epsilon exists, or shares of noise are too coarse.
    """
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta}, but must be above 0 and below 1")
    if accountant not in ("prv", "rdp"):
        raise InputError(f"accountant is {accountant!r}, but must be prv or rdp")
    canonical = compose(history)
    if not any(event.shares for event in canonical):
        return _epsilon(canonical, delta, accountant)
    continuous = compose(replace(event, shares=0) for event in canonical)
    value = _epsilon(continuous, delta * (1 - _DISCRETE_PART), accountant)
    return value + 2 * _discrete_loss(canonical, value)


def _discrete_loss(history: History, value: float) -> float:
    """Bound the log-ratio of the law of discrete shares to that of a Gaussian mechanism.

    The ratio holds where no share is above B s, which fails with a probability of at most
    2 D exp(-B^2 / 2) for D numbers of noise. B is such that exp(epsilon) times this is negligible.

    Args:
        history: In canonical form.
        value: The history's epsilon with Gaussian noise.

    Raises:
        InputError: If the bound is above half of what delta leaves for it.
    """
    shared = [event for event in history if event.shares]
    numbers = sum(e.steps * e.shares for e in shared) * noise_shares.MAX_PARAMETERS
    square = 2 * (value + math.log(numbers) + _NEGLIGIBLE)  # B^2
    loss = 0.0
    for e in shared:
        scale = noise_shares.share_scale(e.noise_multiplier, e.shares, 1)
        loss += e.steps * e.shares * noise_shares.MAX_PARAMETERS * square / (8 * scale**2)
    if loss > _DISCRETE_PART / 2:
        raise InputError(
            f"the noise of {max(e.shares for e in shared)} institutions over "
            f"{sum(e.steps for e in shared)} steps is too coarse on its grid; lower privacy.honest "
            "or federation.rounds"
        )
    return loss


@lru_cache(maxsize=1 << 16)
def _epsilon(history: History, delta: float, accountant: str) -> float:
    if not history:
        return 0.0
    # Opacus warns when the best order is the last one: the bound is then loose, not wrong.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        value = _renyi_epsilon(history, delta)
        if accountant == "prv":
            value = _prv_epsilon(history, delta, value)
    if not math.isfinite(value):
        raise InputError(
            f"no finite epsilon exists for noise_multiplier {history[0].noise_multiplier} and "
            f"{sum(event.steps for event in history)} steps; raise the noise"
        )
    return max(value, 0.0)


def _renyi_epsilon(history: History, delta: float) -> float:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = sum(
        (e.steps * _divergences(e.noise_multiplier, e.sample_rate) for e in history),
        start=np.zeros(len(ORDERS)),
    )
    usable = np.isfinite(total)
    if not usable.any():
        return math.inf
    value, _ = get_privacy_spent(
        orders=np.array(ORDERS)[usable].tolist(), rdp=total[usable].tolist(), delta=delta
    )
    return float(value)


@lru_cache(maxsize=4096)
def _divergences(sigma: float, rate: float) -> Floats:
    """Bound one step's Renyi divergence of each order, float64; inf where it has no value."""
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = np.array(ORDERS)
    try:
        found = compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=list(ORDERS))
    except ArithmeticError:  # the noise is far too small
        return np.full(len(ORDERS), math.inf)
    values = np.nan_to_num(np.asarray(found, dtype=np.float64), nan=math.inf)
    return np.maximum(values, 0.0) + _ROUNDING / (orders - 1)


def _prv_epsilon(history: History, delta: float, bound: float) -> float:
    """Compose privacy loss variables on a grid; ``bound`` where the result has no guarantee.

    The steps are those of Opacus' ``PRVAccountant`` with these changes. The error of epsilon is 0.2
    percent of the Renyi bound (not 0.01, which is coarse at epsilon 0.1 and wasteful at 50), and
    grows where the grid would exceed ``_MAX_GRID``. Rounding of the sums and the Fourier transforms
    is charged to delta (Opacus checks it against long double precision, but computes in double).
    One mechanism is convolved at a time, so that memory does not grow with their number.

    Args:
        history: The history in canonical form.
        delta: The delta of the epsilon, in (0, 1).
        bound: A valid epsilon; the result is never above it.
    """
    from opacus.accountants.analysis.prv import (
        Domain,
        PoissonSubsampledGaussianPRV,
        TruncatedPrivacyRandomVariable,
        compose_heterogeneous,
        discretize,
    )

    steps = sum(event.steps for event in history)
    delta_error = delta / 1000
    margin = 3.0 if bound >= 0.5 else 0.03  # width of the grid beyond the likely losses
    # Gopi et al., remark 5.6. A loss Y leaves [-e - a, e + a] with probability at most
    # delta(e) / tanh(a / 2); the paper has a = 2 and this error of epsilon on top. The error is at
    # most a sixth of the margin (below), so that a is at least 5/6 of it.
    tails = delta_error * min(1.0, math.tanh(margin * 5 / 12) / math.tanh(1.0))
    each = (_renyi_epsilon((replace(e, steps=1),), tails / (8 * steps)) for e in history)
    width = margin + max(_renyi_epsilon(history, tails / 4), *each)
    scale = math.sqrt(steps * math.log(12 / delta_error) / 2)
    error = max(min(0.1, 0.002 * bound), 2 * width * scale / _MAX_GRID)
    # A convolution rounds far less than the sum over the whole grid does.
    convolutions = max(1.0, len(history) / 50)
    rounding = np.finfo(np.float64).eps * (
        4 * (2 * width * scale / error) * convolutions + 64 * steps
    )
    if not width <= _MAX_LOSS or error > margin / 6 or rounding > delta / 2:
        return bound
    composed: Any = None
    try:
        domain = Domain.create_aligned(-width, width, error / scale)
        for e in history:
            variable = TruncatedPrivacyRandomVariable(
                PoissonSubsampledGaussianPRV(e.sample_rate, e.noise_multiplier),
                domain.t_min,
                domain.t_max,
            )
            part = compose_heterogeneous([discretize(variable, domain)], [e.steps])
            composed = part if composed is None else compose_heterogeneous([composed, part], [1, 1])
        _, _, upper = composed.compute_epsilon(delta - rounding, delta_error, error)
    except (ArithmeticError, RuntimeError, ValueError, IndexError):
        return bound
    return min(float(upper), bound) if math.isfinite(upper) else bound
