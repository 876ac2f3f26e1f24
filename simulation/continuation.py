"""More rounds after a complete run: a new run from its adapter, charged to the same ledgers.

The noise of a run is planned for its rounds, and its ledgers were charged for them. More rounds are
therefore further spending: they have a budget of their own, and each institution's ledger decides
whether it fits beside what is spent already.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from client.institution import Institution
from client.ledger import Ledger
from fedlora.config.config import RunConfig, load
from fedlora.data import records
from fedlora.errors import InputError
from fedlora.privacy import composition
from fedlora.privacy.budget import plan_run
from fedlora.runs.run_files import CONFIG, LEDGERS, PRIVACY, other_writer, read_run_file


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
    result = read_run_file(run_dir)
    config = load(run_dir / CONFIG, {"run-dir": str(run_dir)})
    if config.deployed:
        raise InputError(
            f"{run_dir} is a deployed run; submit a configuration with adapter.start = {run_dir} "
            "and the further federation.rounds"
        )
    if config.privacy.hides_institutions:
        raise InputError(
            f"--rounds +{more}: {run_dir} has institution-level DP (privacy.institution-epsilon), "
            "for which there is no ledger that could add up two runs; plan all rounds in one run"
        )
    found: dict[str, Any] = {"federation.rounds": more, "adapter.start": str(run_dir)}
    if not config.privacy.enabled:
        return found
    if "run" not in result:
        raise InputError(
            f"{run_dir} was written by {other_writer(run_dir) or 'an early fedlora'}, without an "
            "identity, so that nobody knows its charges in a ledger; start anew"
        )
    _check_charges(run_dir, config, result["run"])
    return found | {
        "privacy.epsilon": _epsilon(config, more),
        "privacy.ledger": config.privacy.ledger or str(run_dir / LEDGERS),
        "privacy.max-epsilon": 0.0,
    }


def _check_charges(run_dir: Path, config: RunConfig, run: str) -> None:
    """Check that the ledger of each institution that spent in a run has the run's charges."""
    said = read_run_file(run_dir, PRIVACY)
    steps = {name: one["steps"] for name, one in said["institutions"].items()}
    without_report = said.get("without_report", {})
    for index, name in enumerate(records.load(config).names):
        path = Institution.locate(config, index).ledger_path
        if name not in steps and name not in without_report:
            continue
        if path.exists():
            own = said["institutions"].get(name, {}).get("institution_says", {})
            # those of privacy.json are of orders, which an institution may have refused
            least = own.get("steps", 0 if name in without_report else max(steps[name], 1))
            with Ledger.open(path) as ledger:
                charged = ledger.steps_of(run)
            if charged >= least:
                continue
        raise InputError(
            f"the ledger {path} is missing or lacks charges of the run in {run_dir}, so nobody "
            "knows what is spent already; restore it"
        )


def _epsilon(config: RunConfig, more: int) -> float:
    """What further rounds cost at the noise of the run, rounded up to four decimals."""
    federation = records.load(config)
    size = len(federation.names)
    plan = plan_run(config, min(federation.units), config.federation.participations(size))
    longer = config.replace({"federation.rounds": more})
    same_noise = dataclasses.replace(plan, rounds=longer.federation.participations(size))
    epsilon = composition.epsilon(same_noise.events, plan.delta, plan.accountant)
    return math.ceil(epsilon * 1e4) / 1e4
