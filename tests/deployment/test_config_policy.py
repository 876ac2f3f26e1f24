"""A server's configuration, key by key, against an institution's settings."""

import dataclasses
import json
import math

import pytest

from client import config_policy
from client.config_policy import OWN, TAKEN
from client.settings import Settings
from fedlora.config.config import RunConfig
from fedlora.config.sections import INSTITUTIONS, MAX_LIST_TEXT
from fedlora.errors import InputError, Refusal

LABELS = ("card", "fraud", "loan")
SETTINGS = Settings(
    name="a",
    source="own.csv",
    ledger="l",
    state="s",
    models=("m",),
    labels=LABELS,
    strategies=("fedavg", "stack"),
    max_steps=20,
    max_length=40,
    max_rank=40,
    physical_batch=8,
    max_run_epsilon=8.0,
    max_delta=1e-4,
    secure_aggregation=True,
    min_honest=3,
    min_colluding=2,
)
BASE = {
    "model.name": "m",
    "data.source": INSTITUTIONS,
    "data.labels": json.dumps(LABELS),
    "training.batch-size": 0.25,
    "training.max-length": 16,
    "privacy.delta": 1e-4,
}
SECURE = {
    "privacy.trust": "secure-aggregation",
    "privacy.honest": 3,
    "privacy.colluding": 2,
    "federation.weighting": "public-size",
    "training.local-steps": 1,
}


def _code(asked):
    try:
        config_policy.apply(SETTINGS, BASE | asked)
    except Refusal as refusal:
        return refusal.code
    except InputError:
        return "bad-configuration"
    return ""


def test_the_institution_follows_or_decides_known_keys_and_leaves_the_rest_at_their_defaults():
    known = RunConfig().flat().keys()
    assert known >= TAKEN | OWN.keys()
    assert not TAKEN & OWN.keys()
    private = {key for key in known - TAKEN if key.startswith("privacy.")}
    assert private == {  # of the server alone
        "privacy.institution-epsilon",
        "privacy.institution-max-norm",
    }
    hostile = dict.fromkeys(known - TAKEN - {"data.source"}, "x" * 10**6)
    expected = config_policy.apply(SETTINGS, BASE)
    assert config_policy.apply(SETTINGS, BASE | hostile) == expected
    assert (expected.data.source, expected.training.physical_batch) == ("own.csv", 8)


@pytest.mark.parametrize(
    ("code", "key", "values"),
    [
        ("other-data", "data.source", ["", "own.csv"]),
        ("model-not-allowed", "model.name", ["n", "../x"]),
        ("other-labels", "model.task", ["sft"]),
        ("other-labels", "data.labels", ["[]", '["card"]', '["loan", "fraud", "card"]']),
        ("adapter-too-large", "adapter.rank", [41, 2**63 - 1]),
        ("adapter-too-large", "federation.strategy", ["stack"]),
        ("adapter-too-large", "adapter.target-modules", [json.dumps(["key"] * 257)]),
        ("too-many-steps", "training.local-steps", [21, 10**9]),
        ("rows-too-long", "training.max-length", [41, 10**9]),
        ("strategy-not-allowed", "federation.strategy", ["ffa", "os:system"]),
        ("dp-required", "privacy.epsilon", [math.inf]),
        ("epsilon-too-large", "privacy.epsilon", [8.001, 1e308]),
        ("other-unit", "privacy.unit", ["customer"]),
        ("seeded-noise", "privacy.noise", ["seeded"]),
        ("bad-configuration", "privacy.epsilon", [math.nan, -1.0, "x"]),
        ("bad-configuration", "privacy.max-grad-norm", [0.0, math.nan, 1.1e6]),
        ("bad-configuration", "training.batch-size", [-0.1, 1.5, math.nan]),
        ("bad-configuration", "training.optimizer", ["lbfgs", "x" * 10**6, 7]),
        ("bad-configuration", "adapter.rank", [0, -1, "x", True]),
        ("bad-configuration", "engine.thread", [1]),
        ("bad-configuration", "x" * 10**6, [1]),
    ],
)
def test_a_value_out_of_bounds_is_refused(code, key, values):
    assert {_code({key: value}) for value in values} == {code}


@pytest.mark.parametrize(
    ("code", "key", "value"),
    [
        ("", "privacy.honest", 3),
        ("", "privacy.colluding", 10**6),
        ("too-few-honest", "privacy.honest", 2),
        ("too-few-colluding", "privacy.colluding", 1),
        ("bad-configuration", "training.local-steps", 2),
        ("bad-configuration", "federation.strategy", "stack"),
        ("bad-configuration", "federation.weighting", "uniform"),
    ],
)
def test_secure_aggregation_has_its_own_limits(code, key, value):
    assert _code(SECURE | {key: value}) == code


def test_values_within_the_bounds_are_followed():
    for asked in ({"adapter.rank": 32}, {"training.local-steps": 20}, {"privacy.epsilon": 8.0}):
        assert _code(asked) == ""
    run = config_policy.apply(SETTINGS, BASE)
    assert config_policy.apply(SETTINGS, config_policy.server_values(run)) == run


def test_a_list_has_at_most_the_characters_that_an_institution_reads():
    labels = tuple(f"{n:0>12}" for n in range(2048))  # with quotes, comma and space 16 each
    own = dataclasses.replace(SETTINGS, labels=labels)
    asked = {**BASE, "data.labels": json.dumps(labels)}
    assert len(asked["data.labels"]) == MAX_LIST_TEXT
    assert config_policy.apply(own, asked).data.labels == labels
    with pytest.raises(InputError, match=f"at most {MAX_LIST_TEXT}"):
        config_policy.apply(own, asked | {"data.labels": json.dumps([*labels[1:], "x" * 13])})
