"""From a source to the rows of each institution: read, checked, split and partitioned.

`partition_rows` is the entry point. `fedlora.data.data` tokenises the rows.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.arrays import Int64
from fedlora.config import plugins, schemes
from fedlora.config.sections import DataConfig
from fedlora.data import partition, sources
from fedlora.data.tables import as_text
from fedlora.data.text import each_folded
from fedlora.errors import InputError, RecordError
from fedlora.extras import require


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that have a text and a label.

    Attributes:
        texts: One for each row, never empty.
        labels: One for each row, never empty; for sft the responses.
        others: Column name -> values of further columns.
        numbers: int64, which of the rows of its source with a text and a label each one is, from 0.
        read: Number of rows in the source, including rows without a text or a label.
        without_text: Rows of the source without a text.
        without_label: Rows of the source with a text and without a label.
    """

    texts: list[str]
    labels: list[str]
    others: Mapping[str, list[str]]
    numbers: Int64
    read: int
    without_text: int = 0
    without_label: int = 0

    def take(self, rows: NDArray[Any]) -> "Table":
        """Return the rows of these numbers, in that order."""
        order: list[int] = rows.tolist()
        return replace(
            self,
            texts=[self.texts[row] for row in order],
            labels=[self.labels[row] for row in order],
            others={name: [values[row] for row in order] for name, values in self.others.items()},
            numbers=self.numbers[rows],
        )


