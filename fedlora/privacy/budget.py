"""The plan of an institution's run: its noise follows from public values only.

Both sides plan: an institution before a charge, the server to check whether a privacy record is
possible. Noise multipliers are cached for the life of the process.
"""

import functools

from fedlora.config.config import RunConfig
from fedlora.config.sections import PrivacyConfig
from fedlora.data.shards import Shard
from fedlora.errors import InputError
from fedlora.privacy import accounting, discrete_gaussian
from fedlora.privacy.accounting import PrivacyPlan
from fedlora.secure import noise_shares

_noise_multiplier = functools.lru_cache(maxsize=4096)(accounting.noise_multiplier)
"""The noise of a plan, cached: institutions of several size classes often share it."""


def plan_run(config: RunConfig, units: int, participations: int) -> PrivacyPlan:
    """Plan the noise of a whole run for an institution with this many units.

    Args:
        config: The run.
        units: Records, or distinct values of the unit column.
        participations: The most rounds for which the institution may be asked.

    Raises:
        InputError: If there are fewer than one or more participations than the run has rounds, if
            delta is not below 1 / (the most units of its size class), no noise reaches the budget,
            or under secure aggregation the noise is beyond
            `discrete_gaussian.MAX_SCALE` or the batch beyond `noise_shares.MAX_BATCH`.
    """
    rounds = config.federation.rounds
    if not 1 <= participations <= rounds:
        raise InputError(
            f"the number of rounds for which an institution is asked is {participations}; it must "
            f"be from 1 to federation.rounds ({rounds})"
        )
    privacy, training = config.privacy, config.training
    size_class = accounting.public_size(units)
    delta = delta_of(privacy, units)
    rate = training.rate(size_class)
    noise_multiplier = _noise_multiplier(
        epsilon=privacy.epsilon,
        delta=delta,
        sample_rate=rate,
        steps=training.local_steps * participations,
        shares=privacy.shares,
    )
    plan = PrivacyPlan(
        epsilon=privacy.epsilon,
        delta=delta,
        noise_multiplier=noise_multiplier,
        sample_rate=rate,
        size_class=size_class,
        max_grad_norm=privacy.max_grad_norm,
        steps_per_round=training.local_steps,
        rounds=participations,
        honest=privacy.shares,
    )
    if plan.honest and plan.share_scale(noise_shares.MAX_PARAMETERS) > discrete_gaussian.MAX_SCALE:
        raise InputError(
            f"privacy.epsilon is {privacy.epsilon:g}, which needs a noise multiplier of "
            f"{noise_multiplier:g}, beyond the integers of secure aggregation; raise it"
        )
    if plan.expected_batch_size > noise_shares.MAX_BATCH:
        raise InputError(
            f"a batch has {plan.expected_batch_size:g} expected records, but DP allows at most "
            f"{noise_shares.MAX_BATCH}; lower training.batch-size"
        )
    return plan


def rate_of(config: RunConfig, shard: Shard) -> float:
    """The share of its records that an institution trains on in a step; under DP its plan's."""
    training = config.training
    size = accounting.public_size(shard.num_units) if config.privacy.enabled else len(shard)
    return training.rate(max(1, size))


def delta_of(privacy: PrivacyConfig, units: int) -> float:
    """The run's delta, checked against the size class, since the exact count is private."""
    most = accounting.most_of_class(units)
    delta = privacy.delta or accounting.public_delta(most)
    accounting.check_delta(delta, most)
    return delta
