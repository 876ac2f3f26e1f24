"""From rows to a federation: split, dealt to institutions, tokenised, cached.

`prepare` is the one way in. The key of a cache entry covers the content of the sources, every
setting that shapes the shards, the tokeniser's key and this code; what is cached opens in
milliseconds, without ``datasets``, pandas or torch.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora import files, schemes, shards, sources
from fedlora import partition as partitions
from fedlora.encoding import Encoded
from fedlora.errors import InputError, RecordError
from fedlora.extras import require
from fedlora.shards import Federation, Int64, Shard
from fedlora.text import folded

__all__ = ["Dealt", "Encode", "Federation", "Shard", "Table", "deal", "load_shard", "prepare"]

Encode = Callable[[list[str], list[str], tuple[str, ...]], Encoded]
"""(texts, answers, labels) -> Encoded; labels are empty for sft."""


def cached_shards() -> Path:
    """Where tokenised records are kept."""
    return files.cache_directory() / "shards"


def prepare(
    *,
    source: str,
    test_source: str,
    text: str,
    label: str,
    labels: tuple[str, ...],
    unit: str,
    partition: str,
    institutions: int,
    min_records: int,
    test_fraction: float,
    seed: int,
    task: str,
    encoder: Callable[[], Encode],
    encoding_key: str,
    cache_dir: Path | None = None,
) -> Federation:
    """Open a federation from the cache, or build it and cache it.

    Args:
        source: Training rows, see `fedlora.sources`; without ``test_source`` also held-out ones.
        test_source: Held-out rows of their own, or "". Training rows whose text is among them are
            removed and counted.
        text: Column of the text; several, separated by commas, are joined by " | ".
        label: Column of the label, for sft of the response.
        labels: The classes in index order; empty takes the sorted distinct values. Empty for sft.
        unit: "record", or the column that says whose row it is (the unit of privacy).
        partition: See `fedlora.schemes`.
        institutions: How many; with natural the largest ones, 0 for all.
        min_records: Training rows an institution must have; natural leaves the others out.
        test_fraction: Share of distinct texts held out; a text is held out everywhere or nowhere.
        seed: Of split and partition.
        task: "classification" or "sft".
        encoder: Makes the tokeniser; called once, and only if nothing is cached.
        encoding_key: Names everything that the tokeniser depends on.
        cache_dir: Where shards are kept; None: `cached_shards`.

    Raises:
        InputError: If a source, column, label or partition does not fit; nothing is written then.
    """
    sourced = [sources.digest(source), sources.digest(test_source, "test") if test_source else ""]
    shape = [text, label, labels, unit, partition, institutions, min_records, test_fraction, seed]
    key = json.dumps([sourced, shape, task, encoding_key, _code_digest()])
    entry = (cache_dir or cached_shards()) / hashlib.sha256(key.encode()).hexdigest()
    if (cached := shards.open_entry(entry)) is not None:
        return cached
    encode = encoder()  # before rows are read: what it has to say about the model is said soon

    dealt = deal(
        source=source,
        test_source=test_source,
        text=text,
        label=label,
        labels=labels,
        unit=unit,
        partition=partition,
        institutions=institutions,
        min_records=min_records,
        test_fraction=test_fraction,
        seed=seed,
        task=task,
    )
    counts, classes = dict(dealt.counts), dealt.classes
    (train, train_bounds), (held_out, held_out_bounds) = dealt.train, dealt.held_out
    counts["train"], counts["held_out"] = len(train.texts), len(held_out.texts)
    units = _units(train.others[unit] if unit != "record" else None, train_bounds, unit)
    encoded = encode(train.texts + held_out.texts, train.labels + held_out.labels, classes)
    counts["truncated"] = encoded.truncated
    both = _shard(encoded, train.texts + held_out.texts, train.labels + held_out.labels)
    return shards.store_entry(
        entry,
        Federation(
            names=dealt.names,
            labels=classes,
            counts=counts,
            all_train=replace(both.slice(0, len(train.texts)), units=units),
            train_bounds=train_bounds,
            all_held_out=replace(
                both.slice(len(train.texts), len(both)), units=_units(None, held_out_bounds, "")
            ),
            held_out_bounds=held_out_bounds,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that have a text and a label, of ``read`` rows; ``others`` are further columns."""

    texts: list[str]
    labels: list[str]
    others: Mapping[str, list[str]]
    read: int

    def take(self, rows: NDArray[Any]) -> "Table":
        """Return the rows of these numbers, in that order."""
        order: list[int] = rows.tolist()
        return Table(
            texts=[self.texts[row] for row in order],
            labels=[self.labels[row] for row in order],
            others={name: [values[row] for row in order] for name, values in self.others.items()},
            read=self.read,
        )


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """Rows as institutions hold them, before anything is tokenised.

    Attributes:
        names: Of the institutions.
        classes: In index order; empty for sft.
        train: Training rows sorted by institution, and where each one's begin ``(k + 1,)``.
        held_out: The same of held-out rows.
        counts: What was read, left out and removed.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    train: tuple[Table, Int64]
    held_out: tuple[Table, Int64]
    counts: Mapping[str, int]


def deal(
    *,
    source: str,
    test_source: str,
    text: str,
    label: str,
    labels: tuple[str, ...],
    unit: str,
    partition: str,
    institutions: int,
    min_records: int,
    test_fraction: float,
    seed: int,
    task: str,
) -> Dealt:
    """Read rows, split them, deal them to institutions; arguments as for `prepare`.

    Raises:
        InputError: If a source, column, label or partition does not fit.
    """
    scheme, argument = schemes.parse(
        partition, institutions=institutions, has_classes=task != "sft"
    )
    if scheme != "natural":
        require("flwr_datasets", "simulation", f"data.partition {partition}")
    by_column = {argument: "data.partition"} if scheme == "natural" else {}
    by_unit = {unit: "privacy.unit"} if unit != "record" else {}
    rows = _read(source, text, label, {**by_column, **by_unit}, "train")
    test = _read(test_source, text, label, by_column, "test") if test_source else None
    classes = () if task == "sft" else _classes(labels, rows, test, source, test_source)
    counts = {"rows": rows.read, "test_rows": test.read if test else 0}
    counts["empty"] = sum(table.read - len(table.texts) for table in (rows, test) if table)

    train, held_out, counts["duplicates_removed"] = _split(
        rows, test, fraction=test_fraction, seed=seed, keep_labels=classes != () and not labels
    )
    if scheme == "natural":
        train, lost = _with_value(train, argument)
        held_out, lost_too = _with_value(held_out, argument)
        counts["without_institution"] = lost + lost_too
        placed = partitions.by_column(
            argument,
            train.others[argument],
            held_out.others[argument],
            institutions=institutions,
            min_records=min_records,
        )
    else:
        counts["without_institution"] = 0
        placed = partitions.by_scheme(
            partition,
            _class_indices(train, classes),
            _class_indices(held_out, classes),
            institutions=institutions,
            min_records=min_records,
            seed=seed,
        )
    counts["institutions_dropped"] = placed.dropped
    counts["rows_dropped"] = int((placed.train < 0).sum() + (placed.held_out < 0).sum())

    return Dealt(
        names=placed.names,
        classes=classes,
        train=_by_institution(train, placed.train, len(placed.names)),
        held_out=_by_institution(held_out, placed.held_out, len(placed.names)),
        counts=counts,
    )


def load_shard(
    source: str,
    *,
    text: str,
    label: str,
    labels: tuple[str, ...],
    encode: Encode,
    split: str = "test",
) -> tuple[Shard, int]:
    """Read all rows of one source, uncached; rows without text or label are left out.

    Args:
        source: See `fedlora.sources`.
        text: As for `prepare`.
        label: As for `prepare`.
        labels: The classes that the model knows; empty for sft.
        encode: The tokeniser.
        split: Which split of a Hub data set.

    Returns:
        The rows, and how many of them were cut to length.

    Raises:
        InputError: If a column is missing, a label is unknown, or no row is left.
    """
    table = _read(source, text, label, {}, split)
    if not table.texts:
        raise InputError(f"{source} has no row with a text and a label; give one that has")
    if labels:
        _check_labels(table.labels, labels, source, "the model was trained on no other")
    encoded = encode(table.texts, table.labels, labels)
    return _shard(encoded, table.texts, table.labels), encoded.truncated


def count(source: str, *, text: str, label: str, labels: tuple[str, ...], unit: str) -> int:
    """Rows of a source that have a text and a label, read as a run reads them.

    Raises:
        InputError: If a column is missing, a label is unknown, or no row is left.
    """
    table = _read(source, text, label, {} if unit == "record" else {unit: "privacy.unit"}, "train")
    if not table.texts:
        raise InputError(f"{source} has no row with a text and a label; give one that has")
    if labels:
        _check_labels(table.labels, labels, source, "mend these rows")
    return len(table.texts)


def _read(source: str, text: str, label: str, others: Mapping[str, str], split: str) -> Table:
    columns = [column.strip() for column in text.split(",")]
    wanted = {**others, label: "data.label", **dict.fromkeys(columns, "data.text")}
    rows = {
        column: [value.strip() for value in values]
        for column, values in sources.read(source, wanted, split).items()
    }
    parts = zip(*(rows[column] for column in columns), strict=True)
    texts = [" | ".join(filter(None, part)) for part in parts]
    others_read = {name: rows[name] for name in others}
    table = Table(texts=texts, labels=rows[label], others=others_read, read=len(texts))
    full = [bool(text and answer) for text, answer in zip(texts, rows[label], strict=True)]
    return table.take(np.flatnonzero(full))


def _classes(
    given: tuple[str, ...], rows: Table, test: Table | None, source: str, test_source: str
) -> tuple[str, ...]:
    """Return the classes in index order, checked against the rows of both sources."""
    classes = given or tuple(sorted(set(rows.labels)))
    if len(set(classes)) < len(classes):
        twice = next(name for name in given if given.count(name) > 1)
        raise InputError(f"data.labels has {twice!r} twice; drop one")
    if len(classes) < 2:
        raise InputError(
            f"there is only one label, {', '.join(classes) or '(none)'}, but at least 2 classes "
            "are needed; set data.label to another column"
        )
    remedy = "mend these rows, or list every label in data.labels"
    _check_labels(rows.labels, classes, source, remedy)
    if test is not None:
        _check_labels(test.labels, classes, test_source, remedy)
    return classes


def _check_labels(found: list[str], classes: tuple[str, ...], source: str, remedy: str) -> None:
    alien = Counter(found).keys() - set(classes)
    if alien:
        name = min(alien)
        known = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
        raise RecordError(
            f"label {name!r} ({found.count(name)} rows of {source}) is none of {known}; {remedy}"
        )


def _split(
    rows: Table, test: Table | None, *, fraction: float, seed: int, keep_labels: bool
) -> tuple[Table, Table, int]:
    """Return training rows, held-out rows, and how many training rows duplicated a held-out one."""
    if test is None:
        labels = rows.labels if keep_labels else None
        held = partitions.hold_out(rows.texts, fraction=fraction, seed=seed, labels=labels)
        return rows.take(np.flatnonzero(~held)), rows.take(np.flatnonzero(held)), 0
    known = set(map(partitions.normalise, test.texts))
    unseen = [partitions.normalise(text) not in known for text in rows.texts]
    train = rows.take(np.flatnonzero(unseen))
    return train, test, len(rows.texts) - len(train.texts)


def _with_value(table: Table, column: str) -> tuple[Table, int]:
    """Return the rows that have a value in a column, and how many have none."""
    values = table.others[column]
    given = {value for value in set(values) if folded(value)}
    rows = np.flatnonzero([value in given for value in values])
    return table.take(rows), len(table.texts) - len(rows)


def _class_indices(table: Table, classes: tuple[str, ...]) -> Int64 | int:
    """Return the class of each row, or the number of rows where there are no classes."""
    if not classes:
        return len(table.texts)
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name] for name in table.labels], dtype=np.int64)


def _by_institution(table: Table, owner: Int64, institutions: int) -> tuple[Table, Int64]:
    """Return the rows that have an owner, sorted by it, and where each owner's rows begin."""
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(institutions + 1)).astype(np.int64)
    return table.take(order[bounds[0] :]), bounds - bounds[0]


