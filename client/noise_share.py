"""An institution's vector under secure aggregation: its sum on the grid with a share of noise."""

import math

import numpy as np

from client.dp_sgd import check_noise
from fedlora.arrays import Floats, Int64
from fedlora.errors import Refusal
from fedlora.privacy import discrete_gaussian
from fedlora.privacy.accounting import PrivacyPlan
from fedlora.privacy.streams import RandomSource
from fedlora.secure import noise_shares


def noised_words(sums: Floats, plan: PrivacyPlan, source: RandomSource, institutions: int) -> Int64:
    """Round a sum of clipped gradients to the grid and add a share of noise.

    Guarantee: the returned vectors of ``plan.honest`` institutions add up to the output of one
    Gaussian mechanism with ``plan.noise_multiplier``, up to the discreteness that the accountant
    counts (`fedlora.secure.noise_shares`). One vector alone has a share of that noise only.

    Args:
        sums: The sum of gradients of norm at most ``plan.max_grad_norm``, float64 ``(d,)``.
        plan: The plan of the institution's run.
        source: The random source of the share.
        institutions: The number of institutions in the run.

    Returns:
        int64 ``(d,)``, each below 2^62 / institutions: of a larger sum only the part up to half of
        that is kept.

    Raises:
        Refusal: ``guard-no-noise``, ``guard-noise`` (its deviation is not the planned one), or
            ``guard-range`` (the noise alone is beyond the limit, or a number is not finite).
    """
    sigma = plan.noise_multiplier
    if not (plan.honest and sigma > 0 and math.isfinite(sigma)):
        raise Refusal("guard-no-noise", f"noise multiplier is {sigma} over {plan.honest} shares")
    scale = plan.share_scale(len(sums))
    share = discrete_gaussian.draw(source, scale, len(sums))
    check_noise(share.astype(np.float64), scale)
    limit = noise_shares.largest_word(institutions) // 2
    if not (np.isfinite(sums).all() and (np.abs(share) < limit).all()):
        raise Refusal(
            "guard-range",
            f"a number of the vector is not finite, or its noise is not below {limit}",
        )
    # Cutting brings no two sums further apart, and says nothing of the records as a refusal would.
    rounded = np.rint(sums / noise_shares.grid(plan.max_grad_norm)).clip(-limit, limit)
    return rounded.astype(np.int64) + share
