"""More rounds after a complete run: a new run from its adapter, charged to the same ledgers.

The noise of a run is planned for its rounds, and its ledgers were charged for them. More rounds are
therefore further spending: they have a budget of their own, and each institution's ledger decides
whether it fits beside what is spent already.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from fedlora import accounting, records
from fedlora.budget import plan_run
from fedlora.config import RunConfig, load
from fedlora.errors import InputError
from fedlora.run_files import CONFIG, read_run_file
from server.population import participations


def values(run_dir: Path, more: int) -> dict[str, Any]:
    """The keys in which a continuation differs from the complete run in ``run_dir``.

    Under DP ``privacy.epsilon`` is what ``more`` rounds cost at the noise of that run, planned for
    the institution with the fewest records.

    Args:
        run_dir: A complete run, absolute.
        more: The number of further rounds.

    Raises:
        InputError: If the run is not complete, or its spending is in no ledger here.
    """
    read_run_file(run_dir)
    config = load(run_dir / CONFIG)
    if config.deployed:
        raise InputError(
            f"{run_dir} is a deployed run; submit a configuration with adapter.start = {run_dir} "
            "and the further federation.rounds"
        )
    found: dict[str, Any] = {"federation.rounds": more, "adapter.start": str(run_dir)}
    if config.privacy.hides_institutions:
        raise InputError(
            f"--rounds +{more}: {run_dir} has institution-level DP (privacy.institution-epsilon), "
            "for which there is no ledger that could add up two runs; plan all rounds in one run"
        )
    if not config.privacy.enabled:
        return found
    ledgers = Path(config.privacy.ledger or run_dir / "ledgers")
    if not any(ledgers.glob("*.db")):
        raise InputError(
            f"--rounds +{more}: {ledgers} has no ledgers, so nobody knows what is spent already; "
            "restore the ledgers of the run"
        )
    return found | {
        "privacy.epsilon": _epsilon(config, more),
        "privacy.ledger": str(ledgers),
        "privacy.max-epsilon": 0.0,
    }


def _epsilon(config: RunConfig, more: int) -> float:
    """What further rounds cost at the noise of the run, rounded up to four decimals."""
    federation = records.load(config)
    size = len(federation.names)
    units = min(federation.train(i).num_units for i in range(size))
    plan = plan_run(config, units, participations(config, size))
    longer = config.replace({"federation.rounds": more})
    same_noise = dataclasses.replace(plan, rounds=participations(longer, size))
    epsilon = accounting.epsilon(same_noise.events, plan.delta, plan.accountant)
    return math.ceil(epsilon * 1e4) / 1e4