@dataclass(frozen=True, kw_only=True)
class PartitionedRows:
    """The rows of each institution before tokenising.

    Attributes:
        names: Names of the institutions.
        classes: Class names in index order; empty for sft.
        texts: The text of each row that was read, also of those that no institution has. The rows
            of ``test_source`` follow those of ``source``, in `Table.numbers` too.
        answers: The label of each of them; for sft the response.
        train: Training rows sorted by institution, and the first row of each one ``(k + 1,)``.
        held_out: Held-out rows in the same form.
        counts: Numbers of rows that were read, left out and removed; see `Federation`.
        left_out: Institutions left out -> their training rows.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    texts: list[str]
    answers: list[str]
    train: tuple[Table, Int64]
    held_out: tuple[Table, Int64]
    counts: Mapping[str, int]
    left_out: Mapping[str, int]


def partition_rows(settings: DataConfig, *, unit: str, seed: int, task: str) -> PartitionedRows:
    """Read rows, hold some of them out and assign all to institutions.

    Args:
        settings: Sources, columns, classes and partition. With ``test_source``, training rows whose
            text is among its rows are removed and counted. Otherwise a share ``test_fraction`` of
            the distinct texts is held out, the same at all institutions.
        unit: "record", or the column that names the unit of privacy of a row.
        seed: Seed of split and partition.
        task: "classification" or "sft".

    Raises:
        InputError: If a source, column, label or partition does not fit.
    """
    scheme, argument = schemes.parse(
        settings.partition, institutions=settings.institutions, has_classes=task != "sft"
    )
    if schemes.is_drawn(scheme, settings.institutions):
        require("flwr_datasets", "simulation", f"data.partition {settings.partition}")
    rows, test = _read(settings, unit, argument if scheme == "python" else "", seed)
    classes = () if task == "sft" else _classes(settings, rows, test)
    learned = classes != () and not settings.labels
    train, held_out, copies = _split(rows, test, settings.test_fraction, seed, learned)
    without = 0
    if scheme in schemes.BY_VALUE:
        train, without, held_out = _with_value(train, held_out, argument)
    placed = _placed(settings, train, held_out, classes, unit, seed)
    owner = partition.at_most(placed, settings.max_records, seed=seed)
    if settings.partition.startswith(schemes.POOLED):
        owner, placed = np.minimum(owner, 0), partition.pooled(placed)
    lost_held_out = int((placed.held_out < 0).sum())
    read = [table for table in (rows, test) if table]
    return PartitionedRows(
        names=placed.names,
        classes=classes,
        texts=[text for table in read for text in table.texts],
        answers=[label for table in read for label in table.labels],
        train=_by_institution(train, owner, len(placed.names)),
        held_out=_by_institution(held_out, placed.held_out, len(placed.names)),
        counts={
            "rows": rows.read,
            "test_rows": test.read if test else 0,
            "without_text": sum(table.without_text for table in read),
            "without_label": sum(table.without_label for table in read),
            "duplicates_removed": copies,
            "without_institution": without,
            "institutions_dropped": len(placed.left_out),
            "rows_dropped": int((owner < 0).sum()) + lost_held_out,
            "units_at_several": _at_several(train.others.get(unit), owner),
            "test_rows_dropped": lost_held_out if test else 0,
        },
        left_out=placed.left_out,
    )


def wanted_columns(settings: DataConfig, unit: str) -> dict[str, str]:
    """The columns that a run reads of its records -> their config keys.

    Args:
        settings: Columns and partition.
        unit: "record", or the column that names the unit of privacy of a row; held-out rows need
            none.
    """
    return {
        **_other_columns(settings, unit),
        settings.label: "data.label",
        **dict.fromkeys(text_columns(settings.text), "data.text"),
    }


def _other_columns(settings: DataConfig, unit: str) -> dict[str, str]:
    """The columns of institution and unit -> their config keys."""
    scheme, _, column = schemes.inner(settings.partition).partition(":")
    named = {column: "data.partition"} if scheme == "natural" else {}
    return named | ({unit: "privacy.unit"} if unit != "record" else {})


def text_columns(text: str) -> list[str]:
    """The columns that ``data.text`` names, separated by commas."""
    return [column.strip() for column in text.split(",")]


def read_table(
    source: str, text: str, label: str, others: Mapping[str, str], split: str = "train"
) -> Table:
    """Read the rows of a source that have a text and a label.

    Args:
        source: A source, see `fedlora.data.sources`.
        text: Column of the text; several columns, separated by commas, are joined by " | ".
        label: Column of the label.
        others: Further column -> the config key that names it, for error messages.
        split: Split of a Hub data set.

    Raises:
        InputError: If the source cannot be read, a column is missing, the label is among the
            columns of the text, or no row has a text and a label.
    """
    columns = text_columns(text)
    if label in columns:
        raise InputError(
            f"data.text is {text!r}, of which {label!r} is data.label too, so that every text "
            "would hold its answer; leave it out of data.text"
        )
    wanted = {**others, label: "data.label", **dict.fromkeys(columns, "data.text")}
    rows = {
        column: [value.strip() for value in values]
        for column, values in sources.read(source, wanted, split).items()
    }
    texts = [joined(parts) for parts in zip(*(rows[column] for column in columns), strict=True)]
    written = np.array([bool(value) for value in texts])
    answered = np.array([bool(value) for value in rows[label]])
    table = Table(
        texts=texts,
        labels=rows[label],
        others={name: rows[name] for name in others},
        numbers=np.cumsum(written & answered) - 1,
        read=len(texts),
        without_text=int((~written).sum()),
        without_label=int((written & ~answered).sum()),
    )
    if not (written & answered).any():
        raise InputError(
            f"{source} has no row with a text and a label: of {table.read:,} rows, "
            f"{table.without_text:,} have nothing in data.text ({text}) and "
            f"{table.without_label:,} of the others nothing in data.label ({label}); set these "
            "keys to columns that are filled in"
        )
    return table.take(np.flatnonzero(written & answered))


def joined(parts: Sequence[str]) -> str:
    """The text of a row whose text columns hold these values, without blanks at their ends."""
    return " | ".join(filter(None, (part.strip() for part in parts)))


def check_labels(found: list[str], classes: tuple[str, ...], source: str, remedy: str) -> None:
    """Refuse rows of a source whose label is no class.

    Raises:
        RecordError: Naming the first such label; ``remedy`` ends the message.
    """
    alien = Counter(found).keys() - set(classes)
    if alien:
        name = min(alien)
        known = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
        raise RecordError(
            f"label {name!r} ({found.count(name)} rows of {source}) is none of {known}; {remedy}"
        )


def _read(settings: DataConfig, unit: str, function: str, seed: int) -> tuple[Table, Table | None]:
    """The training rows and those of ``data.test-source``, which need no unit."""
    text, label, test = settings.text, settings.label, None
    rows = read_table(settings.source, text, label, _other_columns(settings, unit))
    if settings.test_source:
        others = _other_columns(settings, "record")
        test = read_table(settings.test_source, text, label, others, "test")
        test = replace(test, numbers=test.numbers + len(rows.texts))
    if function:
        rows, test = _assigned(rows, function, seed), test and _assigned(test, function, seed)
    return rows, test


def _assigned(table: Table, name: str, seed: int) -> Table:
    """The rows with a column, of the plug-in's name, for the institution that it gives each."""
    key = "data.partition"
    function = plugins.load(key, name)
    try:
        given = list(function(list(table.texts), list(table.labels), seed))
    except Exception as error:
        raise RecordError(
            f"{key} is python:{name}, which failed with {type(error).__name__}: {error}; mend it"
        ) from error
    if len(given) != len(table.texts):
        raise InputError(
            f"{key} is python:{name}, which gave {len(given)} institutions for "
            f"{len(table.texts)} rows; give one for each row, and an empty text for none"
        )
    names = [as_text(institution, key, name) for institution in given]
    return replace(table, others={**table.others, name: names})


