"""Three of ten institutions send 100 x their update, sign flipped."""

import csv
import dataclasses
import random

import pytest

from client.institution import Institution
from fedlora.models.adapters import AdapterState

ATTACKERS = (1, 4, 7)
RULES = ("median", "multi-krum:0.3")
TOPICS = {
    "loan": ["mortgage", "interest", "lender", "repay", "collateral"],
    "card": ["plastic", "swipe", "chargeback", "limit", "cashback"],
    "fraud": ["stolen", "phishing", "scam", "identity", "forged"],
}


@pytest.fixture
def attack(monkeypatch):
    """From its call on, the attackers attack."""
    honest = Institution.answer

    def answer(who, order):
        update = honest(who, order)
        if who.index not in ATTACKERS:
            return update
        flipped = {
            name: order.adapter[name] - 100 * (tensor - order.adapter[name])
            for name, tensor in update.adapter.items()
        }
        return dataclasses.replace(update, adapter=AdapterState(flipped))

    return lambda: monkeypatch.setattr(Institution, "answer", answer)


@pytest.fixture
def accuracy(tiny_config, simulate_run, tmp_path):
    """Accuracy after 80 rounds without DP on 2,000 complaints dealt out evenly.

    Small server steps and the mean of the last adapters: under attack Adam's steps of a fixed size
    leave the median up to seven points short.
    """
    draw, path = random.Random(7), tmp_path / "complaints.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for _ in range(2000):
            topic = draw.choice(list(TOPICS))
            words = draw.choices(TOPICS[topic], k=3) + draw.choices(["the", "bank", "my"], k=3)
            draw.shuffle(words)
            rows.writerow([" ".join(words), topic])

    def go(rule, name):
        config = {
            "run-dir": str(tmp_path / name),
            "privacy.epsilon": float("inf"),
            "data.source": str(path),
            "data.partition": "iid",
            "data.institutions": 10,
            "training.learning-rate": 0.1,
            "training.batch-size": 10**6,
            "training.physical-batch": 128,
            "federation.rounds": 80,
            "federation.server-learning-rate": 0.008,
            "federation.robust": rule,
        }
        return simulate_run(tiny_config(**config))["accuracy"]

    return go


@pytest.mark.slow
def test_each_rule_withstands_it_and_no_rule_does_not(accuracy, attack):
    clean = accuracy("none", "clean")
    attack()
    for rule in RULES:
        assert accuracy(rule, rule) >= clean - 0.03, rule
    assert accuracy("none", "open") < clean - 0.3
