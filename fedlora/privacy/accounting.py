"""The noise of a whole plan, its delta, and the public size of an institution.

The figures rest on :mod:`privacy.composition`; docs/privacy-accounting.md works an example by hand.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from fedlora.errors import InputError, Refusal
from fedlora.privacy import composition
from fedlora.privacy.composition import Event
from fedlora.secure import noise_shares

_MAX_SIGMA = 1e6


def noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    history: Iterable[Event] = (),
    shares: int = 0,
) -> float:
    """Find the least noise with which a plan, on top of a history, stays within epsilon.

    Guarantee: ``epsilon(history + plan)`` is at most the target with the returned value, and above
    it with the number before it on a grid of four significant digits. Processors whose sums round
    differently so plan the same noise, and a run may move from one to another.

    Args:
        epsilon: Target for the history and the plan together, > 0.
        delta: The target's delta, in (0, 1).
        sample_rate: Probability that a unit is in a step's batch, in (0, 1].
        steps: Steps of the plan, >= 1.
        history: Earlier releases about the same data.
        shares: The number of discrete shares whose sum is the noise; 0: one Gaussian.

    Raises:
        InputError: If a value is out of bounds, or the accountant cannot certify so small an
            epsilon for any noise.
        Refusal: ``budget-exhausted`` if the history alone exceeds the target.
    """
    if not 0 < epsilon < math.inf:
        raise InputError(f"epsilon is {epsilon}, but must be a finite number above 0")
    before = composition.compose(history)
    spent = composition.epsilon(before, delta)
    if spent >= epsilon:
        raise Refusal(
            "budget-exhausted",
            f"epsilon {spent:.4g} of {epsilon:.4g} was already spent on these records",
        )

    def excess(sigma: float) -> float:
        """Log of epsilon over target: nearly linear in log sigma, at most 0 where it fits."""
        plan = Event(noise_multiplier=sigma, sample_rate=sample_rate, steps=steps, shares=shares)
        try:
            value = composition.epsilon((*before, plan), delta)
        except InputError:
            value = 1e300  # with so little noise no finite epsilon exists
        return math.log(max(value, 1e-300) / epsilon)

    # First guess: the Gaussian mechanism with the mean square of the sampled steps.
    high = 0.5 + sample_rate * math.sqrt(2 * steps * math.log(1.25 / delta)) / epsilon
    low = high / 1.5
    while excess(high) > 0:
        if high > _MAX_SIGMA:
            raise InputError(
                f"epsilon is {epsilon:g}, but at delta {delta:g} the accountant cannot certify "
                f"{steps} steps that low with any noise; raise epsilon or delta"
            )
        low, high = high, high * 2
    while excess(low) <= 0:
        low, high = low / 1.5, low

    from scipy.optimize import brentq  # pyright: ignore # not at startup: it takes 0.3 s

    def of_log(x: float) -> float:
        return excess(math.exp(x))

    root = math.exp(cast(float, brentq(of_log, math.log(low), math.log(high), xtol=2e-5)))
    unit = 10.0 ** (3 - math.floor(math.log10(root)))
    least = math.ceil(root * unit)
    while excess(least / unit) > 0:
        least += 1
    while excess((least - 1) / unit) <= 0:
        least -= 1
    return least / unit


def public_delta(records: int) -> float:
    """Return the largest power of ten not above 1 / (10 x records).

    It is no finer than that, because the noise follows from delta and would otherwise reveal the
    exact number of records.
    """
    return float(f"1e-{len(str(10 * _positive(records) - 1))}")


def public_size(records: int) -> int:
    """Return the size class: the largest power of two not above the number of records.

    It is treated as public, and is the only size that influences a release under DP.
    """
    return 1 << (_positive(records).bit_length() - 1)


def is_size_class(size: float) -> bool:
    """Whether a size is a :func:`public_size`: a power of two, from 1."""
    return 1 <= size < math.inf and size == public_size(int(size))


def most_of_class(records: int) -> int:
    """Return the most records in a size class of :func:`public_size`."""
    return 2 * public_size(records) - 1


def check_delta(delta: float, records: int) -> None:
    """Check that delta is below 1 / records.

    Above it, publishing one whole record would count as private.

    Raises:
        InputError: If delta is not below the bound, or not positive.
    """
    if not 0 < delta < 1 / _positive(records):
        raise InputError(
            f"privacy.delta is {delta:g}, but must be above 0 and below 1 / {records} records = "
            f"{1 / records:.3g}; use {public_delta(records):g}"
        )


def _positive(records: int) -> int:
    if records < 1:
        raise InputError(f"the number of records is {records}, but must be at least 1")
    return records


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """The mechanism of one institution's whole run, chosen before its first round.

    Training, the ledger's charges, the record that is sent and the server's check of that record
    take their figures from here. Every figure depends on public values only.

    Args:
        epsilon: Target for the whole run; the plan's own epsilon is at most this.
        delta: Failure probability.
        noise_multiplier: Standard deviation of a step's noise over ``max_grad_norm``.
        sample_rate: Probability that a unit is in a step's batch.
        size_class: The institution's size class, in units (:func:`public_size`).
        max_grad_norm: Clipping bound.
        steps_per_round: Local steps a round.
        rounds: The most rounds in which the institution takes part.
        honest: Under secure aggregation the number of institutions whose shares of noise are in
            every sum; ``noise_multiplier`` is that of their sum. 0: the institution adds all of the
            noise itself.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    size_class: int
    max_grad_norm: float
    steps_per_round: int
    rounds: int
    honest: int = 0

    @property
    def expected_batch_size(self) -> float:
        """Expected units of a batch, from the size class; a step's noisy sum is divided by this."""
        return self.sample_rate * self.size_class

    @property
    def share_noise_multiplier(self) -> float:
        """The noise multiplier of what this institution adds itself."""
        return self.noise_multiplier / math.sqrt(max(1, self.honest))

    @property
    def max_steps(self) -> int:
        """The most steps of the whole run."""
        return self.steps_per_round * self.rounds

    @property
    def round_event(self) -> Event:
        """The cost of one round's steps."""
        return self._steps(self.steps_per_round)

    @property
    def events(self) -> tuple[Event, ...]:
        """The largest cost of the whole run."""
        return (self._steps(self.max_steps),)

    def share_scale(self, parameters: int) -> float:
        """The scale of this institution's share of noise, in steps of the grid.

        Args:
            parameters: The number of trained parameters.
        """
        return noise_shares.share_scale(self.noise_multiplier, self.honest, parameters)

    def _steps(self, steps: int) -> Event:
        return Event(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=steps,
            shares=self.honest,
        )


def epsilon_alone(history: Iterable[Event], delta: float, accountant: str = "prv") -> float:
    """Bound the epsilon if all others collude: of the noise one's own shares are left.

    Args:
        history: As for `fedlora.privacy.composition.epsilon`.
        delta: As for `fedlora.privacy.composition.epsilon`.
        accountant: As for `fedlora.privacy.composition.epsilon`.

    Returns:
        At least the epsilon of the history; inf where so little noise gives no finite bound.
    """
    try:
        return composition.epsilon((event.alone() for event in history), delta, accountant)
    except InputError:
        return math.inf
