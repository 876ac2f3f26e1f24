import json
from pathlib import Path

import pytest

from fedlora import accounting
from fedlora.accounting import Event
from fedlora.errors import InputError
from server import institution_privacy


def test_the_plan_fits_the_budget_and_counts_what_was_asked(tiny_config):
    config = tiny_config(**{"privacy.institution-epsilon": 5.0, "federation.rounds": 12})
    mechanism = institution_privacy.plan(config, 20, participations=12)
    assert mechanism is not None and mechanism.delta == 1e-3
    assert 4.9 < mechanism.spent([12, 3]) <= 5.0
    assert mechanism.spent([]) == 0.0
    event = Event(noise_multiplier=mechanism.noise_multiplier, sample_rate=1.0, steps=3)
    assert mechanism.spent([3, 1]) == accounting.epsilon((event,), 1e-3, "rdp")


def test_it_is_off_unless_asked_for(tiny_config):
    assert institution_privacy.plan(tiny_config(), 4, 3) is None


def test_a_delta_that_means_nothing_is_refused(tiny_config):
    config = tiny_config(**{"privacy.institution-epsilon": 5.0, "privacy.institution-delta": 0.25})
    with pytest.raises(InputError, match=r"institution-delta is 0\.25, but must be below"):
        institution_privacy.plan(config, 4, 3)


def test_weights_other_than_uniform_are_refused(tiny_config):
    with pytest.raises(InputError, match="weighting is 'public-size'"):
        tiny_config(**{"privacy.institution-epsilon": 5.0, "federation.weighting": "public-size"})


@pytest.mark.parametrize("epsilon", ["8.0", "inf"])
def test_it_composes_with_example_level_dp_and_is_stated(tiny_config, simulate_run, epsilon):
    config = tiny_config(**{"privacy.institution-epsilon": 5.0, "privacy.epsilon": epsilon})
    simulate_run(config)
    directory = Path(config.run_dir)
    stated = json.loads((directory / "privacy.json").read_text())
    level = stated["institution_level"]
    assert level["steps"] == 3 and 4.9 < level["epsilon"] <= 5.0
    assert level["noise"] == "seeded" and "protects nobody" in stated["protects"]
    assert len(stated["institutions"]) == (4 if epsilon == "8.0" else 0)
    rounds = [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]
    assert rounds[0]["institution_epsilon"] < rounds[-1]["institution_epsilon"] == level["epsilon"]
    assert all(not r["reported"] for r in rounds)  # exact losses would bypass the noise
