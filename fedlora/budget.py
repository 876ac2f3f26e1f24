"""What an institution plans to spend in a run: its noise follows from public values only.

Both sides plan: an institution before it is charged, the server to tell whether a record of what
was spent can be true. Plans are cached for the life of the process.
"""

import functools
from dataclasses import dataclass

from fedlora import accounting
from fedlora.accounting import Event, PrivacyPlan
from fedlora.config import PrivacyConfig, RunConfig
from fedlora.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an institution plans to spend in a run. Every figure depends on public values only.

    Args:
        plan: Noise for the whole run.
        public_size: Size class: the largest power of two not above the number of units.
        normaliser: Expected number of units a step, from the size class.
    """

    plan: PrivacyPlan
    public_size: int
    normaliser: float

    @property
    def round_event(self) -> Event:
        """What one round spends."""
        return Event(
            noise_multiplier=self.plan.noise_multiplier,
            sample_rate=self.plan.sample_rate,
            steps=self.plan.steps_per_round,
        )

    @property
    def events(self) -> tuple[Event, ...]:
        """What the whole run spends at most."""
        whole = Event(
            noise_multiplier=self.plan.noise_multiplier,
            sample_rate=self.plan.sample_rate,
            steps=self.plan.max_steps,
        )
        return (whole, *self.size_events)

    @property
    def size_events(self) -> tuple[Event, ...]:
        """The release of a noised record count, when the weighting wants one."""
        if not self.plan.size_noise:
            return ()
        return (Event(noise_multiplier=self.plan.size_noise, sample_rate=1.0, steps=1),)


def budget(config: RunConfig, units: int, participations: int) -> Budget:
    """Plan the noise of a whole run for an institution with this many units.

    Args:
        config: The run.
        units: Records, or distinct values of the unit column.
        participations: Rounds it may be asked for, at most.

    Raises:
        InputError: If there are fewer than one or more participations than the run has rounds, if
            delta is not below 1 / (the most units of its size class), or no noise reaches the
            budget.
    """
    rounds = config.federation.rounds
    if not 1 <= participations <= rounds:
        raise InputError(
            f"the most rounds that an institution is asked for is {participations}; it must be "
            f"from 1 to federation.rounds ({rounds})"
        )
    return _budget(
        config.privacy,
        config.training.local_steps,
        config.training.batch_size,
        config.training.sample_rate,
        config.federation.weighting,
        units,
        participations,
    )


@functools.lru_cache(maxsize=4096)
def _budget(
    privacy: PrivacyConfig,
    local_steps: int,
    batch_size: int,
    given_rate: float,
    weighting: str,
    units: int,
    participations: int,
) -> Budget:
    public = accounting.public_size(units)
    delta = delta_of(privacy, units)
    rate = accounting.sample_rate(given_rate, batch_size, public)
    plan = accounting.plan(
        epsilon=privacy.epsilon,
        delta=delta,
        sample_rate=rate,
        steps_per_round=local_steps,
        rounds=participations,
        accountant=privacy.accountant,
        size_noise=privacy.size_noise if weighting == "noised-size" else 0.0,
    )
    return Budget(plan=plan, public_size=public, normaliser=rate * public)


def delta_of(privacy: PrivacyConfig, units: int) -> float:
    """The run's delta, checked against the size class: a check against the count would tell it."""
    most = accounting.most_of_class(units)
    delta = privacy.delta or accounting.public_delta(most)
    accounting.check_delta(delta, most)
    return delta
