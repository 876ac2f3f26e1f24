"""What is wrong with a run before it starts: findings on records, budgets and noise.

A finding is a warning, or voids the result. A run with the latter is refused unless ``accept``
names it. `findings` reads the records of a simulation, and spends nothing.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.config import schemes
from fedlora.config.config import RunConfig
from fedlora.data.shards import Federation
from fedlora.errors import InputError
from fedlora.privacy import accounting
from fedlora.privacy.budget import delta_of, plan_run

MAX_DELTA = 1e-3
"""The largest delta that is no finding."""
MIN_REACH = 10.0
"""The least `reach` of a run that can learn; benchmarks/LOG.md has the runs behind it."""
ALIKE = (
    "write names alike in both sources, or lower data.min-records or data.institutions where they "
    "leave institutions out"
)
"""The remedy for rows of a test source whose institutions do not train."""
NAMED = 5
"""The most names in one finding."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding.

    Args:
        name: A short fixed word; one of `fedlora.config.config.ACCEPTABLE` if it voids the result.
        text: The finding with its figures and a remedy.
        voids: Whether it voids the result, so that a run must accept it.
    """

    name: str
    text: str
    voids: bool = False


def findings(config: RunConfig, records: Federation, participations: int) -> list[Finding]:
    """The findings on a simulation, those that void its result first.

    Args:
        config: The run.
        records: Its records.
        participations: The most rounds for which one institution may be asked.

    Raises:
        InputError: If no noise reaches the budget, or delta is not below 1 / records.
    """
    found: list[Finding] = []
    if config.privacy.enabled:
        plans = plans_of(config, records.units, participations)
        found += [*_split_units(config, records), *_delta(config, records)]
        found += noise(config, plans, participations)
    return sorted(found, key=lambda finding: not finding.voids)


def refuse(config: RunConfig, found: Sequence[Finding]) -> None:
    """Refuse a run with findings that void its result and that it does not accept.

    Raises:
        InputError: Naming the findings and the option that accepts them.
    """
    void = [finding for finding in found if finding.voids and finding.name not in config.accept]
    if void:
        names = [finding.name for finding in void]
        how = f"--set accept={','.join(names)} (or accept = {json.dumps(names)} in the file)"
        raise InputError(
            "; ".join(finding.text for finding in void)
            + f". The result would be void; to run all the same, add {how}"
        )


def reach(config: RunConfig, plans: Sequence[accounting.PrivacyPlan], participations: int) -> float:
    """The largest ratio of signal to noise in one direction of the aggregate, over a whole run.

    All gradients of all records are taken to have the clipped length and one direction. A run's
    sum of such steps grows with their number T, and its noise with the root of T. Sizes are size
    classes, of which an institution has fewer than twice the units, so the signal can be almost
    twice this. Real gradients agree far less. `MIN_REACH` was found for this figure.

    Args:
        config: A run under DP.
        plans: The plan of each institution.
        participations: The most rounds for which one institution may be asked.
    """
    sizes = np.array([plan.size_class for plan in plans], dtype=np.float64)
    weights = np.ones(len(plans)) if config.federation.weighting == "uniform" else sizes
    # under secure aggregation each institution adds a share of the noise of the sum
    own = [plan.share_noise_multiplier for plan in plans]
    noise = np.array(own) / np.array([plan.expected_batch_size for plan in plans])
    steps = participations * config.training.local_steps
    return float(math.sqrt(steps) * weights.sum() / np.sqrt(((weights * noise) ** 2).sum()))


def plans_of(
    config: RunConfig, units: Iterable[int], participations: int
) -> list[accounting.PrivacyPlan]:
    """Each institution's plan by its number of units; one computation for each size class."""
    return [plan_run(config, accounting.public_size(count), participations) for count in units]


def class_records(records: Federation) -> dict[str, int]:
    """Class -> its training records; empty for sft."""
    if not records.labels:
        return {}
    counts = np.bincount(records.all_train.targets, minlength=len(records.labels))
    return dict(zip(records.labels, counts.tolist(), strict=True))


def some(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def lost(counts: Mapping[str, int]) -> dict[str, int]:
    """Rows that a run leaves out as they cannot be used: what they have -> number."""
    return {
        reason: counts[key]
        for key, reason in (
            ("without_text", "no text"),
            ("without_label", "no label"),
            ("without_institution", "no institution"),
            ("duplicates_removed", "a copy among the held-out rows"),
        )
        if counts[key]
    }


def not_measured(records: Federation) -> int:
    """The number of rows of ``data.test-source`` of institutions that do not train."""
    return records.counts["test_rows_dropped"]


def _split_units(config: RunConfig, records: Federation) -> list[Finding]:
    count = records.counts["units_at_several"]
    if not count:
        return []
    larger = "epsilon and delta are as many times larger"
    if config.privacy.shares_noise:  # they are in one sum
        larger = "epsilon is as many times larger, and delta by far more,"
    return [
        Finding(
            name="split-units",
            text=f"{count} values of {config.privacy.unit!r} have records at several institutions, "
            f"and the promise is for those at one: together {larger} as there are institutions; "
            "count on that, or give one of them all records",
        )
    ]


def _delta(config: RunConfig, records: Federation) -> list[Finding]:
    above: list[str] = []
    for name, units in zip(records.names, records.units, strict=True):
        delta = delta_of(config.privacy, units)
        # Cards quote this finding, so neither it nor its absence may tell the number of units.
        size = accounting.public_size(units)
        bound = min(MAX_DELTA, 1 / (10 * size))
        if delta > bound:
            above.append(f"{name} (size class {size}: {delta:g})")
    if not above:
        return []
    remedy = "lower privacy.delta" if config.privacy.delta else "set privacy.delta"
    kind = schemes.inner(config.data.partition).partition(":")[0]
    if kind == "natural" and config.privacy.unit == "record":
        remedy = f"raise data.min-records (now {config.data.min_records}) or {remedy}"
    elif kind not in ("natural", "python"):  # drawn: all rows, among so many institutions
        remedy = f"lower data.institutions (now {config.data.institutions}) or {remedy}"
    return [
        Finding(
            name="delta",
            text=f"{len(above)} of {len(records.names)} institutions would get a delta above "
            f"{MAX_DELTA:g} or 1 / (10 x size class), so that the promise may fail for somebody: "
            f"{some(above)}; {remedy}",
            voids=True,
        )
    ]


def noise(
    config: RunConfig, plans: Sequence[accounting.PrivacyPlan], participations: int
) -> list[Finding]:
    """The finding on a run under DP in which no adapter can learn; empty for any other.

    Args:
        config: A run under DP.
        plans: The plan of each institution.
        participations: The most rounds for which one institution may be asked.
    """
    ratio = reach(config, plans, participations)
    if ratio >= MIN_REACH:
        return []
    loudest = max(plan.noise_multiplier for plan in plans)
    return [
        Finding(
            name="noise",
            text=f"nothing can be learned at privacy.epsilon {config.privacy.epsilon:g}: the noise "
            f"multiplier is {loudest:.3g}, and if all gradients agreed, the whole run's signal by "
            f"size classes would be {ratio:.2g} times its noise (runs that learn have over "
            f"{MIN_REACH:g}); raise privacy.epsilon, or the number of records or institutions",
            voids=True,
        )
    ]
