r"""Exact draws from the discrete Gaussian :math:`\mathcal N_{\mathbb Z}(0, s^2)`.

The probability of an integer x is proportional to exp(-x^2 / (2 s^2)), to the last bit: no
probability is rounded to a float. A draw is the rejection sampler of the paper, with its two
rejections joined into one:

1. U is uniform on 0 .. t - 1 with t = floor(s) + 1, the sign is uniform, and V is geometric,
   P(V >= v) = exp(-v). So X = U + t V has a step function as its law.
2. X is accepted with probability exp(-gamma), where
   :math:`\gamma = \frac{U}{t} + \frac{(X - s^2 / t)^2}{2 s^2} = \frac{X^2}{2 s^2} - V +
   \frac{s^2}{2 t^2} \ge 0`. A zero with a negative sign is rejected, as zero would count twice.

Each decision compares a uniform real number with exp(-gamma). Of the number the first 64 bits are
drawn. Where they and float64 decide beyond doubt, they do. Otherwise gamma is a rational number,
exp(-gamma) is computed to as many digits as needed, and further bits are drawn.

Reference: Canonne, Kamath and Steinke (2020), The Discrete Gaussian for Differential Privacy,
arXiv 2004.00010, algorithms 1 to 3.
"""

import decimal
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from fedlora.arrays import Floats, Int64
from fedlora.privacy.streams import RandomSource

MIN_SCALE, MAX_SCALE = 2.0**-10, 2.0**46
"""Bounds of s. Up to the largest one X is exact in float64, except with probability exp(-127)."""
_DOUBT = 2.0**-36
"""Relative error of a probability in float64, at most. gamma is a sum of terms of at most 100 where
the probability is above 2^-60, so its error is below 100 x 2^-50; numpy's exp adds some 2^-52."""
_RESOLUTION = 2.0**-52
"""Error of the first 64 bits of a uniform number as a float64, at most; and what is below it."""
_TRIALS = 1 << 14  # at a time, so that the scratch arrays stay in the processor's cache
_WORD = Fraction(1, 1 << 64)

Uint64 = npt.NDArray[np.uint64]


