"""A run that still rises says so, and what more rounds would cost."""

import numpy as np
import pytest

from fedlora.data.shards import concatenate
from fedlora.errors import InputError
from fedlora.privacy import composition
from fedlora.privacy.budget import plan_run
from fedlora.rounding import at_most
from server.population import population_of
from server.trend import advice, independent_texts, still_rising


def lines(**accuracies):
    return [
        {"round": int(number), "metrics": {} if value is None else {"accuracy": value}}
        for number, value in accuracies.items()
    ]


def test_a_rise_beyond_two_standard_errors_is_told_with_its_cost(tiny_config):
    config = tiny_config(**{"federation.rounds": 8})
    # sqrt(2 x 0.25 / 200) = 0.05: the accuracies may differ by 0.1, and 0.45 + 0.13 do not
    found = still_rising(config, lines(**{"2": 0.4, "4": 0.45, "6": None, "8": 0.58}), 200, 90)
    assert found["points"] == pytest.approx(13)
    assert (found["since"], found["until"], found["more_rounds"]) == (4, 8, 4)
    plan = plan_run(config, 90, 8)
    (event,) = plan.events
    assert event.steps == 8
    longer = composition.Event(
        noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate, steps=12
    )
    assert found["epsilon"] == composition.epsilon([longer], plan.delta, "rdp")
    assert found["epsilon"] > 8
    twelve = plan_run(config.replace({"federation.rounds": 12}), 90, 12)
    assert found["noise"] == twelve.noise_multiplier / plan.noise_multiplier > 1
    said = advice(found)
    assert "may still rise (+13.0 points since round 4 to round 8)" in said
    assert f"epsilon {at_most(found['epsilon'], 3)} for" in said


@pytest.mark.parametrize(
    "accuracies",
    [
        {"2": 0.4, "4": 0.45, "8": 0.54},  # within two standard errors
        {"2": 0.4, "4": 0.6, "8": 0.4},
        {"4": 0.2, "8": 0.9},  # two measurements tell no trend
        {},
    ],
)
def test_a_run_that_does_not_rise_gives_no_advice(tiny_config, accuracies):
    config = tiny_config(**{"federation.rounds": 8})
    assert still_rising(config, lines(**accuracies), 200, 90) == {}


def test_without_dp_more_rounds_cost_no_epsilon(tiny_config):
    config = tiny_config(**{"federation.rounds": 8, "privacy.epsilon": float("inf")})
    found = still_rising(config, lines(**{"2": 0.1, "4": 0.2, "8": 0.9}), 200, 90)
    assert set(found) == {"points", "since", "until", "more_rounds"}
    assert "epsilon" not in advice(found)


def rising(tiny_config, accuracies, **changes):
    free = {"federation.rounds": 10, "privacy.epsilon": float("inf"), **changes}
    config = tiny_config(**free)
    return still_rising(config, lines(**accuracies), 200, 90)


def test_a_mean_of_adapters_is_not_compared_with_a_single_one(tiny_config):
    """The mean of rounds 9 and 10 is better than one adapter."""
    level = {"3": 0.55, "5": 0.6, "8": 0.6, "9": 0.72, "10": 0.8}
    assert rising(tiny_config, level) == {}
    found = rising(tiny_config, level | {"8": 0.8})  # of round 8 alone
    assert (found["since"], found["until"]) == (5, 8)


def test_rows_of_one_text_count_as_one_row(tiny_config):
    held_out = population_of(tiny_config()).held_out
    assert held_out is not None
    texts = independent_texts(held_out)
    assert 0 < texts <= len(held_out)
    assert independent_texts(concatenate([held_out] * 4)) == pytest.approx(texts)
    assert independent_texts(held_out.select(np.array([], dtype=np.int64))) == 0
    # six rows of one text and two of others: 8^2 / (36 + 1 + 1)
    unequal = held_out.select(np.array([0] * 6 + [1, 2]))
    assert len({held_out.row(i).tobytes() for i in (0, 1, 2)}) == 3
    assert independent_texts(unequal) == pytest.approx(64 / 38)


def test_only_rows_with_a_generated_answer_count(tiny_config):
    config = tiny_config(**{"federation.rounds": 8, "privacy.epsilon": float("inf")})
    measured = lines(**{"2": 0.4, "4": 0.45, "8": 0.58})
    assert still_rising(config, measured, 200, 90)
    measured[-1]["metrics"]["generated"] = 100
    assert still_rising(config, measured, 200, 90) == {}


def test_a_price_that_cannot_be_computed_does_not_end_a_run_that_is_over(tiny_config, monkeypatch):
    def plan(config, units, rounds):
        if rounds > 8:
            raise InputError("too coarse on its grid")
        return plan_run(config, units, rounds)

    config = tiny_config(**{"federation.rounds": 8})
    monkeypatch.setattr("server.trend.plan_run", plan)
    found = still_rising(config, lines(**{"2": 0.1, "4": 0.2, "8": 0.9}), 200, 90)
    assert set(found) == {"points", "since", "until", "more_rounds"}
