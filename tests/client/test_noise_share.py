"""An institution's vector under secure aggregation: rounding, noise and guards."""

import math

import numpy as np
import pytest

from client.noise_share import noised_words
from fedlora.errors import Refusal
from fedlora.privacy import discrete_gaussian
from fedlora.privacy.accounting import PrivacyPlan
from fedlora.privacy.streams import RandomSource
from fedlora.secure import noise_shares

KEY = RandomSource(b"k" * 32).child("noise-share").key


def _plan(sigma=2.0, honest=4, max_grad_norm=0.5) -> PrivacyPlan:
    return PrivacyPlan(
        epsilon=1.0,
        delta=1e-5,
        noise_multiplier=sigma,
        sample_rate=0.2,
        size_class=64,
        max_grad_norm=max_grad_norm,
        steps_per_round=1,
        rounds=3,
        honest=honest,
    )


def _words(sums, plan=None, institutions=5, key=KEY):
    return noised_words(sums, plan or _plan(), RandomSource(key), institutions)


def test_words_are_the_rounded_sum_and_a_share_of_noise():
    sums = np.array([0.0, 0.5, -0.5, 0.3, 2.0**-38])
    share = discrete_gaussian.draw(RandomSource(KEY), _plan().share_scale(5), 5)
    rounded = [0, 2**36, -(2**36), round(0.6 * 2**36), 0]  # the grid is 0.5 x 2^-36
    assert (_words(sums) - share).tolist() == rounded


def test_the_shares_of_those_who_must_be_honest_have_the_noise_of_the_plan():
    """The deviation of a sum of 4 shares of 50,000 numbers; false alarms are rarer than 2e-7."""
    n, plan = 50_000, _plan()
    shares = [_words(np.zeros(n), key=bytes([number]) * 32) for number in range(plan.honest)]
    noise = sum(shares) * noise_shares.grid(plan.max_grad_norm)
    planned = plan.noise_multiplier * (
        plan.max_grad_norm + math.sqrt(n) * noise_shares.grid(plan.max_grad_norm)
    )
    assert abs(np.mean(noise**2) / planned**2 - 1) < 5.4 * math.sqrt(2 / n)
    assert abs(np.corrcoef(shares[0], shares[1])[0, 1]) < 5.4 / math.sqrt(n)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sum_that_is_not_finite_trips_a_guard(value):
    with pytest.raises(Refusal, match="guard-range"):
        _words(np.array([0.0, value]))


def test_a_sum_beyond_the_integers_is_cut_and_its_noise_kept():
    """A refusal would depend on the records."""
    noise = _words(np.zeros(3), institutions=4)
    largest = 2**59  # half of 2^62 / 4; the grid is 2^-37
    words = _words(np.array([2.0**27, -(2.0**80), largest * 2.0**-37]), institutions=4)
    assert (words - noise).tolist() == [largest, -largest, largest]
    assert 4 * np.abs(words).max() < 2**62


@pytest.mark.parametrize("wrong", [0.5, 1.5])
def test_noise_of_another_deviation_trips_a_guard(monkeypatch, wrong):
    draw = discrete_gaussian.draw
    monkeypatch.setattr(discrete_gaussian, "draw", lambda s, scale, n: draw(s, wrong * scale, n))
    with pytest.raises(Refusal, match="guard-noise"):
        _words(np.zeros(2000))


@pytest.mark.parametrize("changes", [{"sigma": 0.0}, {"sigma": math.inf}, {"honest": 0}])
def test_a_vector_without_noise_trips_a_guard(changes):
    with pytest.raises(Refusal, match="guard-no-noise"):
        _words(np.zeros(10), _plan(**changes))


@pytest.mark.parametrize(
    ("institutions", "honest", "colluding", "least"),
    [(39, 34, 3, 37), (5, 2, 1, 4), (4, 2, 1, 3), (100, 2, 1, 51), (3, 2, 1, 3)],
)
def test_the_least_number_of_survivors_has_the_shares_and_the_signatures(
    institutions, honest, colluding, least
):
    assert noise_shares.least_survivors(institutions, honest, colluding) == least
    threshold = noise_shares.threshold(institutions, colluding)
    assert 2 * threshold - institutions > colluding  # two sets have an honest one in common
    assert 2 * (threshold - 1) - institutions <= colluding
