"""Epsilon and noise: against Google's dp-accounting, closed forms, and at the edges."""

import math
import warnings
from itertools import permutations
from statistics import NormalDist

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant as OpacusRDPAccountant
from scipy import stats

from fedlora.errors import InputError, Refusal
from fedlora.privacy import accounting
from fedlora.privacy.accounting import noise_multiplier
from fedlora.privacy.composition import Event, compose, epsilon

NEIGHBOURS = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE


def event(sigma: float, rate: float, steps: int) -> Event:
    return Event(noise_multiplier=sigma, sample_rate=rate, steps=steps)


def google(history, delta: float, accountant: str, interval: float = 1e-4) -> float:
    if accountant == "prv":
        reference = PLDAccountant(NEIGHBOURS, value_discretization_interval=interval)
    else:
        reference = RdpAccountant(OpacusRDPAccountant.DEFAULT_ALPHAS, NEIGHBOURS)
    for e in history:
        release = dp_accounting.GaussianDpEvent(e.noise_multiplier)
        if e.sample_rate < 1:
            release = dp_accounting.PoissonSampledDpEvent(e.sample_rate, release)
        reference.compose(release, e.steps)
    return reference.get_epsilon(delta)


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The exact epsilon of one Gaussian release (Balle & Wang 2018, theorem 8), by bisection."""
    phi = NormalDist().cdf
    low, high = 0.0, 100.0
    for _ in range(100):
        e = (low + high) / 2
        over = phi(0.5 / sigma - e * sigma) - math.exp(e) * phi(-0.5 / sigma - e * sigma) > delta
        low, high = (e, high) if over else (low, e)
    return high


HISTORIES = {
    "one kind of step": [event(2.0, 0.25, 40)],
    "the demo and a release of its own": [event(1.24, 0.25, 40), event(30.0, 1.0, 1)],
    "many small steps": [event(2.0, 128 / 3100, 1211)],
    "five different runs": [
        event(1.1, 0.25, 40),
        event(3.0, 0.04, 500),
        event(30.0, 1.0, 1),
        event(1.7, 0.5, 13),
        event(0.9, 0.01, 300),
    ],
}


@pytest.mark.parametrize("delta", [1e-5, 1e-6])
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("name", HISTORIES)
def test_epsilon_agrees_with_googles_accounting(name, accountant, delta) -> None:
    ours, reference = (f(HISTORIES[name], delta, accountant) for f in (epsilon, google))
    # Google's Renyi orders have fractions, which matter at a large epsilon.
    assert 0.99 * reference <= ours <= (1.01 if accountant == "prv" else 1.03) * reference


@pytest.mark.parametrize("sigma", [0.7, 1.0, 4.0, 30.0])
def test_one_release_without_sampling_matches_the_exact_gaussian_mechanism(sigma: float) -> None:
    exact = gaussian_epsilon(sigma, 1e-5)
    assert exact <= epsilon([event(sigma, 1.0, 1)], 1e-5, "prv") <= 1.01 * exact
    assert exact <= epsilon([event(sigma, 1.0, 1)], 1e-5, "rdp") <= 1.3 * exact


def test_n_releases_without_sampling_equal_one_with_a_root_n_less_noise() -> None:
    many, one = epsilon([event(10.0, 1.0, 25)], 1e-5), epsilon([event(2.0, 1.0, 1)], 1e-5)
    assert many == pytest.approx(one, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0])
def test_at_no_rate_from_three_tenths_on_is_epsilon_below_googles(rate) -> None:
    for sigma, steps in ((0.8, 1), (1.0, 10), (2.0, 40), (5.0, 100), (20.0, 300)):
        for extra in ([], [event(10.0, 1.0, 1)]):  # and with a release of another kind
            history = [event(sigma, rate, steps), *extra]
            ours = epsilon(history, 1e-5)
            # Google rounds losses up to its grid, which adds this much at most
            above = 1e-4 * math.sqrt(steps + len(extra)) * 4
            reference = google(history, 1e-5, "prv")
            assert reference - above <= ours <= 1.01 * reference + above, (sigma, steps)


# Where Opacus' PRV accountant returns inf or 0.00999, warns, raises or exhausts the memory.
EDGES = {
    "no sampling": event(1.0, 1.0, 1),
    "almost no sampling": event(1.0, 0.999999, 20),
    "a huge loss": event(0.1, 0.25, 40),
    "a huge number of lossy steps": event(0.5, 0.01, 1_000_000),
    "a huge number of quiet steps": event(100.0, 0.25, 100_000),
    "tiny sampling, many steps": event(2.0, 1e-4, 100_000),
    "a tiny epsilon": event(300.0, 0.25, 40),
}


@pytest.mark.parametrize("delta", [1e-5, 1e-9])
@pytest.mark.parametrize("name", EDGES)
def test_at_the_edges_epsilon_is_finite_and_never_below_the_truth(name: str, delta: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = epsilon([EDGES[name]], delta, "prv")
    # Google's figure on a fine grid, less what that grid may add, bounds the truth from below.
    lossy = EDGES[name].noise_multiplier <= 1
    reference = google([EDGES[name]], delta, "prv", interval=1e-3 if lossy else 1e-5)
    assert math.isfinite(ours)
    assert ours >= 0.99 * reference > 0


def test_the_noise_is_the_least_on_a_grid_of_four_digits() -> None:
    for target, sigma in ((1.0, 4.385), (3.0, 1.858), (8.0, 0.9964)):
        found = noise_multiplier(epsilon=target, delta=1e-5, sample_rate=0.2, steps=30)
        assert found == sigma
        assert epsilon([event(sigma, 0.2, 30)], 1e-5) <= target
        assert epsilon([event(sigma - (1e-4 if sigma < 1 else 1e-3), 0.2, 30)], 1e-5) > target


def test_noise_without_a_finite_epsilon_is_an_error_and_not_a_number() -> None:
    for accountant in ("prv", "rdp"):
        with pytest.raises(InputError, match="no finite epsilon"):
            epsilon([event(1e-170, 0.5, 1)], 1e-5, accountant)


@settings(max_examples=25, deadline=None)
@given(
    sigma=st.floats(0.6, 40),
    rate=st.sampled_from([0.01, 0.25, 0.7, 1.0]),
    steps=st.integers(1, 300),
    more=st.integers(1, 300),
    accountant=st.sampled_from(["prv", "rdp"]),
)
def test_more_steps_or_less_noise_never_cost_less(sigma, rate, steps, more, accountant) -> None:
    base = epsilon([event(sigma, rate, steps)], 1e-5, accountant)
    slack = 1.005  # PRV figures carry a positive error of at most 0.4 percent
    assert base <= slack * epsilon([event(sigma, rate, steps + more)], 1e-5, accountant) + 1e-6
    assert base <= slack * epsilon([event(sigma / 1.3, rate, steps)], 1e-5, accountant) + 1e-6


def test_an_empty_history_has_spent_nothing() -> None:
    assert epsilon((), 1e-5) == 0.0


def test_the_order_and_grouping_of_a_history_do_not_change_its_last_digit() -> None:
    parts = [event(2.0, 0.25, 10), event(1.5, 0.25, 7), event(2.0, 0.25, 30)]
    assert len({epsilon(order, 1e-5) for order in permutations(parts)}) == 1
    assert compose(parts) == (event(1.5, 0.25, 7), event(2.0, 0.25, 40))


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "named"),
    [
        (0.0, 0.5, 1, "noise_multiplier is 0.0"),
        (math.nan, 0.5, 1, "noise_multiplier is nan"),
        (math.inf, 0.5, 1, "noise_multiplier is inf"),
        (1.0, 0.0, 1, "sample_rate is 0.0"),
        (1.0, 1.01, 1, "sample_rate is 1.01"),
        (1.0, 0.5, 0, "steps is 0"),
    ],
)
def test_an_event_out_of_bounds_is_named(sigma, rate, steps, named) -> None:
    with pytest.raises(InputError, match=named):
        event(sigma, rate, steps)


def test_a_delta_or_accountant_out_of_bounds_is_named() -> None:
    for delta in (0.0, 1.0, -1e-5, math.nan):
        with pytest.raises(InputError, match=f"delta is {delta}"):
            epsilon([event(1.0, 0.5, 1)], delta)
    with pytest.raises(InputError, match="accountant is 'gdp'"):
        epsilon([event(1.0, 0.5, 1)], 1e-5, "gdp")


def test_what_was_spent_before_leaves_less_for_the_plan() -> None:
    before = [event(3.0, 0.1, 200), event(1.5, 0.25, 10)]
    arguments = {"epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.25, "steps": 40}
    fresh, after = noise_multiplier(**arguments), noise_multiplier(**arguments, history=before)
    assert after > fresh
    assert 7.9 < epsilon([*before, event(after, 0.25, 40)], 1e-5) <= 8.0
    assert epsilon([*before, event(fresh, 0.25, 40)], 1e-5) > 8.0


def test_a_plan_on_a_spent_budget_is_refused() -> None:
    with pytest.raises(Refusal) as refusal:
        noise_multiplier(
            epsilon=2, delta=1e-5, sample_rate=0.25, steps=1, history=[event(1.0, 0.25, 40)]
        )
    assert refusal.value.code == "budget-exhausted"


@pytest.mark.parametrize(
    ("records", "delta"),
    [(1, 0.1), (9, 0.01), (10, 0.01), (11, 0.001), (3100, 1e-5), (100_000, 1e-6)],
)
def test_the_public_delta_is_the_power_of_ten_at_or_below_a_tenth_of_one_in_n(
    records, delta
) -> None:
    assert accounting.public_delta(records) == delta
    assert delta <= 1 / (10 * records) < 10 * delta + 1e-18
    accounting.check_delta(delta, records)


@pytest.mark.parametrize(("records", "size"), [(1, 1), (2, 2), (3, 2), (255, 128), (256, 256)])
def test_the_public_size_is_the_power_of_two_at_or_below(records: int, size: int) -> None:
    assert accounting.public_size(records) == size
    assert accounting.is_size_class(records) == (records == size)
    assert not accounting.is_size_class(size + 0.5)


def test_a_delta_of_one_in_n_or_more_is_an_error_that_says_what_would_do() -> None:
    for delta in (1 / 3100, 0.5, 0.0, math.nan):
        with pytest.raises(InputError, match=r"below 1 / 3100 records .* use 1e-05"):
            accounting.check_delta(delta, 3100)
    for function in (accounting.public_delta, accounting.public_size):
        with pytest.raises(InputError, match="number of records is 0"):
            function(0)


# Sums of discrete shares of noise, under secure aggregation.


def _shared(sigma: float, rate: float, steps: int, shares: int) -> Event:
    return Event(noise_multiplier=sigma, sample_rate=rate, steps=steps, shares=shares)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_shares_of_noise_cost_what_googles_accounting_says_of_their_sum_and_of_one(accountant):
    history = [_shared(4.4, 0.2, 30, 34)]
    ours = epsilon(history, 1e-5, accountant)
    assert ours == pytest.approx(google([event(4.4, 0.2, 30)], 1e-5, accountant), rel=0.01)
    assert ours > epsilon([event(4.4, 0.2, 30)], 1e-5, accountant)
    alone = accounting.epsilon_alone(history, 1e-5, accountant)
    own_share = [event(4.4 / math.sqrt(34), 0.2, 30)]
    assert alone == pytest.approx(google(own_share, 1e-5, accountant), rel=0.04)


def test_without_shares_nothing_is_added_and_others_have_nothing_to_subtract():
    history = [event(2.0, 0.25, 40)]
    assert accounting.epsilon_alone(history, 1e-5, "rdp") == epsilon(history, 1e-5, "rdp")


def test_events_with_other_shares_are_other_mechanisms():
    both = [_shared(4.0, 0.2, 3, 2), _shared(4.0, 0.2, 2, 3), _shared(4.0, 0.2, 1, 2)]
    assert compose(both) == (_shared(4.0, 0.2, 4, 2), _shared(4.0, 0.2, 2, 3))
    plain = epsilon([event(4.0, 0.2, 6)], 1e-5, "rdp")
    assert plain < epsilon(both, 1e-5, "rdp") < 1.001 * plain


def test_a_plan_pays_for_the_discreteness_of_its_shares():
    common = {"epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.2, "steps": 30}
    sigma = noise_multiplier(**common, shares=34)
    assert 0.998 < epsilon([_shared(sigma, 0.2, 30, 34)], 1e-5) <= 1.0
    assert noise_multiplier(**common) <= sigma < 1.003 * noise_multiplier(**common)
    one_gaussian = [event(sigma, 0.2, 30)]
    assert epsilon(one_gaussian, 1e-5) < epsilon([_shared(sigma, 0.2, 30, 34)], 1e-5)


def test_a_grid_that_is_too_coarse_for_the_noise_has_no_epsilon():
    with pytest.raises(InputError, match="too coarse"):
        epsilon([_shared(0.5, 0.2, 10**6, 1000)], 1e-5, "rdp")


def _pmf(scale: float, most: int) -> np.ndarray:
    """The discrete Gaussian on -most .. most."""
    weights = np.exp(-(np.arange(-most, most + 1.0) ** 2) / (2 * scale**2))
    return weights / weights.sum()


def _rounded(scale: float, most: int) -> np.ndarray:
    """A Gaussian number, rounded, on -most .. most."""
    edges = np.arange(-most, most + 2) - 0.5
    return stats.norm.cdf(edges[1:] / scale) - stats.norm.cdf(edges[:-1] / scale)


@pytest.mark.parametrize("scale", [2.0, 3.0, 8.0])
def test_a_discrete_gaussian_is_as_close_to_a_rounded_one_as_the_proof_says(scale):
    """The ratio is within exp(B^2 / (8 s^2)) up to B s, enumerated; and the total variation."""
    most = int(12 * scale)
    discrete, rounded, x = _pmf(scale, most), _rounded(scale, most), np.arange(-most, most + 1)
    for bound in (1.0, 2.0, 5.0):
        inside = np.abs(x) <= bound * scale
        loss = np.abs(np.log(discrete[inside] / rounded[inside])).max()
        assert loss <= bound**2 / (8 * scale**2)
    assert 0.5 * np.abs(discrete - rounded).sum() <= 1 / (40 * scale**2)


@pytest.mark.parametrize(("scale", "shares"), [(1.5, 2), (2.0, 3), (4.0, 5)])
def test_rounded_shares_add_up_to_a_rounded_sum_with_uniforms(scale, shares):
    """The law of the sum is the density of a Gaussian plus k uniforms, at the integers."""
    most = int(16 * scale * shares)
    one = _rounded(scale, most)
    total = one
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    fine = 200  # points in a unit; uniforms are averaged over their width by the trapezoidal rule
    grid = np.arange(-(len(total) // 2) * fine, len(total) // 2 * fine + 1) / fine
    density = stats.norm.pdf(grid, scale=scale * math.sqrt(shares))
    window = np.r_[0.5, np.ones(fine - 1), 0.5] / fine
    for _ in range(shares):
        density = np.convolve(density, window, mode="same")
    aliasing = shares * math.exp(-((math.pi * scale) ** 2) / 2)
    np.testing.assert_allclose(total, density[::fine], atol=2e-6 + aliasing)


@pytest.mark.parametrize(
    ("scale", "shares", "target"), [(4.0, 2, 1.0), (4.0, 3, 0.5), (3.0, 4, 1.0)]
)
def test_the_sum_of_shares_is_as_private_as_stated_by_enumeration(scale, shares, target):
    """The exact delta of x + shares and x + 1 + shares against the Gaussian's and the two terms."""
    most = int(12 * scale)
    total = _pmf(scale, most)
    for _ in range(shares - 1):
        total = np.convolve(total, _pmf(scale, most))
    here, moved = np.append(total, 0.0), np.append(0.0, total)
    exact = np.maximum(moved - math.exp(target) * here, 0).sum()
    sigma = scale * math.sqrt(shares)  # sensitivity 1
    bound = 6.0
    loss = shares * bound**2 / (8 * scale**2)
    tail = shares * 2 * math.exp(-(bound**2) / 2 + bound / scale)
    e = target - 2 * loss
    phi = NormalDist().cdf
    gaussian = phi(0.5 / sigma - e * sigma) - math.exp(e) * phi(-0.5 / sigma - e * sigma)
    assert 0 < exact <= math.exp(loss) * gaussian + tail * (1 + math.exp(e + loss))
    assert exact > 0.1 * (
        phi(0.5 / sigma - target * sigma) - math.exp(target) * phi(-0.5 / sigma - target * sigma)
    )  # the bound is about this very mechanism
