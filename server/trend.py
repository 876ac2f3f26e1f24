"""Whether a run still improves at its end, and what more rounds would cost."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora import accounting
from fedlora.budget import plan_run
from fedlora.config import RunConfig

STANDARD_ERRORS = 2.0
"""A run rises if its accuracy grew by more than so many standard errors since the middle. With no
rise at all, two unpaired accuracies differ that much, and upwards, in one run of 40."""


def still_rising(
    config: RunConfig, records: Sequence[Mapping[str, Any]], rows: int, units: int
) -> dict[str, Any]:
    """What more rounds would cost a run whose accuracy still rises at its end.

    Args:
        config: The run.
        records: Its lines of ``rounds.jsonl``.
        rows: Number of held-out rows.
        units: Units of privacy of the institution with the fewest.

    Returns:
        Empty where the accuracy does not rise, or was measured in less than three rounds. Else
        ``points``, by which it grew since the measurement nearest to the middle; ``since``, that
        round; ``more_rounds``, half as many again; under DP ``epsilon``, the whole longer run's at
        the same noise, and ``noise``, the factor of the noise that keeps epsilon.
    """
    measured = {
        int(r["round"]): float(r["metrics"]["accuracy"])
        for r in records
        if "accuracy" in r["metrics"]
    }
    if len(measured) < 3 or not rows:
        return {}
    last = max(measured)
    since = min((r for r in measured if r < last), key=lambda r: abs(r - last / 2))
    error = math.sqrt(sum(measured[r] * (1 - measured[r]) / rows for r in (since, last)))
    if measured[last] - measured[since] <= STANDARD_ERRORS * error:
        return {}
    more = math.ceil(config.federation.rounds / 2)
    found: dict[str, Any] = {
        "points": 100 * (measured[last] - measured[since]),
        "since": since,
        "more_rounds": more,
    }
    if config.privacy.enabled and not config.federation.institutions_per_round:
        rounds = config.federation.rounds
        plan = plan_run(config, units, rounds)
        longer = config.replace({"federation.rounds": rounds + more})
        same_noise = dataclasses.replace(plan, rounds=rounds + more)
        found["epsilon"] = accounting.epsilon(same_noise.events, plan.delta, plan.accountant)
        again = plan_run(longer, units, rounds + more)
        found["noise"] = again.noise_multiplier / plan.noise_multiplier
    return found


def advice(found: Mapping[str, Any]) -> str:
    """One sentence on `still_rising`."""
    said = (
        f"The accuracy still rises ({found['points']:+.1f} points since round {found['since']}): "
        f"{found['more_rounds']} more rounds may help"
    )
    if "epsilon" in found:
        said += (
            f"; they cost epsilon {found['epsilon']:.2f} for the whole run at the same noise, or "
            f"{100 * (found['noise'] - 1):.0f} % more noise at the same epsilon"
        )
    return said + "."
