"""What a promise means for an attacker, against curves that are known exactly."""

import math
from statistics import NormalDist

import pytest

from fedlora.privacy import composition, odds
from fedlora.privacy.composition import Event

NORMAL = NormalDist()


def gaussian(mu):
    """One Gaussian mechanism with this sensitivity over noise."""
    return (Event(noise_multiplier=1 / mu, sample_rate=1.0, steps=1),)


@pytest.mark.parametrize(
    ("prior", "epsilon", "after"),
    [(0.5, 0.0, 0.5), (0.5, 1.0, 0.731059), (0.5, 8.0, 0.999665), (0.01, math.log(99), 0.5),
     (0.5, math.inf, 1.0)],
)  # fmt: skip
def test_a_suspicion_rises_by_at_most_the_factor_of_epsilon(prior, epsilon, after):
    assert odds.suspicion(prior, epsilon) == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0, 3.0])
def test_the_bounds_lie_just_above_the_exact_curve_of_a_gaussian(mu):
    """TPR = Phi(Phi^-1(FPR) + mu) is the best attack; half right answers more is Phi(mu / 2)."""
    history = gaussian(mu)
    found = odds.bounds(history, composition.epsilon(history, 1e-5), 1e-5)
    for rate, share in found["found"].items():
        exact = NORMAL.cdf(NORMAL.inv_cdf(float(rate)) + mu)
        assert exact <= share <= exact + 0.015, rate
    assert NORMAL.cdf(mu / 2) <= found["right"] <= NORMAL.cdf(mu / 2) + 0.01


@pytest.mark.parametrize("mu", [0.2, 0.5, 1.0, 2.0])
def test_the_suspicion_is_exceeded_more_often_than_delta_and_no_more_often_than_said(mu):
    """For a Gaussian, L is normal with mean mu^2 / 2 and deviation mu."""
    history = gaussian(mu)
    epsilon = composition.epsilon(history, 1e-5)
    exact = NORMAL.cdf(mu / 2 - epsilon / mu)
    said = odds.bounds(history, epsilon, 1e-5)["exceeded"]
    assert 2e-5 < exact <= said <= 5 * exact


def test_the_run_s_noise_bounds_an_attack_far_below_epsilon_and_delta_alone():
    history = (Event(noise_multiplier=0.9967, sample_rate=0.2, steps=30),)  # the demo
    epsilon = composition.epsilon(history, 1e-5)
    assert 7.9 < epsilon <= 8.01
    found = odds.bounds(history, epsilon, 1e-5)
    alone = min(1.0, math.exp(epsilon) * 0.01 + 1e-5)
    assert alone == 1.0 and found["found"]["0.01"] < 0.2 and found["right"] < 0.76
    assert found["found"]["0.001"] < found["found"]["0.01"]


def test_no_release_and_hopeless_noise_have_bounds_too():
    nothing = odds.bounds((), 0.0, 1e-5)
    assert nothing["suspicion"] == {"0.01": pytest.approx(0.01), "0.5": 0.5}
    assert nothing["exceeded"] == 0
    assert nothing["right"] == pytest.approx(0.5, abs=1e-5)
    assert nothing["found"]["0.01"] == pytest.approx(0.01, abs=2e-5)
    history = (Event(noise_multiplier=0.02, sample_rate=1.0, steps=1),)
    epsilon = composition.epsilon(history, 1e-5)
    assert epsilon > 710  # beyond what exp can hold
    found = odds.bounds(history, epsilon, 1e-5)
    assert found["right"] == pytest.approx(1.0) and found["found"]["0.001"] == 1.0
