"""What is wrong with a run before it starts: findings on records, budgets and noise.

A finding is a warning, or voids the result. A run with the latter is refused unless ``accept``
names it. `findings` reads the records of a simulation and the names of its ledgers, and spends
nothing.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.config.config import RunConfig
from fedlora.data.shards import Federation, Shard
from fedlora.data.text import MISSING, folded
from fedlora.errors import InputError
from fedlora.files import expanded
from fedlora.privacy import accounting
from fedlora.privacy.budget import delta_of, plan_run
from fedlora.runs.run_files import ledgers

MAX_DELTA = 1e-3
"""The largest delta that is no finding."""
MIN_REACH = 10.0
"""The least `reach` of a run that can learn; benchmarks/LOG.md has the runs behind it."""
MAX_LOST_SHARE = 0.05
"""The largest share of rows that cannot be used (`lost`) that is no finding."""
MAX_SEEN_SHARE = 0.01
"""The largest share of held-out rows with the tokens of a training row that is no finding."""
MIN_CLASS_RECORDS = 8
MIN_HELD_OUT_ROWS = 100
MIN_NUMBERS = 10
"""The least number of labels that are taken for measurements, where all of them are numbers."""
MAX_SIZE_RATIO = 8
"""The largest ratio of size classes that is no finding where all institutions weigh the same."""
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
    found = [
        *_labels(records),
        *_lost_rows(records),
        *_left_out(config, records),
        *_not_measured(config, records),
    ]
    rows = len(records.all_held_out)
    if 0 < rows < MIN_HELD_OUT_ROWS:
        found.append(
            Finding(
                name="few-held-out",
                text=f"there are {rows} held-out rows: the standard error of an accuracy is up to "
                f"{50 / math.sqrt(rows):.0f} points; raise data.test-fraction or give more data",
            )
        )
    found += [*_missing_institutions(records), *_seen(config, records)]
    if config.privacy.enabled:
        found += [
            *_split_units(config, records),
            *_seeded_ledger(config),
            *_other_ledgers(config, records),
            *_delta(config, records),
            *_noises(config, records, participations),
        ]
    return sorted(found, key=lambda finding: not finding.voids)


def refuse(config: RunConfig, found: Sequence[Finding]) -> None:
    """Refuse a run with findings that void its result and that it does not accept.

    Raises:
        InputError: Naming the findings and the option that accepts them.
    """
    void = [finding for finding in found if finding.voids and finding.name not in config.accept]
    if void:
        names = [finding.name for finding in void]
        how = (
            f"accept = {json.dumps(names)} to the configuration"
            if config.deployed
            else " ".join(f"--accept {name}" for name in names)
            + f" (in Python accept={json.dumps(names)})"
        )
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


def _labels(records: Federation) -> list[Finding]:
    found: list[Finding] = []
    labels = records.labels
    numbers = [value for label in labels if (value := _number(label)) is not None]
    whole = all(value == int(value) for value in numbers)
    if len(numbers) == len(labels) >= MIN_NUMBERS and (not whole or len(labels) > 5 * MIN_NUMBERS):
        found.append(
            Finding(
                name="labels",
                text=f"the {len(labels)} labels are all numbers ({some(labels)}): they look like "
                "measurements, and each different number would be a class; set data.label to a "
                "column of classes, or put the numbers into ranges",
                voids=True,
            )
        )
    alike: dict[str, list[str]] = {}
    for label in labels:
        # a sign at an end is part of the label: a+ and a-
        spelled = re.sub(r"(?<=\w)[\W_]+(?=\w)", " ", folded(label))
        value = _number(label)  # 1 and 1.0, which pandas writes where another cell is empty
        alike.setdefault(spelled if value is None else str(value), []).append(label)
    if pairs := [" / ".join(group) for group in alike.values() if len(group) > 1]:
        found.append(
            Finding(
                name="similar-labels",
                text=f"labels that differ in spelling only are different classes: "
                f"{some(pairs)}; write them alike, or list data.labels",
            )
        )
    if missing := [label for label in labels if folded(label) in MISSING]:
        found.append(
            Finding(
                name="missing-labels",
                text=f"a class is called {some(missing)}, as missing values are; if they are, "
                "leave these cells empty, and the rows are left out",
            )
        )
    counts = class_records(records)
    if rare := [f"{label} ({n})" for label, n in counts.items() if n < MIN_CLASS_RECORDS]:
        found.append(
            Finding(
                name="rare-labels",
                text=f"{len(rare)} of {len(labels)} classes have fewer than {MIN_CLASS_RECORDS} "
                f"training records: {some(rare)}; no model learns them under DP",
            )
        )
    return found


def _number(label: str) -> float | None:
    try:
        value = float(label.replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


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


def _lost_rows(records: Federation) -> list[Finding]:
    total = records.counts["rows"] + records.counts["test_rows"]
    reasons = lost(records.counts)
    number = sum(reasons.values())
    if number <= MAX_LOST_SHARE * total:
        return []
    said = ", ".join(f"{count:,} have {reason}" for reason, count in reasons.items())
    return [
        Finding(
            name="lost-rows",
            text=f"{number:,} of {total:,} rows ({100 * number / total:.0f} %) are left out: "
            f"{said}; mend these rows if they matter",
        )
    ]


def _left_out(config: RunConfig, records: Federation) -> list[Finding]:
    if not records.left_out:
        return []
    names = [f"{name} ({rows})" for name, rows in records.left_out.items()]
    least = f"they have fewer than data.min-records ({config.data.min_records}) training records"
    if config.data.institutions:
        least += (
            f", or are not among the data.institutions ({config.data.institutions}) largest, which "
            "0 would lift"
        )
    return [
        Finding(
            name="left-out",
            text=f"{len(names):,} institutions with {sum(records.left_out.values()):,} training "
            f"rows are left out: {least}. The largest are {some(names)}",
        )
    ]


def not_measured(config: RunConfig, records: Federation) -> int:
    """The number of rows of ``data.test-source`` of institutions that do not train in any view."""
    return records.counts["test_rows_dropped"] if config.data.view == "all" else 0


def _not_measured(config: RunConfig, records: Federation) -> list[Finding]:
    lost, rows = not_measured(config, records), records.counts["test_rows"]
    if not lost:
        return []
    return [
        Finding(
            name="test-rows-left-out",
            text=f"{lost:,} of {rows:,} rows of data.test-source are not measured: no institution "
            f"of theirs trains. Those that do are {some(records.names)}; {ALIKE}",
        )
    ]


def _missing_institutions(records: Federation) -> list[Finding]:
    # a name of an institution is that of a directory too, without signs such as /
    words = {re.sub(r"\W", "", word) for word in MISSING} - {""}
    missing = [name for name in records.names if re.sub(r"\W", "", folded(name)) in words]
    if not missing:
        return []
    return [
        Finding(
            name="missing-institutions",
            text=f"an institution is called {some(missing)}, as missing values are; if they are, "
            "leave these cells empty, and the rows are left out",
        )
    ]


def _seen(config: RunConfig, records: Federation) -> list[Finding]:
    def inputs(shard: Shard) -> list[bytes]:
        """What the model reads of each row: for sft the prompt."""
        ends = shard.lengths if records.labels else shard.targets
        return [shard.row(i)[: ends[i]].tobytes() for i in range(len(shard))]

    trained = set(inputs(records.all_train))
    held_out = inputs(records.all_held_out)
    seen = sum(tokens in trained for tokens in held_out)
    if seen <= MAX_SEEN_SHARE * len(held_out):
        return []
    return [
        Finding(
            name="seen-held-out",
            text=f"{seen:,} of {len(held_out):,} held-out rows have the same tokens as a training "
            "row, so that accuracies are too high; their texts differ after training.max-length "
            f"({config.training.max_length}) tokens or in signs that the tokenizer drops: raise "
            "training.max-length, or write such texts alike",
        )
    ]


def _other_ledgers(config: RunConfig, records: Federation) -> list[Finding]:
    """Ledgers beside those of this run: no ledger sees what the same records spent in another."""
    if not config.privacy.ledger:
        return []
    directory, own = expanded(config.privacy.ledger), {f"{name}.db" for name in records.names}
    others = [file.stem for file in ledgers(directory) if file.name not in own]
    if not others:
        return []
    return [
        Finding(
            name="other-ledgers",
            text=f"privacy.ledger is {directory}, which has {len(others)} ledgers of other names "
            f"than this run's institutions ({some(others)}): where these hold the same records, no "
            "limit counts what both spend; assign records as the earlier run did, or lower "
            "privacy.max-epsilon by what was spent there",
        )
    ]


def _split_units(config: RunConfig, records: Federation) -> list[Finding]:
    count = records.counts["units_at_several"]
    if not count or config.data.view.startswith("only:"):
        return []
    larger = "epsilon and delta are as many times larger"
    if config.privacy.shares_noise or config.data.view == "pooled":  # they are in one sum
        larger = "epsilon is as many times larger, and delta by far more,"
    return [
        Finding(
            name="split-units",
            text=f"{count} values of {config.privacy.unit!r} have records at several institutions, "
            f"and the promise is for those at one: together {larger} as there are institutions; "
            "count on that, or give one of them all records",
        )
    ]


def _seeded_ledger(config: RunConfig) -> list[Finding]:
    if config.privacy.noise != "seeded" or not config.privacy.ledger:
        return []
    return [
        Finding(
            name="seeded-ledger",
            text="privacy.noise is seeded, which protects nobody, and privacy.ledger's ledgers "
            "will count this run as if its noise were secret, as will every later run on them; "
            "leave privacy.ledger out, or set privacy.noise to secure",
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
    kind = config.data.partition.partition(":")[0]
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


def _noises(config: RunConfig, records: Federation, participations: int) -> list[Finding]:
    plans = plans_of(config, records.units, participations)
    found = noise(config, plans, participations)
    classes = [plan.size_class for plan in plans]
    if config.federation.weighting == "uniform" and max(classes) > MAX_SIZE_RATIO * min(classes):
        smallest = records.names[int(np.argmin(classes))]
        found.append(
            Finding(
                name="weighting",
                text=f"the size classes of institutions range from {min(classes)} to "
                f"{max(classes)}, and federation.weighting is uniform: the noisiest update, that "
                f"of {smallest}, counts as much as the best; use public-size",
            )
        )
    return found