def _classes(settings: DataConfig, rows: Table, test: Table | None) -> tuple[str, ...]:
    """Return the classes in index order, checked against the rows of both sources."""
    classes = settings.labels or tuple(sorted(set(rows.labels)))
    if len(set(classes)) < max(2, len(classes)):
        raise InputError(
            f"the labels are {', '.join(classes[:12])}, but at least 2 different ones are needed, "
            "each once; set data.label to another column, or mend data.labels"
        )
    remedy = "correct these rows, or list every label in data.labels"
    check_labels(rows.labels, classes, settings.source, remedy)
    if test is not None:
        check_labels(test.labels, classes, settings.test_source, remedy)
    return classes


def _split(
    rows: Table, test: Table | None, fraction: float, seed: int, keep_labels: bool
) -> tuple[Table, Table, int]:
    """Return training rows, held-out rows, and the number of removed copies of held-out rows."""
    if test is None:
        labels = rows.labels if keep_labels else None
        held = partition.hold_out(rows.texts, fraction=fraction, seed=seed, labels=labels)
        return rows.take(np.flatnonzero(~held)), rows.take(np.flatnonzero(held)), 0
    known = set(map(partition.normalise, test.texts))
    unseen = [partition.normalise(text) not in known for text in rows.texts]
    if not any(unseen):
        raise InputError(
            f"data.test-source has the text of every one of the {len(rows.texts):,} rows of "
            "data.source, so that none is left for training; give other rows"
        )
    train = rows.take(np.flatnonzero(unseen))
    return train, test, len(rows.texts) - len(train.texts)


def _with_value(train: Table, held_out: Table, column: str) -> tuple[Table, int, Table]:
    """Return the rows with a value in a column, and the number of rows without one."""
    given = [
        np.flatnonzero([bool(value) for value in each_folded(table.others[column])])
        for table in (train, held_out)
    ]
    without = len(train.texts) + len(held_out.texts) - len(given[0]) - len(given[1])
    if not len(given[0]):
        raise InputError(
            f"none of the {len(train.texts):,} training rows has anything in {column!r}, the "
            "column of data.partition; name another column, or use iid with data.institutions"
        )
    return train.take(given[0]), without, held_out.take(given[1])


def _placed(
    settings: DataConfig,
    train: Table,
    held_out: Table,
    classes: tuple[str, ...],
    unit: str,
    seed: int,
) -> partition.Assignment:
    scheme, _, argument = schemes.inner(settings.partition).partition(":")
    if scheme in schemes.BY_VALUE:
        return partition.by_column(
            argument,
            train.others[argument],
            held_out.others[argument],
            institutions=settings.institutions,
            min_records=settings.min_records,
        )
    return partition.by_scheme(
        settings.partition,
        _class_indices(train, classes),
        _class_indices(held_out, classes),
        institutions=settings.institutions,
        min_records=settings.min_records,
        seed=seed,
        units=train.others.get(unit),
    )


def _at_several(units: Sequence[str] | None, owner: Int64) -> int:
    """The number of units of privacy that have training rows at more than one institution."""
    if units is None:
        return 0
    held = set(zip(each_folded(units), owner.tolist(), strict=True))
    at = Counter(name for name, place in held if place >= 0)
    return sum(count > 1 for count in at.values())


def _class_indices(table: Table, classes: tuple[str, ...]) -> Int64 | int:
    """Return the class of each row, or the number of rows where there are no classes."""
    if not classes:
        return len(table.texts)
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name] for name in table.labels], dtype=np.int64)


def _by_institution(table: Table, owner: Int64, institutions: int) -> tuple[Table, Int64]:
    """Return the rows with an owner, sorted by owner, and the first row of each owner."""
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(institutions + 1)).astype(np.int64)
    return table.take(order[bounds[0] :]), bounds - bounds[0]
