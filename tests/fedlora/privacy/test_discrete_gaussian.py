"""The discrete Gaussian: its law by hand, its moments, and decisions within a float's error."""

import math
from fractions import Fraction
from itertools import product

import mpmath
import numpy as np
import pytest
from scipy import stats

from fedlora.privacy import discrete_gaussian
from fedlora.privacy.discrete_gaussian import bernoulli_exp, draw
from fedlora.privacy.streams import RandomSource

SCALE = 3.0
T = 4  # floor(SCALE) + 1


class Script:
    """A source whose words are given, in their order."""

    def __init__(self, *words: int, further: tuple[int, ...] = ()) -> None:
        self._words, self._further = list(words), further

    def child(self, *_: object) -> "Script":
        return Script(*self._further)

    def words(self, n: int) -> np.ndarray:
        taken, self._words = self._words[:n], self._words[n:]
        assert len(taken) == n, "more bits were drawn than the decision needs"
        return np.array(taken, np.uint64)


def _probability(gamma: Fraction) -> mpmath.mpf:
    with mpmath.workdps(60):
        return mpmath.exp(-mpmath.mpf(gamma.numerator) / gamma.denominator)


def _gamma(u: int, v: int) -> Fraction:
    """The paper's exponents of its two rejections, added up."""
    s2 = Fraction(SCALE) ** 2
    return Fraction(u, T) + (u + T * v - s2 / T) ** 2 / (2 * s2)


def test_each_trial_gives_the_law_of_the_formula_by_exact_arithmetic():
    """P(u, v, sign) P(accepted) is exp(-x^2 / (2 s^2)) times a constant, for every x alike."""
    s2 = Fraction(SCALE) ** 2
    constants = {
        v + _gamma(u, v) - Fraction(u + T * v) ** 2 / (2 * s2)  # -log of what is left
        for u, v in product(range(T), range(20))
    }
    assert len(constants) == 1


@pytest.mark.parametrize(("u", "v", "negative"), list(product(range(T), range(4), (0, 1))))
def test_a_trial_accepts_up_to_the_last_word_below_its_probability(u, v, negative):
    """The word at the boundary, its neighbours, and the bits after the first 64."""
    x = (u + T * v) * (-1 if negative else 1)
    with mpmath.workdps(60):
        block = int(mpmath.exp(-v - mpmath.mpf(1) / 2) * 2**64)
        share = _probability(_gamma(u, v)) * 2**64
        word = int(mpmath.floor(share))
        next_word = int(mpmath.floor((share - word) * 2**64))
    expected = [] if not x and negative else [x]
    lots = 2 * u + negative

    def found(last: int, *further: int) -> list[int]:
        source = Script(lots, block, last)
        return discrete_gaussian._trials(source, Script(*further), SCALE, 1).tolist()  # pyright: ignore

    assert found(word - 1) == expected
    assert found(word + 1) == []
    assert found(word, next_word - 1) == expected
    assert found(word, next_word + 1) == []


def test_the_geometric_part_counts_the_powers_of_1_over_e_above_one_number():
    words, further, expected = [], [], []
    for count in range(1, 6):
        with mpmath.workdps(60):
            bound = mpmath.exp(-count) * 2**64
            word = int(mpmath.floor(bound))
            next_word = int(mpmath.floor((bound - word) * 2**64))
        words += [word, word, word - 1, word + 1]
        further += [next_word - 1, next_word + 1]
        expected += [count, count - 1, count, count - 1]
    words.append(0)  # the number is 2^-129, which is exp(-89.4)
    further += [0, 2**63]
    expected.append(89)
    found = discrete_gaussian._geometric(Script(*words), Script(*further), len(words))  # pyright: ignore
    assert found.tolist() == expected


def test_decisions_by_exact_arithmetic_alone_give_the_same_numbers(monkeypatch):
    usual = [draw(RandomSource(bytes(32)), s, 500) for s in (0.7, 3.0, 2.0**33.3)]
    monkeypatch.setattr(discrete_gaussian, "_DOUBT", 2.0**70)
    exact = [draw(RandomSource(bytes(32)), s, 500) for s in (0.7, 3.0, 2.0**33.3)]
    assert all((a == b).all() for a, b in zip(usual, exact, strict=True))


def test_an_event_is_decided_by_its_rational_exponent_where_the_float_is_wrong():
    """The float says 1 / e; the exact exponent is a little smaller or larger."""
    with mpmath.workdps(60):
        word = int(_probability(Fraction(1)) * 2**64)
    little = Fraction(1, 2**60)
    for exponent, expected in ((1 - little, True), (1 + little, False)):
        said = bernoulli_exp(
            np.array([word], np.uint64), np.array([1.0]), lambda _, e=exponent: e, Script()
        )
        assert said.tolist() == [expected]


@pytest.mark.parametrize("scale", [0.4, 1.0, SCALE, 20.0])
def test_the_frequencies_are_those_of_the_law(scale):
    """Chi-square against the exact probabilities; false alarms are rarer than 1e-5.

    Rare values count with the rarest common one, so that no cell has an expectation below 5.
    """
    n = 200_000
    most = int(12 * scale) + 2
    weights = np.exp(-(np.arange(-most, most + 1) ** 2) / (2 * scale**2))
    expected = n * weights / weights.sum()
    found = np.bincount(draw(RandomSource(b"f" * 32), scale, n) + most, minlength=2 * most + 1)
    common = expected >= 5
    cells, of = found[common], expected[common]
    cells[0] += found[~common].sum()
    of[0] += expected[~common].sum()
    statistic = (np.square(cells - of) / of).sum()
    assert stats.chi2.sf(statistic, len(of) - 1) > 1e-6


def test_a_large_scale_gives_a_gaussian_with_that_deviation():
    """Moments within 5.5 standard errors, two chi-squares of 64 cells: false alarms below 4e-7."""
    n, scale = 300_000, 2.0**33 + 0.5
    found = draw(RandomSource(b"m" * 32), scale, n)
    normal = found / scale
    assert abs(normal.mean()) < 5.5 / math.sqrt(n)
    assert abs((normal**2).mean() - 1) < 5.5 * math.sqrt(2 / n)
    assert abs((normal**3).mean()) < 5.5 * math.sqrt(15 / n)
    assert abs((normal**4).mean() - 3) < 5.5 * math.sqrt(96 / n)
    cells = np.bincount((stats.norm.cdf(normal) * 64).astype(int), minlength=64)
    assert stats.chisquare(cells).pvalue > 1e-7
    last = np.bincount(found & 63, minlength=64)  # the last bits are uniform at such a scale
    assert stats.chisquare(last).pvalue > 1e-7


def test_the_numbers_follow_from_the_key_alone():
    one, same, other = (draw(RandomSource(key * 32), 1e9, 1000) for key in (b"a", b"a", b"b"))
    assert (one == same).all() and (one != other).all()


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**-11, 2.0**47, math.inf, math.nan])
def test_a_scale_out_of_bounds_is_refused(scale):
    with pytest.raises(ValueError, match="the scale is"):
        draw(RandomSource(bytes(32)), scale, 1)
