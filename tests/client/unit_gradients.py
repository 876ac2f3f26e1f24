"""Each unit's gradient from private passes, for tests that compare units drawn together."""

import torch

from client import training
from client.gradients import SampledUnits
from client.gradients import unit_gradients as gradients_of
from fedlora.privacy.streams import RandomSource

_DROPOUT = RandomSource.seeded("test", 1)


def dropout(row):
    return _DROPOUT.child("row", row)


def set_values(work, scale=1.0):
    """Random values for all trained parameters: at the start B is zero, and most gradients too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in work.parameters().values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def unit_gradients(work, shard, units, physical_batch, *, packed):
    """Rows of a unit, as a tuple -> its gradient, flat."""
    drawn = SampledUnits(
        shard=shard,
        units=list(units),
        physical_batch=physical_batch,
        dropout=[dropout(row) for row in range(len(shard))],
    )
    found = {}
    with training.training_steps(work, private=True):
        for numbers, gradients in gradients_of(work, work.parameters(), drawn, packed=packed):
            for number, gradient in zip(numbers, gradients, strict=True):
                rows = tuple(units[number])
                assert rows not in found
                found[rows] = gradient.clone()
    assert len(found) == len(units)
    return found