def _units(values: Sequence[str] | None, bounds: Int64, unit: str) -> Int64:
    """Number the units of privacy from 0 within each institution; without values, each row is one.

    Values are compared as `folded`, so that a customer is one unit in whatever spelling.

    Raises:
        InputError: If a row has no value: whose it is would be a guess.
    """
    if values is None:
        starts: Int64 = np.repeat(bounds[:-1], np.diff(bounds))
        return np.arange(len(starts)) - starts
    same = {value: folded(value) for value in set(values)}
    whose = [same[value] for value in values]
    if "" in whose:
        raise InputError(
            f"privacy.unit is {unit!r}, but {whose.count('')} training rows have nothing in that "
            "column; fill it in, drop these rows, or choose another unit"
        )
    units = np.empty(len(values), dtype=np.int64)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        units[start:stop] = np.unique(np.array(whose[start:stop]), return_inverse=True)[1]
    return units


def _shard(encoded: Encoded, texts: Sequence[str], answers: Sequence[str]) -> Shard:
    lengths = np.fromiter(map(len, encoded.ids), dtype=np.int64, count=len(encoded.ids))
    digests = (
        hashlib.sha256(json.dumps([text, answer]).encode()).digest()
        for text, answer in zip(texts, answers, strict=True)
    )
    return Shard(
        tokens=np.fromiter(chain.from_iterable(encoded.ids), dtype=np.int32, count=lengths.sum()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        targets=np.array(encoded.targets, dtype=np.int64),
        units=np.arange(len(lengths)),
        records=np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32),
    )


def _code_digest() -> str:
    """Return a sha256 of the modules that decide what a cache entry holds."""
    digest = hashlib.sha256()
    for module in (
        "data.py",
        "partition.py",
        "schemes.py",
        "shards.py",
        "sources.py",
        "streams.py",
        "text.py",
    ):
        digest.update(hashlib.sha256(Path(__file__).with_name(module).read_bytes()).digest())
    return digest.hexdigest()
