"""A run that still rises says so, and what more rounds would cost."""

import pytest

from fedlora import accounting
from fedlora.budget import plan_run
from server.trend import advice, still_rising


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
    assert (found["since"], found["more_rounds"]) == (4, 4)
    plan = plan_run(config, 90, 8)
    (event,) = plan.events
    assert event.steps == 8
    longer = accounting.Event(
        noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate, steps=12
    )
    assert found["epsilon"] == accounting.epsilon([longer], plan.delta, "rdp")
    assert found["epsilon"] > 8
    twelve = plan_run(config.replace({"federation.rounds": 12}), 90, 12)
    assert found["noise"] == twelve.noise_multiplier / plan.noise_multiplier > 1
    said = advice(found)
    assert "+13.0 points since round 4" in said
    assert f"epsilon {found['epsilon']:.2f}" in said


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
    assert set(found) == {"points", "since", "more_rounds"}
    assert "epsilon" not in advice(found)
