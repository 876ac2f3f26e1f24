"""Gradients of the units in a step's batch, each as if it had been computed alone.

Packed rows serve models and devices that allow them; padded passes serve all others.
"""

# torch and Opacus type some of their functions in part only
# pyright: reportUnknownMemberType=false

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from client.passes import fill_passes, packed_losses, packed_tokens, padded_losses
from fedlora.data.shards import Shard
from fedlora.models.trainable import Trainable
from fedlora.privacy.streams import RandomSource


@dataclass(frozen=True, kw_only=True)
class SampledUnits:
    """The units that all participants sampled in one step.

    Args:
        shard: The rows of all units, participant after participant, sorted within each.
        units: Rows of each unit.
        owner: The number of each unit's participant.
        physical_batch: Rows of a pass, at most.
        dropout: The random source of each row's dropout masks; empty without dropout.
        values: Each parameter's values, ``(participants, *shape)``; empty: all participants have
            the model's values.
    """

    shard: Shard
    units: list[np.ndarray]
    owner: list[int]
    physical_batch: int
    dropout: list[RandomSource]
    values: list[torch.Tensor]

    def values_of(self, units: Sequence[int]) -> list[torch.Tensor] | None:
        """Each parameter's values for units, ``(units, *shape)``; None: the model's values."""
        owners = [self.owner[unit] for unit in units]
        return [value[owners] for value in self.values] or None


