"""An own model under DP: one further round of a run, for the institution itself.

The round is planned, charged, trained and stored as every round is (`client.institution`).
"""

import math
from collections.abc import Sequence

from fedlora.config.config import UNRELEASED, RunConfig
from fedlora.errors import InputError
from fedlora.models.adapters import AdapterState
from fedlora.privacy import accounting
from fedlora.privacy.budget import delta_of, plan_run
from fedlora.wire.messages import TrainOrder


def config_at_home(
    config: RunConfig, *, delta: float, accountant: str, residual_rank: int = 1
) -> RunConfig:
    """The configuration under which the own model of a run is trained under DP.

    Steps are those of home, the rate is a share of that of home. Sample rate, clipping and
    ``privacy.noise`` are those of the run. The noise multiplier follows from ``home.epsilon``; the
    optimizer is Adam. Seeded noise follows from seed and round, so the round is the one after the
    run's last.

    Args:
        config: The run, with a finite ``home.epsilon``.
        delta: The delta of the institution's ledger.
        accountant: The ledger's accountant.
        residual_rank: The largest rank of a residual in the shared adapter.
    """
    residuals = config.federation.traits.residuals
    return config.replace(
        {
            "home.epsilon": math.inf,
            "privacy.trust": "local",
            "privacy.epsilon": config.home.epsilon,
            "privacy.max-epsilon": 0.0,
            "privacy.delta": delta,
            "privacy.accountant": accountant,
            "training.local-steps": config.home.steps,
            "training.optimizer": "adam",
            "training.learning-rate": config.home.private_learning_rate,
            "training.proximal": 0.0,
            "adapter.ranks": "",
            "federation.rounds": config.federation.rounds + 1,
            "federation.weighting": "uniform",
            "federation.strategy": config.federation.strategy if residuals else "fedavg",
            "federation.residual-rank": residual_rank,
        }
    )


def check_plans(config: RunConfig, units: Sequence[int]) -> None:
    """Refuse a simulation whose own models under DP cannot be planned.

    Without this the institutions that train at home would refuse the run, and the others go on.

    Args:
        config: The run.
        units: The number of units of each institution.

    Raises:
        InputError: Naming ``home.epsilon``.
    """
    if not config.home.private:
        return
    for i in config.at_home(len(units)):
        at_home = config_at_home(
            config,
            delta=delta_of(config.privacy, units[i]),
            accountant=config.privacy.accountant,
        )
        try:
            plan_run(at_home, accounting.public_size(units[i]), 1)
        except InputError as error:
            raise InputError(
                f"home.epsilon is {config.home.epsilon:g}, for which no own model can be planned "
                f"({error}); raise it, or set it to inf"
            ) from None


def order_at_home(config: RunConfig, run: str, base: str, shared: AdapterState) -> TrainOrder:
    """The order that trains an own model from the shared one.

    The same settings and the same shared adapter give the same order, which a ledger answers twice
    and charges once.

    Args:
        config: As `config_at_home` gave it.
        run: The run that released the shared adapter.
        base: Digest of the base model.
        shared: The released adapter.
    """
    number = config.federation.rounds
    return TrainOrder(
        run=f"home:{run}:{config.fingerprint(*UNRELEASED)[:16]}",
        round=number,
        participations=1,
        base=base,
        report=(),
        parts=config.federation.traits.parts_sent(number),
        kept=(),
        adapter=shared,
    )


def residual_rank(shared: AdapterState) -> int:
    """The largest rank of a residual in an adapter, at least 1."""
    ranks = (len(f.residual[0]) for f in shared.layers().values() if f.residual)
    return max(ranks, default=1)
