"""Each unit's gradient from private passes, for tests that compare units drawn together."""

import torch

from client import training
from client.gradients import SampledUnits, packed_gradients, padded_gradients
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


def unit_gradients(work, shard, units, physical_batch, *, packed, own=False):
    """Rows of a unit, as a tuple -> its gradient, flat.

    With ``own`` units have values of two participants, as from the second local step on: those with
    an even first row have the model's values, the others halves of them.
    """
    make = packed_gradients if packed else padded_gradients
    named = work.parameters()
    values = [torch.stack([p.detach(), p.detach() / 2]) for p in named.values()] if own else []
    drawn = SampledUnits(
        shard=shard,
        units=list(units),
        owner=[int(rows[0]) % 2 for rows in units],
        physical_batch=physical_batch,
        dropout=[dropout(row) for row in range(len(shard))],
        values=values,
    )
    found = {}
    with training.training_steps(work, private=True):
        for numbers, gradients in make(work, named, drawn):
            for index, number in enumerate(numbers):
                rows = tuple(units[number])
                assert rows not in found
                found[rows] = torch.cat([g[index].flatten() for g in gradients])
    assert len(found) == len(units)
    return found
