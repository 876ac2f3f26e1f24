"""Bounds as text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.rounding import at_least, at_most, duration, number


@pytest.mark.parametrize(
    ("value", "digits", "up", "down"),
    [
        (7.99363, 3, "8", "7.99"),
        (4.715, 2, "4.8", "4.7"),
        (126.53, 3, "127", "126"),
        (8.0, 3, "8", "8"),
        (0.1, 3, "0.1", "0.1"),
        (9.9996, 4, "10", "9.999"),
        (0.0, 3, "0", "0"),
        (math.inf, 3, "inf", "inf"),
    ],
)
def test_bounds_are_rounded_to_their_own_side(value, digits, up, down):
    assert at_most(value, digits) == up and at_least(value, digits) == down


@given(st.floats(1e-12, 1e12), st.integers(2, 6))
def test_a_shown_bound_holds_and_is_near(value, digits):
    high, low = float(at_most(value, digits)), float(at_least(value, digits))
    assert low <= value <= high
    assert high - low <= value * 10.0 ** (1 - digits) * 1.0001


def test_figures_that_are_not_finite_have_a_text():
    assert [number(value) for value in (0.25, "inf", None)] == ["0.2500", "inf", "–"]


def test_durations_are_in_minutes_from_two_on():
    assert [duration(seconds) for seconds in (0.4, 119, 150)] == ["0 s", "119 s", "2.5 min"]
