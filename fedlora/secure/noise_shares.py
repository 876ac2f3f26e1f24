r"""Sums of clipped gradients and shares of noise as 64-bit integers, for secure aggregation.

Institution u rounds the sum of its clipped gradients to a grid and adds a share of noise:

.. math:: x_u = \mathrm{rint}(S_u / g) + R_u, \quad R_u \sim \mathcal N_{\mathbb Z}(0, s^2)^d,
    \quad g = C \, 2^{-36}, \quad
    s = \frac{\sigma (C + \sqrt d \, g)}{\sqrt h \, g} (1 + 2^{-9})

One unit of privacy moves S by at most C, and the rounded S by at most C / g + sqrt(d). The sum of h
shares therefore has, in those units, the noise of one Gaussian mechanism with noise multiplier
sigma; docs/privacy-accounting.md has the proof.

References: Kairouz, Liu and Steinke (2021), The Distributed Discrete Gaussian Mechanism, arXiv
2102.06387; Bonawitz et al. (2017), Practical Secure Aggregation, for the number of survivors.
"""

import math

GRID_BITS = 36
"""The grid's spacing is the clipping bound times 2^-36."""
MAX_PARAMETERS = 2**28
"""The most trained parameters. The plan counts the cost of discrete noise for so many."""
SCALE_MARGIN = 1 + 2.0**-9
"""The scale of a share is larger by this factor. It covers that two machines may find noise
multipliers 0.1 % apart for one plan, and the rounding of a sum of gradients in float64."""
MAX_BATCH = 2**19
"""The most expected units of a batch: twice as many move two sums in float64 by less than 2^-12 C
beyond C, since n units make an error of at most n^2 2^-53 C in each."""
MAX_SHARES = 120_000
"""Institutions times rounds of a deployed run, at most: an institution sends its shares of all
rounds' keys in one message of 66 bytes each, and the gateway takes 8 MiB (deployment/gateway.conf).
The rest is for the message's envelope."""
MIN_HONEST = 2
"""With one honest share the sum would protect no more than that share."""
MIN_COLLUDING = 1
"""Each institution sees every adapter and knows its own share of the noise, so that it can take
that one out of a sum without telling anybody."""


def grid(max_grad_norm: float) -> float:
    """The spacing g of the grid, in units of a gradient."""
    return math.ldexp(max_grad_norm, -GRID_BITS)


def share_scale(noise_multiplier: float, shares: int, parameters: int) -> float:
    """The scale s of one share of noise, in steps of the grid.

    Args:
        noise_multiplier: sigma, of the sum of the shares.
        shares: h, the number of shares in the sum.
        parameters: d, the number of trained parameters.
    """
    steps = 2.0**GRID_BITS + math.sqrt(parameters)
    return noise_multiplier * steps / math.sqrt(shares) * SCALE_MARGIN


def largest_word(institutions: int) -> int:
    """The largest magnitude of a word: a sum over all institutions stays below 2^62."""
    return 2**62 // institutions


def threshold(institutions: int, colluding: int) -> int:
    """The number T of institutions that must agree on a list of survivors.

    Two sets of T institutions have more than ``colluding`` in common, hence an honest one.
    """
    return (institutions + colluding) // 2 + 1


def least_survivors(institutions: int, honest: int, colluding: int) -> int:
    """The least number of institutions whose vectors may be added up.

    With so many, ``honest`` of them are honest whichever ``colluding`` are not, and enough are left
    to agree on the list.
    """
    return max(honest + colluding, threshold(institutions, colluding))
