"""Whether a run still improves at its end, and what more rounds would cost."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedlora.config.config import RunConfig
from fedlora.data.shards import Shard
from fedlora.errors import InputError
from fedlora.privacy import composition
from fedlora.privacy.budget import plan_run
from fedlora.rounding import at_most
from fedlora.runs.comparison import text_numbers

STANDARD_ERRORS = 2.0
"""A run may still rise if its accuracy grew by more than so many standard errors since the middle.
These are the errors of other held-out texts. They do not cover the noise of training, which moves
an adapter from round to round: so a run that does not rise may do it, too."""
MIN_MEASURED_SHARE = 2 / 3
"""The last measurement of a single round's adapter counts only after this share of the rounds."""


def still_rising(
    config: RunConfig, records: Sequence[Mapping[str, Any]], texts: float, units: int
) -> dict[str, Any]:
    """What more rounds would cost a run whose accuracy may still rise at its end.

    Rounds that are measured by the mean of several adapters (``federation.average-last``) are left
    out: a mean is better than one adapter of the same round also where nothing rises.

    Args:
        config: The run.
        records: Its lines of ``rounds.jsonl``.
        texts: `independent_texts` of the held-out rows.
        units: Units of privacy of the institution with the fewest.

    Returns:
        Empty where the accuracy does not rise, or was measured in less than three rounds, or not
        after `MIN_MEASURED_SHARE`. Else ``points``, by which it grew from the measurement nearest
        to the middle, of the round ``since``, to the last one, of the round ``until``;
        ``more_rounds``, half as many again; under DP ``epsilon``, the whole longer run's at the
        same noise, and ``noise``, the factor of the noise that keeps epsilon.
    """
    rounds, first_mean = config.federation.rounds, config.federation.averaged_from
    measured = {
        int(r["round"]): float(r["metrics"]["accuracy"])
        for r in records
        if "accuracy" in r["metrics"] and r["round"] <= first_mean  # of one adapter
    }
    if len(measured) < 3 or not texts:
        return {}
    metrics = [r["metrics"] for r in records]
    texts = min(texts, *(m.get("generated", texts) for m in metrics))  # answers to a part of them
    last = max(measured)
    since = min((r for r in measured if r < last), key=lambda r: abs(r - last / 2))
    error = math.sqrt(sum(measured[r] * (1 - measured[r]) / texts for r in (since, last)))
    rise = measured[last] - measured[since]
    played = max(r["round"] for r in records)
    if last < MIN_MEASURED_SHARE * played or rise <= STANDARD_ERRORS * error:
        return {}
    more = math.ceil(rounds / 2)
    found: dict[str, Any] = {
        "points": 100 * rise,
        "since": since,
        "until": last,
        "more_rounds": more,
    }
    if config.privacy.enabled and not config.federation.institutions_per_round:
        plan = plan_run(config, units, rounds)
        longer = config.replace({"federation.rounds": rounds + more})
        same_noise = dataclasses.replace(plan, rounds=rounds + more)
        with contextlib.suppress(InputError):  # they may have no plan, and the run is over
            again = plan_run(longer, units, rounds + more)
            epsilon = composition.epsilon(same_noise.events, plan.delta)
            found |= {
                "epsilon": epsilon,
                "noise": again.noise_multiplier / plan.noise_multiplier,
            }
    return found


def independent_texts(held_out: Shard) -> float:
    """The number of rows of different texts that tell as much as these rows, 0 without rows.

    Rows of one text are right or wrong together: n rows of texts with m_1, m_2, ... of them tell as
    much as n^2 / (m_1^2 + m_2^2 + ...) rows of different texts.

    Reference: Kish (1965), Survey sampling.
    """
    if not len(held_out):
        return 0.0
    times = np.bincount(text_numbers(held_out)).astype(np.float64)
    return float(times.sum() ** 2 / (times**2).sum())


def advice(found: Mapping[str, Any]) -> str:
    """One sentence on `still_rising`."""
    said = (
        f"The accuracy may still rise ({found['points']:+.1f} points since round {found['since']} "
        f"to round {found['until']}): {found['more_rounds']} more rounds may help"
    )
    if "epsilon" in found:
        said += (
            f"; they cost epsilon {at_most(found['epsilon'], 3)} for the whole run at the same "
            f"noise, or {100 * (found['noise'] - 1):.0f} % more noise at the same epsilon"
        )
    return said + "."
