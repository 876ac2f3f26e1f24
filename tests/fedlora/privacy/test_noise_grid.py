"""The grid of noised sums: no bit of a sum or of its noise is left below it."""

import math

import numpy as np
import pytest
import torch

from fedlora.privacy.noise_grid import on_grid
from fedlora.privacy.streams import RandomSource


@pytest.mark.parametrize("deviation", [1e-6, 0.37, 1.0, 1.24, 3e5])
def test_noised_sums_are_multiples_of_one_power_of_two_near_a_millionth(deviation):
    draws = torch.from_numpy(RandomSource.seeded("grid", 1).normal(2000)) * deviation
    found = on_grid(draws + 0.1 * deviation, deviation)
    assert found.dtype == torch.float64
    step = 2.0 ** (math.floor(math.log2(deviation)) + 1 - 20)
    assert deviation / 2**20 <= step <= 2 * deviation / 2**20
    assert torch.equal(found / step, torch.round(found / step))
    assert (found - draws - 0.1 * deviation).abs().max() <= step / 2


def test_a_sum_near_zero_does_not_tell_its_neighbour_apart():
    """In float32 alone such a value keeps bits that differ between sums of 0 and of 0.1."""
    tiny = np.array([1.0, 1 + 2**-52, 1 + 2**-30, 3.0]) * 2.0**-32
    noise = torch.from_numpy(tiny - 0.1)
    sums = torch.full((4,), 0.1, dtype=torch.float64)
    alone = (sums + noise).float()
    assert alone.unique().numel() > 1 and not on_grid(sums + noise, 1.24).any()
