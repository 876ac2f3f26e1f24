"""Rows to tensors: padded batches of rows of similar length, or packed rows without padding."""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.arrays import Int64
from fedlora.gradients.packing import Packing

Side = Literal["left", "right"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of a shard, padded to one width; int64 on the CPU.

    Args:
        input_ids: ``(b, T)``.
        attention_mask: ``(b, T)``, 1 at tokens and 0 at padding.
        targets: ``(b,)``, as in the shard: positions count from a row's first token, not padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor


def rounded(lengths: Int64, at_most: int) -> Int64:
    """The padded length of each row, which does not depend on the other rows.

    Args:
        lengths: Tokens of each row ``(n,)``, at most ``at_most``.
        at_most: The most tokens of a row, ``training.max-length``.

    Returns:
        ``(n,)``: the next multiple of 8 up to 64, of 16 up to 128, of 32 up to 256 and so on, so
        that shapes are few and at most a quarter is padding once rows are longer than 32.
    """
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    steps = 2 ** np.maximum(powers - 3, 3)
    return np.minimum(-(-lengths // steps) * steps, at_most)


def pad(
    tokens: Sequence[NDArray[np.int32]],
    targets: Int64,
    pad_id: int,
    side: Side,
    width: int = 0,
) -> Batch:
    """Pads token ids with ``pad_id``, to ``width`` or to the longest; ``targets`` is ``(b,)``."""
    width = width or max((len(row) for row in tokens), default=0)
    ids = np.full((len(tokens), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(tokens):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return Batch(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        targets=torch.tensor(targets),
    )


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Rows of a shard in one packed row.

    Args:
        input_ids: ``(1, T)`` int64.
        position_ids: ``(1, T)`` int64; each example's begin anew.
        targets: ``(n,)`` int64.
        row: The places of the examples.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    row: Packing


def pack(
    tokens: Sequence[NDArray[np.int32]],
    targets: Int64,
    widths: Int64,
    *,
    pad_id: int,
    first: int,
    total: int,
    slots: int,
    device: torch.device,
) -> PackedBatch:
    """Packs token ids into one row of ``total`` tokens; see `Packing` for widths and slots.

    ``first`` is the position of an example's first token.
    """
    lengths = np.array([len(row) for row in tokens], dtype=np.int64)
    used = int(lengths.sum())
    ids = np.full(total, pad_id, dtype=np.int64)
    ids[:used] = np.concatenate(tokens)
    positions = np.full(total, first, dtype=np.int64)
    positions[:used] += np.arange(used) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return PackedBatch(
        input_ids=torch.tensor(ids[None]).to(device),
        position_ids=torch.tensor(positions[None]).to(device),
        targets=torch.tensor(targets),
        row=Packing(lengths, widths, total=total, slots=slots, device=device),
    )


def micro_batches(
    lengths: Sequence[int] | Int64, indices: Sequence[int] | Int64, physical_batch: int
) -> list[Int64]:
    """Splits rows into batches of similar length, so that little is padded.

    Args:
        lengths: Tokens of every row of the shard.
        indices: Rows to split, in any order; rows of equal length keep their order.
        physical_batch: Rows of a batch; the last batch may have fewer.

    Returns:
        Batches from the longest rows to the shortest, so that a lack of memory shows at once.
    """
    rows = np.asarray(indices, dtype=np.int64)
    order = np.argsort(-np.asarray(lengths, dtype=np.int64)[rows], kind="stable")
    rows = rows[order]
    return [rows[i : i + physical_batch] for i in range(0, len(rows), physical_batch)]


def once(
    keys: Iterable[bytes], lengths: Int64, physical_batch: int
) -> Generator[tuple[Int64, Int64, Int64]]:
    """`micro_batches` of rows of which none repeats another, so that each is computed once.

    Args:
        keys: A key for each row; rows of one key are equal.
        lengths: Tokens of each row.
        physical_batch: Rows of a batch; the last batch may have fewer.

    Yields:
        The rows of the batch ``(b,)``; all rows ``(m,)`` that equal one of these, each once over
        all batches; and for each of the latter its equal's position in the batch ``(m,)``.
    """
    first, copy_of = distinct(keys)
    sizes = np.bincount(copy_of, minlength=len(first))
    grouped, ends = np.argsort(copy_of, kind="stable"), np.cumsum(sizes)
    for batch in micro_batches(lengths, first, physical_batch):
        kinds = copy_of[batch]
        rows = np.concatenate([grouped[ends[k] - sizes[k] : ends[k]] for k in kinds])
        yield batch, rows, np.repeat(np.arange(len(batch)), sizes[kinds])


def distinct(keys: Iterable[bytes]) -> tuple[Int64, Int64]:
    """Finds repeated rows, so that a model computes each of them once.

    Returns:
        ``first`` ``(u,)``, the first row of each kind in order, and ``copy_of`` ``(n,)``, such that
        row i equals row ``first[copy_of[i]]``.
    """
    number: dict[bytes, int] = {}
    first: list[int] = []
    copy_of: list[int] = []
    for i, key in enumerate(keys):
        if key not in number:
            number[key] = len(first)
            first.append(i)
        copy_of.append(number[key])
    return np.array(first, dtype=np.int64), np.array(copy_of, dtype=np.int64)
