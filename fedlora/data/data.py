"""From the rows of institutions to tokenised shards; `prepare` is the entry point."""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from fedlora.arrays import Int64
from fedlora.config.sections import DataConfig
from fedlora.data.encoding import Encoded
from fedlora.data.rows import check_labels, partition_rows, read_table
from fedlora.data.shards import Corpus, Federation, Shard
from fedlora.data.text import MISSING, each_folded
from fedlora.errors import InputError

Encode = Callable[[list[str], list[str], tuple[str, ...]], Encoded]
"""(texts, answers, labels) -> Encoded; labels are empty for sft."""


def prepare(settings: DataConfig, *, unit: str, seed: int, task: str, encode: Encode) -> Federation:
    """Read, partition and tokenise the records of all institutions.

    Args:
        settings: See `fedlora.data.rows.partition_rows`.
        unit: "record", or the column that names the unit of privacy of a row.
        seed: Seed of split and partition.
        task: "classification" or "sft".
        encode: The tokenizer.

    Raises:
        InputError: If a source, column, label or partition does not fit.
    """
    found = partition_rows(settings, unit=unit, seed=seed, task=task)
    (train, train_bounds), (held_out, held_out_bounds) = found.train, found.held_out
    units = _units(train.others[unit] if unit != "record" else None, train_bounds, unit)
    encoded = encode(found.texts, found.answers, found.classes)
    corpus = shard_of(encoded, _digests(found.texts, found.answers)).corpus
    truncated = corpus.truncated[np.concatenate([train.numbers, held_out.numbers])]
    own = {"train": len(units), "held_out": len(held_out.texts), "truncated": int(truncated.sum())}
    return Federation(
        names=found.names,
        labels=found.classes,
        counts={**found.counts, **own},
        left_out=found.left_out,
        all_train=Shard(corpus=corpus, rows=train.numbers, units=units),
        train_bounds=train_bounds,
        all_held_out=Shard(
            corpus=corpus, rows=held_out.numbers, units=_units(None, held_out_bounds, "")
        ),
        held_out_bounds=held_out_bounds,
    )


def no_tokens(texts: list[str], answers: list[str], labels: tuple[str, ...]) -> Encoded:
    """An `Encode` for those who need the number, units and fingerprint of rows alone."""
    return Encoded(ids=[[]] * len(texts), targets=[0] * len(texts), truncated=[False] * len(texts))


def load_shard(
    settings: DataConfig, source: str, *, labels: tuple[str, ...], encode: Encode
) -> tuple[Shard, dict[str, int]]:
    """Read all rows of one source; rows without text or label are left out.

    Args:
        settings: ``text`` and ``label`` are used.
        source: A source, see `fedlora.data.sources`.
        labels: The classes that the model knows; empty for sft.
        encode: The tokenizer.

    Returns:
        The rows, and numbers of rows: ``truncated``, those that were cut to length, and those left
        out, ``without_text`` and ``without_label`` (see `fedlora.data.rows.Table`).

    Raises:
        InputError: If a column is missing, a label is unknown, or no row is left.
    """
    table = read_table(source, settings.text, settings.label, {}, "test")
    if labels:
        check_labels(table.labels, labels, source, "the model was trained on no other label")
    encoded = encode(table.texts, table.labels, labels)
    return shard_of(encoded, _digests(table.texts, table.labels)), {
        "truncated": sum(encoded.truncated),
        "without_text": table.without_text,
        "without_label": table.without_label,
    }


def shard_of(encoded: Encoded, records: NDArray[np.uint8] | None = None) -> Shard:
    """A shard of freshly encoded rows, each its own unit; ``records`` as in `Corpus`."""
    lengths = np.fromiter(map(len, encoded.ids), dtype=np.int64, count=len(encoded.ids))
    corpus = Corpus(
        tokens=np.fromiter(chain.from_iterable(encoded.ids), dtype=np.int32, count=lengths.sum()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        targets=np.array(encoded.targets, dtype=np.int64),
        truncated=np.array(encoded.truncated, dtype=np.bool_),
        records=np.empty((0, 32), np.uint8) if records is None else records,
    )
    return Shard(corpus=corpus, rows=np.arange(len(lengths)), units=np.arange(len(lengths)))


def _units(values: Sequence[str] | None, bounds: Int64, unit: str) -> Int64:
    """Number the units of privacy from 0 within each institution; without values, each row is one.

    Values are compared as `folded`, so that spellings of one customer are one unit.

    Raises:
        InputError: If a row has no value: its unit would be a guess.
    """
    if values is None:
        starts: Int64 = np.repeat(bounds[:-1], np.diff(bounds))
        return np.arange(len(starts)) - starts
    names = each_folded(values)
    if missing := sum(name in MISSING for name in names):
        raise InputError(
            f"privacy.unit is {unit!r}, but {missing} training rows have nothing in that column "
            "(or a word for it, such as NULL), so that strangers would be one unit; fill it in, "
            "drop these rows, or choose another unit"
        )
    units = np.empty(len(values), dtype=np.int64)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        units[start:stop] = np.unique(names[start:stop], return_inverse=True)[1]
    return units


def _digests(texts: Sequence[str], answers: Sequence[str]) -> NDArray[np.uint8]:
    """The sha256 of each row's text and answer, uint8 (n, 32)."""
    digests = (
        hashlib.sha256(json.dumps([text, answer]).encode()).digest()
        for text, answer in zip(texts, answers, strict=True)
    )
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)
