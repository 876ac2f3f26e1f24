"""Shamir's shares against polynomials that were evaluated by hand."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.secure import shamir


def number(share):
    return int.from_bytes(share, "big")


def dealt(secret, threshold, points):
    """Point -> share."""
    return dict(zip(points, shamir.split(secret, threshold, points), strict=True))


@st.composite
def splits(draw):
    """A secret, the threshold, and all shares."""
    secret, count = draw(st.binary(min_size=32, max_size=32)), draw(st.integers(1, 14))
    threshold = draw(st.integers(1, count))
    return secret, threshold, dealt(secret, threshold, range(1, count + 1))


def share(value):
    return value.to_bytes(shamir.SHARE_BYTES, "big")


def test_the_prime_is_the_least_above_2_to_the_256():
    # Fermat's test to base 3 refutes every odd number before it; ten bases do not refute it
    assert shamir.PRIME == 2**256 + 297
    assert all(pow(3, m - 1, m) != 1 for m in range(2**256 + 1, shamir.PRIME, 2))
    assert all(pow(base, shamir.PRIME - 1, shamir.PRIME) == 1 for base in range(2, 12))


def test_shares_are_the_values_of_the_polynomial_by_hand():
    # 3 x^2 + 2 x + 5 at 1, 2, 3, 4
    assert [*map(number, shamir.evaluate([3, 2, 5], [1, 2, 3, 4]))] == [10, 21, 38, 61]


@pytest.mark.parametrize("points", [*itertools.permutations((1, 2, 3, 4), 3)])
def test_any_three_shares_of_a_parabola_give_its_value_at_0_and_elsewhere(points):
    values = {1: 10, 2: 21, 3: 38, 4: 61}
    shares = {point: share(values[point]) for point in points}
    assert shamir.combine(shares) == 5
    assert shamir.combine(shares, 5) == 90
    assert shamir.combine(shares, points[0]) == values[points[0]]


@settings(max_examples=40, deadline=None)
@given(split=splits(), data=st.data())
def test_as_many_shares_as_the_threshold_give_the_secret(split, data):
    secret, threshold, shares = split
    chosen = data.draw(st.permutations(list(shares)))[:threshold]
    found = shamir.combine({point: shares[point] for point in chosen})
    assert found.to_bytes(shamir.SECRET_BYTES, "big") == secret


def test_one_share_fewer_fits_every_secret():
    points = range(1, 6)
    shares = dealt(b"\1" * 32, 4, points)
    three = {point: shares[point] for point in (1, 3, 5)}
    for secret in (0, 7, 2**256 - 1):
        # the polynomial of degree 3 through the three shares and this secret
        through = three | {0: share(secret)}
        fourth = share(shamir.combine(through, 2))
        assert shamir.combine(three | {2: fourth}) == secret
