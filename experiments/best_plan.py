"""``fedlora plan --best``: the rounds and the sample rate with the least noise for some compute.

In each step an institution adds noise of deviation sigma C to the sum of its clipped gradients. The
mean over K institutions with N units together, at sample rate q, so has noise of deviation
sigma sqrt(K) / (q N) C in each coordinate (with institutions of one size, or weighted by size).
Noise of different steps is independent, so over T steps it grows by sqrt(T), while T steps in one
direction grow by T. The search compares plans by noise over length of the sum of all steps, which
is sigma sqrt(K) / (q N sqrt(T)).
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from fedlora.config.config import RunConfig
from fedlora.config.sections import MIN_SAMPLE_RATE
from fedlora.data import records
from fedlora.errors import InputError
from fedlora.privacy import accounting
from fedlora.privacy.budget import plan_run
from fedlora.terminal import Terminal
from server import population

FACTORS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)
"""Rounds that are tried, over those in which rate 1 uses the compute up."""
TOLERANCE = 0.05
"""Among plans whose noise is within this share of the least, the one with most rounds is marked."""
CAVEAT = (
    "Noise is in units of the clipping bound C, in each coordinate. The noise of the sum is noise "
    "over length of the sum of all steps if each mean gradient had length C and all one direction. "
    "Real gradients are shorter and turn on the way, which this table does not count: with fewer "
    "rounds each step must be longer for the same distance, so try such a plan before you trust "
    f"it. The best plan is the one with most rounds within {TOLERANCE:.0%} of the least noise; now "
    "is the configuration's own."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A plan of a whole run.

    Args:
        rounds: Rounds.
        sample_rate: Share of an institution's units in a step; the mean where it differs.
        noise_multiplier: Deviation of a step's noise over C; the largest where it differs.
        noise: Deviation of the noise of a step's mean gradient, over C.
        noise_of_sum: Noise over length of the sum of all steps.
        records: Expected units trained on, by all institutions in all rounds.
        configured: Whether this is the configuration's own plan.
        best: Whether this is the plan to choose.
    """

    rounds: int
    sample_rate: float
    noise_multiplier: float
    noise: float
    noise_of_sum: float
    records: int
    configured: bool = False
    best: bool = False


def search(config: RunConfig, *, compute: int | None, units: Sequence[int]) -> list[Row]:
    """Plans with the same compute, by rounds, and the configuration's own plan.

    Args:
        config: The run.
        compute: The most expected units to train on; None: those of the configuration's own plan.
        units: The number of units of each institution.

    Returns:
        At least one row; one is the best. A configuration that needs more than ``compute`` is not
        among them.

    Raises:
        InputError: Without DP, with institution-level DP, or if ``compute`` is out of bounds.
    """
    if not config.privacy.enabled:
        raise InputError(
            "privacy.epsilon is inf, so there is no noise to plan; set it to a finite number"
        )
    if config.privacy.hides_institutions:
        raise InputError(
            f"privacy.institution-epsilon is {config.privacy.institution_epsilon:g}, but --best "
            "does not count the server's noise; set it to inf"
        )
    if compute is not None and compute < 1:
        raise InputError(f"--compute is {compute}; it must be at least 1")
    population.check_federation(config, len(units))
    own = dataclasses.replace(_row(config, units), configured=True)
    budget = own.records if compute is None else compute
    steps = config.training.local_steps
    once = steps * sum(units) * _asked(config, len(units)) / len(units)  # a round at rate 1
    fewest = max(1, math.floor(budget / once))
    tried = sorted({math.ceil(fewest * factor) for factor in FACTORS})
    rates = {rounds: min(1.0, budget / (once * rounds)) for rounds in tried}
    if min(rates.values()) < MIN_SAMPLE_RATE:
        raise InputError(
            f"--compute is {budget}, less than a millionth of the {sum(units)} records in a step; "
            "raise it"
        )
    rows = [
        _row(config.replace({"federation.rounds": n, "training.sample-rate": rate}), units)
        for n, rate in rates.items()
    ]
    if own.records <= budget:
        rows = [row for row in rows if not _same_plan(row, own)] + [own]
    return _marked(rows)