def draw(source: RandomSource, scale: float, n: int) -> Int64:
    """Draw ``n`` independent discrete Gaussian numbers.

    Args:
        source: The source of all random bits.
        scale: s, the exact parameter of the law (a float is a rational number), from `MIN_SCALE`
            to `MAX_SCALE`.
        n: The number of draws.

    Returns:
        int64 ``(n,)``.

    Raises:
        ValueError: If the scale is out of its bounds.

    Guarantee: each number has the law of the formula above, and they are independent, if the
    source's bits are uniform and independent. The time of a call tells the number of rejections,
    which is independent of the numbers, and, in about one of 10^10 trials, that a decision was
    within a relative 2^-36 of its edge.
    """
    if not MIN_SCALE <= scale <= MAX_SCALE:
        raise ValueError(f"the scale is {scale}; it must be from {MIN_SCALE} to {MAX_SCALE}")
    out = np.empty(n, np.int64)
    further = source.child("further-bits")
    filled = 0
    while filled < n:
        trials = min(_TRIALS, 64 + 5 * (n - filled) // 2)
        accepted = _trials(source, further, scale, trials)[: n - filled]
        out[filled : filled + len(accepted)] = accepted
        filled += len(accepted)
    return out


def _trials(source: RandomSource, further: RandomSource, scale: float, trials: int) -> Int64:
    """The accepted numbers of so many trials, in their order."""
    t = int(scale) + 1
    variance = Fraction(scale) ** 2
    signed = _below(source, 2 * t, trials)  # U and the sign
    blocks = _geometric(source, further, trials)
    x = (signed >> 1) + t * blocks
    half = 1 / (2 * float(variance))
    constant = variance / (2 * t * t)
    gamma = np.square(x.astype(np.float64))
    gamma *= half
    gamma -= blocks
    gamma += float(constant)

    def exact(trial: int) -> Fraction:
        return Fraction(int(x[trial]) ** 2) / (2 * variance) - int(blocks[trial]) + constant

    accepted = bernoulli_exp(source.words(trials), gamma, exact, further)
    negative = (signed & 1).astype(bool)
    accepted &= ~(negative & (x == 0))
    np.negative(x, out=x, where=negative)
    return x[accepted]


def _below(source: RandomSource, bound: int, n: int) -> Int64:
    """Uniform integers below a bound: words modulo it, without those of an incomplete last run."""
    found = np.empty(0, np.uint64)
    divisor = np.uint64(bound)
    complete = np.uint64((1 << 64) // bound)
    while len(found) < n:
        words = source.words(n - len(found))
        quotient = words // divisor
        rest = words - quotient * divisor
        found = np.concatenate([found, rest[quotient < complete]])
    return found.astype(np.int64)


def _geometric(source: RandomSource, further: RandomSource, n: int) -> Int64:
    """Integers V with P(V >= v) = exp(-v): the whole part of -ln of a uniform number."""
    words = source.words(n)
    # The middle of the interval that the first 64 bits leave. Its logarithm is off by 1 / word.
    logs = -np.log((words.astype(np.float64) + 0.5) * 2.0**-64)
    found = np.floor(logs)
    doubt = (np.abs(logs - np.rint(logs)) <= _DOUBT) | (words < np.uint64(1 << 40))
    for index in np.flatnonzero(doubt):
        number = _Uniform(int(words[index]), further)
        count = 0
        while number.below_exp(Fraction(count + 1)):
            count += 1
        found[index] = count
    return found.astype(np.int64)


def bernoulli_exp(
    words: Uint64,
    gamma: Floats,
    exact: Callable[[int], Fraction],
    further: RandomSource,
) -> npt.NDArray[np.bool_]:
    """Decide events of probability exp(-gamma).

    Args:
        words: The first 64 bits of a uniform number in [0, 1) for each event, uint64 ``(n,)``.
        gamma: At least 0, float64 ``(n,)``, with a relative error of a few units in the last place
            of its largest term.
        exact: Index of an event -> its gamma.
        further: The source of the bits after the first 64.

    Returns:
        Whether each number is below exp(-gamma), ``(n,)``.
    """
    probability = np.exp(-gamma)
    distance = words.astype(np.float64)
    distance *= 2.0**-64
    distance -= probability
    probability *= _DOUBT
    probability += _RESOLUTION
    result = distance < 0
    for index in np.flatnonzero(np.abs(distance) <= probability):
        result[index] = _Uniform(int(words[index]), further).below_exp(exact(int(index)))
    return result


class _Uniform:
    """A uniform real number in [0, 1), of which as many bits are drawn as decisions need.

    Args:
        word: Its first 64 bits.
        further: The source of the others.
    """

    def __init__(self, word: int, further: RandomSource) -> None:
        self._low, self._width, self._further = word * _WORD, _WORD, further

    def below_exp(self, gamma: Fraction) -> bool:
        """Whether the number is below exp(-gamma), without any error; gamma >= 0."""
        digits = 30
        while True:
            low, high = _exp_bounds(gamma, digits)
            if self._low + self._width <= low:
                return True
            if self._low >= high:
                return False
            digits += 20
            self._width *= _WORD
            self._low += int(self._further.words(1)[0]) * self._width


def _exp_bounds(gamma: Fraction, digits: int) -> tuple[Fraction, Fraction]:
    """Rational numbers around exp(-gamma), about 10^-digits apart relative to it.

    ``Decimal.exp`` is rounded correctly, so its error is half a unit of its last digit. The
    quotient before it is rounded too, by a relative 10^-precision.
    """
    whole = len(str(int(gamma)))
    with decimal.localcontext(decimal.Context(prec=digits + whole + 5, Emin=-(10**9))):
        power = decimal.Decimal(-gamma.numerator) / decimal.Decimal(gamma.denominator)
        value = Fraction(power.exp())
    error = value / 10**digits
    return value - error, value + error
