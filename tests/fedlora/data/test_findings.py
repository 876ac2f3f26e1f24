"""Findings on records and noise before a run: what is found, what is not, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fedlora.config.config import from_flat
from fedlora.config.sections import MIN_NATURAL_RECORDS
from fedlora.data import findings
from fedlora.data.data import shard_of
from fedlora.data.encoding import Encoded
from fedlora.data.findings import MAX_DELTA
from fedlora.data.shards import Federation, Shard
from fedlora.errors import InputError
from fedlora.privacy import accounting


def shard(targets, first=0) -> Shard:
    """Rows of one token each, numbered from ``first``."""
    rows = len(targets)
    ids = [[first + row] for row in range(rows)]
    return shard_of(Encoded(ids=ids, targets=list(targets), truncated=[False] * rows))


def federation(sizes, labels=("loan", "card"), counts=(), left_out=()) -> Federation:
    """Institutions of these sizes, with the classes in turn and 200 held-out rows."""
    rows = sum(sizes)
    targets = [i % max(1, len(labels)) for i in range(rows)]
    held_out = [0] * 200
    known = ("rows", "test_rows", "without_text", "without_label", "without_institution",
             "test_rows_dropped", "units_at_several", "duplicates_removed")  # fmt: skip
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    units = np.arange(rows) - np.repeat(starts[:-1], sizes)
    return Federation(
        names=tuple(f"bank-{i}" for i in range(len(sizes))),
        labels=tuple(labels),
        counts={**dict.fromkeys(known, 0), "rows": rows + 200, **dict(counts)},
        left_out=dict(left_out),
        all_train=replace(shard(targets), units=units),
        train_bounds=starts,
        all_held_out=shard(held_out, first=rows),
        held_out_bounds=np.array([0] * len(sizes) + [200]),
    )


def config(**values):
    base = {
        "data.source": "x.csv",
        "data.min-records": 1,
        "training.batch-size": 0.25,
        "federation.rounds": 10,
    }
    return from_flat(base | values)


def found(records, **values):
    return {f.name: f for f in findings.findings(config(**values), records, 10)}


def test_an_ordinary_federation_has_no_finding() -> None:
    assert found(federation([100, 200, 150])) == {}


@pytest.mark.parametrize(
    ("sizes", "delta", "bad"),
    [
        ([100, 100], 0.0, 0),
        ([1, 100], 0.0, 1),  # 1e-1
        ([7, 100], 0.0, 1),  # 1e-2
        ([8, 100], 0.0, 0),  # 1e-3
        ([100, 120], 2e-3, 2),
        ([40, 128], 9e-4, 1),  # above 1 / (10 x 128), below 1 / (10 x 32)
        ([40, 255], 7e-4, 0),  # of the same size class: a card quotes the finding
    ],
)
def test_a_delta_above_the_bound_of_an_institution_voids_the_result(sizes, delta, bad) -> None:
    said = found(federation(sizes), **{"privacy.delta": delta}).get("delta")
    assert (said is not None) == bool(bad)
    if said:
        assert said.voids and said.text.startswith(f"{bad} of {len(sizes)} institutions")
        assert "(size class " in said.text and "units:" not in said.text  # cards quote it


def test_the_default_minimum_of_records_is_the_least_whose_default_delta_is_no_finding() -> None:
    def delta(units):
        return accounting.public_delta(accounting.most_of_class(units))

    assert delta(MIN_NATURAL_RECORDS) <= MAX_DELTA < delta(MIN_NATURAL_RECORDS - 1)


def test_noise_under_which_nothing_can_be_learned_voids_the_result() -> None:
    records = federation([100, 200, 150])
    said = found(records, **{"privacy.epsilon": 0.01})["noise"]
    plans = findings.plans_of(config(**{"privacy.epsilon": 0.01}), records.units, 10)
    assert said.voids and f"{max(p.noise_multiplier for p in plans):.3g}" in said.text


def test_shares_of_noise_reach_as_far_as_the_noise_of_their_sum() -> None:
    records = federation([64] * 8)
    shared = {
        "privacy.trust": "secure-aggregation",
        "privacy.honest": 8,
        "privacy.colluding": 1,
        "privacy.delta": 1e-5,
        "federation.weighting": "public-size",
    }
    run = config(**shared)
    (plan, *_) = plans = findings.plans_of(run, records.units, 10)
    # 10 rounds: the signal is 8 batches in each, the noise one draw in each
    by_hand = 10 * 8 * 16 / (math.sqrt(10) * plan.noise_multiplier)
    assert findings.reach(run, plans, 10) == pytest.approx(by_hand)


def test_a_void_run_is_refused_until_each_of_its_findings_is_accepted() -> None:
    records = federation([1, 100])
    run = config(**{"privacy.epsilon": 0.01})
    void = findings.findings(run, records, 10)
    with pytest.raises(InputError, match=r"to run all the same, add --set accept=delta,noise"):
        findings.refuse(run, void)
    with pytest.raises(InputError, match=r"to run all the same, add --set accept=noise \("):
        findings.refuse(run.replace({"accept": "delta"}), void)
    findings.refuse(run.replace({"accept": "delta,noise"}), void)


@pytest.mark.parametrize(
    ("values", "weighting", "least"),
    [
        ({}, "public-size", MIN_NATURAL_RECORDS),
        ({"data.partition": "natural:bank"}, "public-size", MIN_NATURAL_RECORDS),
        ({"federation.weighting": "uniform", "data.min-records": 1}, "uniform", 1),
        ({"federation.robust": "median"}, "uniform", MIN_NATURAL_RECORDS),
        ({"federation.robust": "multi-krum"}, "public-size", MIN_NATURAL_RECORDS),
        ({"privacy.institution-epsilon": 8}, "uniform", MIN_NATURAL_RECORDS),
        ({"privacy.epsilon": "inf"}, "public-size", MIN_NATURAL_RECORDS),
        ({"data.partition": "iid", "data.institutions": 4}, "public-size", 1),
        (
            {"data.source": "institutions", "data.institutions": 4, "data.labels": "a,b"},
            "uniform",
            1,
        ),
    ],
)
def test_a_simulation_weighs_by_size_and_a_natural_partition_leaves_tiny_institutions_out(
    values, weighting, least
) -> None:
    made = from_flat(values)
    assert (made.federation.weighting, made.data.min_records) == (weighting, least)