def packed_gradients(
    trainable: Trainable, named: dict[str, torch.nn.Parameter], batch: SampledUnits
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Each unit's summed gradient, from packed rows of one size.

    A unit's gradient is the same to the last bit whatever other units there are: all packed rows
    have equally many tokens, and a unit's rows are added one after the other in their order.

    Yields:
        Some units, all of them before later ones, and for each parameter their gradients,
        float32 ``(units, *shape)``.
    """
    shard, units, slots = batch.shard, batch.units, batch.physical_batch
    rows = np.concatenate([np.empty(0, np.int64), *units])
    of_row = np.repeat(np.arange(len(units)), [len(each) for each in units])
    total = packed_tokens(trainable, slots)
    widths = trainable.task.widths(shard)
    single = len(rows) == len(units)
    begun: list[torch.Tensor] = []  # sums of a unit whose last rows are in a later pass
    for part in fill_passes(shard.lengths[rows], total, slots):
        order = part[np.argsort(widths[rows[part]], kind="stable")]
        own = batch.values_of(of_row[order].tolist())
        filled = None if own is None else dict(zip(named, own, strict=True))
        with trainable.per_sample.expanded(len(part), None, filled):
            dropout = batch.dropout.__getitem__
            with packed_losses(trainable, shard, rows[order], dropout, total, slots) as losses:
                losses.sum().backward()
            collected = trainable.per_sample.collect()
        row_gradients = [collected[p] for p in named.values()]
        if single:
            yield of_row[order].tolist(), row_gradients
            continue
        first, last = int(of_row[part[0]]), int(of_row[part[-1]])
        found = [g.new_zeros((last - first + 1, *g.shape[1:])) for g in row_gradients]
        for sums, before in zip(found, begun, strict=bool(begun)):
            sums[0] = before
        for place in np.argsort(order):
            for sums, gradients in zip(found, row_gradients, strict=True):
                sums[of_row[order[place]] - first].add_(gradients[place])
        whole = part[-1] == len(rows) - 1 or of_row[part[-1] + 1] != last
        begun = [] if whole else [sums[-1] for sums in found]
        if finished := list(range(first, last + whole)):
            yield finished, [sums[: len(finished)] for sums in found]


def padded_gradients(
    trainable: Trainable, named: dict[str, torch.nn.Parameter], batch: SampledUnits
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Each unit's summed gradient, from padded passes.

    A unit's gradient is the same to the last bit whatever other units there are: all passes have
    ``physical_batch`` rows of one shape, and the order of a unit's rows depends on the unit alone.
    Memory holds one pass and the gradients of up to ``physical_batch`` units.

    Yields:
        Some units, and for each parameter their gradients, float32 ``(units, *shape)``.
    """
    slots = batch.physical_batch
    shapes = trainable.task.shapes(batch.shard)
    for group in _groups(batch.units, shapes, slots):
        values = batch.values_of(group)
        one_each = np.arange(len(group))
        sums: list[torch.Tensor] | None = None
        for rows, unit_of_row, width in _passes([batch.units[i] for i in group], shapes, slots):
            # Row i is of unit i, or an index gives each row's unit. Rows that only fill the pass
            # belong to one unit after the last.
            plain = np.array_equal(unit_of_row[unit_of_row < len(group)], one_each)
            index = None if plain else torch.from_numpy(unit_of_row)
            count = slots if plain else len(group) + 1
            filled = None
            if values is not None:  # filling rows take the first unit's values
                place = torch.arange(count)
                place[len(group) :] = 0
                filled = {n: value[place] for n, value in zip(named, values, strict=True)}
            with trainable.per_sample.expanded(count, index, filled):
                dropout = batch.dropout.__getitem__
                padded_losses(trainable, batch.shard, rows, dropout, width).sum().backward()
                collected = trainable.per_sample.collect()
            gradients = [collected[p][: len(group)] for p in named.values()]
            if sums is None:
                sums = gradients
            else:
                sums = [a.add_(b) for a, b in zip(sums, gradients, strict=True)]
        assert sums is not None, "a group has at least one unit with at least one row"
        yield group, sums


def _groups(
    units: Sequence[np.ndarray], shapes: np.ndarray, physical_batch: int
) -> Iterator[list[int]]:
    """Numbers of up to ``physical_batch`` units whose gradients are in memory together.

    Units of one record each are grouped by its shape, so that a group is one pass.
    """
    single = all(len(rows) == 1 for rows in units)
    first = [int(rows[0]) for rows in units]
    group: list[int] = []
    for unit in sorted(range(len(units)), key=lambda u: (*shapes[first[u]], first[u])):
        other = single and group and tuple(shapes[first[unit]]) != tuple(shapes[first[group[0]]])
        if len(group) == physical_batch or other:
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


def _passes(
    group: Sequence[np.ndarray], shapes: np.ndarray, physical_batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Passes of exactly ``physical_batch`` rows of one shape through the model.

    A unit's rows of one shape share a pass as far as they fit, so the order of their sum follows
    from the unit alone. A pass that is not full repeats its rows.

    Yields:
        Rows of the shard (physical_batch,), the unit of each (``len(group)`` for a row that only
        fills the pass), and the width to pad to.
    """
    blocks: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    for unit, rows in enumerate(group):
        for shape in sorted({tuple(map(int, shapes[row])) for row in rows}):
            same = rows[(shapes[rows] == shape).all(1)]
            for start in range(0, len(same), physical_batch):
                block = (unit, same[start : start + physical_batch])
                blocks.setdefault(shape, []).append(block)
    for shape in sorted(blocks):
        for held in _fitting(blocks[shape], physical_batch):
            rows = np.concatenate([part for _, part in held])
            units = np.repeat([unit for unit, _ in held], [len(part) for _, part in held])
            filler = np.full(physical_batch - len(rows), len(group))
            yield np.resize(rows, physical_batch), np.concatenate([units, filler]), shape[0]


def _fitting(
    blocks: Sequence[tuple[int, np.ndarray]], physical_batch: int
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Group blocks into lists of at most ``physical_batch`` rows; no block is split."""
    held: list[tuple[int, np.ndarray]] = []
    count = 0
    for block in blocks:
        if count + len(block[1]) > physical_batch:
            yield held
            held, count = [], 0
        held.append(block)
        count += len(block[1])
    yield held
