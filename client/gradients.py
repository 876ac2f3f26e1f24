"""Gradients of the units in a step's batch, each as if it had been computed alone.

A unit's gradient is the same to the last bit whatever other units are in the batch: all passes have
one shape, and a unit's rows are added in an order that depends on the unit alone. A server could
otherwise send an adapter that amplifies rounding, until one unit moves the gradients of all others.

Packed rows serve models and devices that allow them; padded passes serve all others.
"""

# torch types some of its functions in part only
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from client.passes import fill_passes, packed_losses, packed_tokens, padded_losses
from fedlora.arrays import Int64
from fedlora.data.shards import Shard
from fedlora.models.trainable import Trainable
from fedlora.privacy.streams import RandomSource


@dataclass(frozen=True, kw_only=True)
class SampledUnits:
    """The units that all participants sampled in one step.

    Args:
        shard: The rows of all units, participant after participant, sorted within each.
        units: Rows of each unit.
        physical_batch: Rows of a pass, at most.
        dropout: The random source of each row's dropout masks; empty without dropout.
    """

    shard: Shard
    units: list[Int64]
    physical_batch: int
    dropout: list[RandomSource]


def packs(trainable: Trainable) -> bool:
    """Whether private passes are packed rows.

    On a GPU, and with several threads, kernels may depend on how many examples have one width.
    """
    one = trainable.base.model.device.type == "cpu" and torch.get_num_threads() == 1
    return one and trainable.first_position is not None


def unit_gradients(
    trainable: Trainable,
    named: Mapping[str, torch.nn.Parameter],
    batch: SampledUnits,
    *,
    packed: bool,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Each unit's summed gradient.

    Args:
        trainable: The model, in training mode.
        named: Its trained parameters.
        batch: The units.
        packed: Whether to use packed rows, see `packs`.

    Yields:
        Some units, and their gradients over all parameters in turn, float32 ``(units, numbers)``.
    """
    rows = np.concatenate([np.empty(0, np.int64), *batch.units])
    of_row = np.repeat(np.arange(len(batch.units)), [len(each) for each in batch.units])
    left = np.bincount(of_row, minlength=len(batch.units))
    begun: dict[int, torch.Tensor] = {}  # sums of units that have rows in later passes
    found = (_packed if packed else _padded)(trainable, named, batch, rows, of_row)
    for part, gradients in found:
        if len(rows) == len(batch.units):
            yield of_row[part].tolist(), gradients
            continue
        for place in np.argsort(part):  # in the order of the unit's rows
            unit = int(of_row[part[place]])
            sums = begun.setdefault(unit, torch.zeros_like(gradients[place]))
            sums.add_(gradients[place])
            left[unit] -= 1
        if whole := [unit for unit in begun if not left[unit]]:
            yield whole, torch.stack([begun.pop(unit) for unit in whole])


def _packed(
    trainable: Trainable,
    named: Mapping[str, torch.nn.Parameter],
    batch: SampledUnits,
    rows: Int64,
    of_row: Int64,
) -> Iterator[tuple[Int64, torch.Tensor]]:
    """Passes of packed rows of one size, in the order of the rows.

    Yields:
        Numbers of rows ``(n,)``, and their gradients ``(n, numbers)``.
    """
    shard, slots = batch.shard, batch.physical_batch
    total, widths = packed_tokens(trainable, slots), trainable.task.widths(shard)
    for part in fill_passes(shard.lengths[rows], total, slots):
        part = part[np.argsort(widths[rows[part]], kind="stable")]
        dropout = batch.dropout.__getitem__
        with (
            trainable.per_sample.expanded(len(part)),
            packed_losses(trainable, shard, rows[part], dropout, total, slots) as losses,
        ):
            losses.sum().backward()
            collected = trainable.per_sample.collect()
        yield part, torch.cat([collected[p].flatten(1) for p in named.values()], 1)


def _padded(
    trainable: Trainable,
    named: Mapping[str, torch.nn.Parameter],
    batch: SampledUnits,
    rows: Int64,
    of_row: Int64,
) -> Iterator[tuple[Int64, torch.Tensor]]:
    """As `_packed`, in padded passes of exactly ``physical_batch`` rows of one shape.

    A pass that is not full repeats its rows. Memory holds the sums of up to ``physical_batch``
    units with several rows.
    """
    slots = batch.physical_batch
    for part, width in padded_passes(trainable.task.shapes(batch.shard)[rows], of_row, slots):
        with trainable.per_sample.expanded(slots):
            filled, dropout = rows[np.resize(part, slots)], batch.dropout.__getitem__
            padded_losses(trainable, batch.shard, filled, dropout, width).sum().backward()
            collected = trainable.per_sample.collect()
        flat = torch.cat([collected[p][: len(part)].flatten(1) for p in named.values()], 1)
        yield part, flat


def padded_passes(
    shapes: np.ndarray, of_row: Int64, physical_batch: int
) -> Iterator[tuple[Int64, int]]:
    """Split rows into passes of one shape, of ``physical_batch`` units at a time.

    Args:
        shapes: The shape of each row ``(rows, k)``, its padded width first.
        of_row: The unit of each row ``(rows,)``, ascending.
        physical_batch: Rows of a pass, at most.

    Yields:
        Numbers of rows ``(n,)``, ascending, and the width to pad to.
    """
    single = len(of_row) == len(np.unique(of_row))
    group = np.zeros_like(of_row) if single else of_row // physical_batch
    order = np.lexsort((*shapes.T[::-1], group))
    keys = np.column_stack([group, shapes])[order]
    for same in np.split(order, np.flatnonzero((keys[1:] != keys[:-1]).any(1)) + 1):
        for start in range(0, len(same), physical_batch):
            part = same[start : start + physical_batch]
            yield part, int(shapes[part[0], 0])