def _same_plan(row: Row, other: Row) -> bool:
    return row.rounds == other.rounds and math.isclose(row.sample_rate, other.sample_rate)


def units_of(config: RunConfig, given: int | None) -> list[int]:
    """The number of units of each institution.

    Args:
        config: The run.
        given: The units of each, for a deployment, where only institutions see their records.

    Raises:
        InputError: If ``given`` is missing for a deployment, below 1, or given for a simulation.
    """
    if not config.deployed:
        if given is not None:
            raise InputError(
                f"--records is {given}, but the config names records of its own; leave it out"
            )
        return records.load(config).units
    if given is None or given < 1:
        raise InputError(
            "data.source is 'institutions', so nobody here sees the records; give --records, the "
            "number of records of an institution, at least 1"
        )
    return [given] * config.data.institutions


def show(rows: Iterable[Row], console: Terminal) -> None:
    """Print the plans as a table, with what they leave out."""
    shown = Table(
        "rounds", "rate", "noise multiplier", "noise of a step", "noise of the sum", "records", ""
    )
    for row in rows:
        marks = ["best"] * row.best + ["now"] * row.configured
        shown.add_row(
            str(row.rounds),
            f"{row.sample_rate:.4g}",
            f"{row.noise_multiplier:.4g}",
            f"{row.noise:.4g}",
            f"{row.noise_of_sum:.4g}",
            f"{row.records:,}",
            ", ".join(marks),
        )
    console.print(shown)
    console.print(CAVEAT)


def as_json(rows: Iterable[Row]) -> dict[str, Any]:
    """The plans as plain values."""
    return {"plans": [dataclasses.asdict(row) for row in rows]}


def _asked(config: RunConfig, institutions: int) -> int:
    """Institutions of a round."""
    return min(config.federation.institutions_per_round or institutions, institutions)


def _row(config: RunConfig, units: Sequence[int]) -> Row:
    """The plan of a configuration."""
    count, rounds = len(units), config.federation.rounds
    asked = _asked(config, count)
    of_one = config.federation.participations(count)
    sizes = [accounting.public_size(n) for n in units]
    plans = [plan_run(config, size, of_one) for size in sizes]
    weights = {
        "uniform": [1.0] * count,
        "public-size": [float(size) for size in sizes],
    }[config.federation.weighting]
    # Under secure aggregation an institution adds its share of the noise.
    # A step is divided by the expected units of the size class: those of an institution at the
    # upper end of its class count for almost twice their mean.
    length = sum(w * n / size for w, n, size in zip(weights, units, sizes, strict=True))
    noise = math.hypot(
        *(
            w * plan.share_noise_multiplier / plan.expected_batch_size
            for w, plan in zip(weights, plans, strict=True)
        )
    )
    step = noise / length * math.sqrt(count / asked)
    steps = rounds * config.training.local_steps
    batch = sum(plan.sample_rate * n for plan, n in zip(plans, units, strict=True))
    return Row(
        rounds=rounds,
        sample_rate=batch / sum(units),
        noise_multiplier=max(plan.noise_multiplier for plan in plans),
        noise=step,
        noise_of_sum=step / math.sqrt(steps),
        records=round(steps * batch * asked / count),
    )


def _marked(rows: Sequence[Row]) -> list[Row]:
    """The rows by rounds, with the best one marked."""
    least = min(row.noise_of_sum for row in rows)
    close = [row for row in rows if row.noise_of_sum <= (1 + TOLERANCE) * least]
    best = max(close, key=lambda row: row.rounds)
    return [
        dataclasses.replace(row, best=row is best)
        for row in sorted(rows, key=lambda row: row.rounds)
    ]
