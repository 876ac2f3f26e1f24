"""Forward passes of an institution's rows: padded to one width, or packed into one row."""

import contextlib
from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch

from fedlora.data.batches import micro_batches
from fedlora.data.shards import Shard
from fedlora.gradients import packing
from fedlora.models.trainable import Trainable
from fedlora.privacy.streams import RandomSource

Dropout = Callable[[int], RandomSource]
"""Row -> the source of its masks."""


def plain_passes(
    trainable: Trainable,
    shard: Shard,
    rows: np.ndarray,
    physical_batch: int,
    dropout: Dropout | None,
) -> Generator[torch.Tensor]:
    """Losses of all rows ``(n,)``, in passes; run each pass's backward before the next pass.

    Without ``dropout`` nothing is masked.
    """
    if trainable.first_position is None:
        for micro in micro_batches(shard.lengths, rows, physical_batch):
            yield padded_losses(trainable, shard, micro, dropout)
        return
    lengths, widths = shard.lengths[rows], trainable.task.widths(shard)
    tokens = packed_tokens(trainable, physical_batch)
    for numbers in equal_passes(lengths, tokens, physical_batch):
        part = rows[numbers]
        part = part[np.argsort(widths[part], kind="stable")]
        total = packing.row_size(int(shard.lengths[part].sum()))
        with packed_losses(trainable, shard, part, dropout, total, len(part)) as losses:
            yield losses


def equal_passes(lengths: np.ndarray, total: int, most: int) -> Iterator[np.ndarray]:
    """Split rows into passes of about ``total`` tokens, equal up to one row; see `fill_passes`."""
    passes = max(1, round(lengths.sum() / total))
    room = -(-int(lengths.sum()) // passes) + int(lengths.max())
    return fill_passes(lengths, room, most)


def fill_passes(lengths: np.ndarray, total: int, most: int) -> Iterator[np.ndarray]:
    """Split rows into passes, in their order.

    Args:
        lengths: Tokens of each row, ``(rows,)``.
        total: The most tokens of a pass.
        most: The most rows of a pass.

    Yields:
        The numbers of a pass's rows ``(n,)``.
    """
    begin, tokens = 0, 0
    for number, length in enumerate(lengths):
        if number - begin == most or tokens + length > total:
            yield np.arange(begin, number)
            begin, tokens = number, 0
        tokens += int(length)
    if begin < len(lengths):
        yield np.arange(begin, len(lengths))


def packed_tokens(trainable: Trainable, physical_batch: int) -> int:
    """Tokens of a packed row: those of ``physical_batch`` usual rows, see `Task.usual_tokens`.

    The result is a multiple of the longest row, rounded up by `packing.row_size`. It depends on the
    configuration alone, never on the rows.
    """
    longest = trainable.task.encoding.max_length
    tokens = trainable.task.usual_tokens(physical_batch)
    return packing.row_size(max(1, round(tokens / longest)) * longest)


def _draw_dropout(trainable: Trainable, rows: np.ndarray, dropout: Dropout | None) -> None:
    if trainable.per_sample.has_dropout:
        sources = [] if dropout is None else [dropout(int(row)) for row in rows]
        trainable.per_sample.draw_dropout(sources)


def padded_losses(
    trainable: Trainable,
    shard: Shard,
    rows: np.ndarray,
    dropout: Dropout | None,
    width: int = 0,
) -> torch.Tensor:
    """Losses of the given rows ``(b,)``; without ``dropout`` nothing is masked."""
    _draw_dropout(trainable, rows, dropout)
    task = trainable.task
    batch = task.collate(shard, rows, width)
    return task.losses(trainable.model, batch, trainable.labels)


@contextlib.contextmanager
def packed_losses(
    trainable: Trainable,
    shard: Shard,
    rows: np.ndarray,
    dropout: Dropout | None,
    total: int,
    slots: int,
) -> Generator[torch.Tensor]:
    """Losses of the given rows ``(n,)`` in one packed row; run their backward inside the block."""
    assert trainable.first_position is not None
    _draw_dropout(trainable, rows, dropout)
    batch = trainable.task.pack(
        shard,
        rows,
        first=trainable.first_position,
        total=total,
        slots=slots,
        device=trainable.base.model.device,
    )
    with packing.use(batch.row):
        yield trainable.task.losses(trainable.model, batch, trainable.labels)
