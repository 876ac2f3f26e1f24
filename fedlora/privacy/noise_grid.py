"""Noised sums without the last bits, by which one could tell them apart.

A floating-point number holds more than its value: which numbers a sum and a draw of noise can add
up to depends on both, so that the last bits of a result can exclude a neighbouring sum for certain.

Reference: Mironov (2012), On significance of the least significant bits for differential privacy.
"""

import math

import torch

BITS = 20
"""The step of the grid is the deviation's power of two divided by 2^20."""


def on_grid(noised: torch.Tensor, deviation: float) -> torch.Tensor:
    """Round to multiples of one public number, which is post-processing.

    Rounding to float32 alone is relative: a value near 0 keeps bits that are finer than those of
    sum and noise together.

    Args:
        noised: A sum with its noise, float64, of any shape.
        deviation: The standard deviation of the noise, above 0; public.

    Returns:
        float64, multiples of a power of two between ``deviation`` / 2^20 and twice that.
    """
    step = math.ldexp(1.0, math.frexp(deviation)[1] - BITS)
    return torch.round(noised / step) * step
