"""Records that a Python process holds: data frames, data sets, columns, and tables by institution.

`hold` copies the columns that a run reads and names them ``memory:DIGEST``, a source like any other
(`fedlora.data.sources`). Nothing of them is written to disk but the tokenised shards that every run
caches. Another process can open these, but not the rows.
"""

import hashlib
import hmac
import json
import math
import secrets
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from fedlora.data.columns import Rows, as_text, check_columns, check_single
from fedlora.data.text import folded
from fedlora.errors import InputError

MEMORY = "memory:"
"""Begins the name of a source that this process holds."""
INSTITUTION = "institution"
"""The column that names the institution of a row, where tables or files are given by
institution."""
KINDS = (
    "a pandas.DataFrame, a datasets.Dataset, a dictionary of columns, or a dictionary with one of "
    "these for each institution"
)

Table = Any
"""One of `KINDS`. Neither pandas nor datasets is imported here, so there is no narrower type."""


_held: dict[str, Rows] = {}
_KEY = secrets.token_bytes(32)
"""Of this process: names of tables say nothing of their rows to others."""


@contextmanager
def hold(table: Table, wanted: Mapping[str, str], key: str) -> Generator[str]:
    """Hold the wanted columns of a table until the block ends.

    Args:
        table: One of `KINDS`.
        wanted: Column name -> its config key, for error messages.
        key: What gave the table, for error messages.

    Yields:
        The name of the source.

    Raises:
        InputError: For a table of another type, a missing column, or a value that is no text.
    """
    rows = columns(table, wanted, key)
    if not any(rows.values()):
        raise InputError(f"{key} has no row; give one that has rows")
    # a plain digest would let whoever knows all rows but one try out the last
    source = MEMORY + hmac.new(_KEY, _digest(rows).encode(), hashlib.sha256).hexdigest()
    _held[source] = rows
    try:
        yield source
    finally:
        _held.pop(source, None)


def read(source: str, wanted: Mapping[str, str]) -> Rows:
    """The wanted columns of a source that `hold` has named; see `fedlora.data.sources.read`."""
    if source not in _held:
        raise InputError(
            f"data source {source[:20]}... was a table of another Python process, and its "
            "tokenised records are no longer cached; call fedlora.run again with data=..."
        )
    rows = _held[source]
    check_columns(source, wanted, rows)
    return {column: rows[column] for column in wanted}


def columns(table: Table, wanted: Mapping[str, str], source: str) -> Rows:
    """The wanted columns of a table, every value as text.

    Args:
        table: One of `KINDS`.
        wanted: Column name -> its config key, for error messages.
        source: What gave the table, for error messages.

    Raises:
        InputError: For a table of another type, a missing column, or a value that is no text.
    """
    if by_institution(table):
        return _joined(table, wanted, source)
    names = _names(table, source)
    check_columns(source, wanted, names)
    check_single(source, wanted, names)
    rows = {
        name: [as_text(plain(value), source, name) for value in _values(table, name)]
        for name in wanted
    }
    lengths = {name: len(column) for name, column in rows.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"{source} has columns of different lengths, {lengths}; make them equal")
    return rows


def digest(table: Table, source: str) -> str:
    """SHA-256 (hex) of all columns of a table, whatever their values are."""
    if by_institution(table):
        parts = {str(name): digest(part, source) for name, part in table.items()}
        return _digest(parts)
    return _digest(
        {
            name: [f"{type(v).__name__} {v}" for v in map(plain, _values(table, name))]
            for name in _names(table, source)
        }
    )


def is_table(thing: Any) -> bool:
    """Whether a thing is a table of one holder, of the kinds that `columns` reads."""
    frame = _is_a(thing, "pandas", "DataFrame") or _is_a(thing, "datasets", "Dataset")
    return frame or isinstance(thing, Mapping)


def by_institution(table: Table) -> bool:
    """Whether a table is a dictionary with a table for each institution.

    Raises:
        InputError: For a `datasets.DatasetDict`, whose tables are splits.
    """
    if _is_a(table, "datasets", "DatasetDict"):
        raise InputError(
            f"data is a DatasetDict with the splits {', '.join(table)}, which would be taken for "
            'institutions; give one split, as in data=splits["train"], and the published test '
            'split as test_data=splits["test"]'
        )
    return isinstance(table, Mapping) and not _is_column(
        next(iter(cast(Mapping[str, Any], table).values()), None)
    )


def _names(table: Table, key: str) -> tuple[str, ...]:
    """The names of a table's columns. Raises `InputError` for what is no table."""
    if isinstance(table, Mapping):
        return tuple(cast(Mapping[str, Any], table))
    if _is_a(table, "pandas", "DataFrame"):
        return tuple(map(str, table.columns))
    if _is_a(table, "datasets", "Dataset"):
        return tuple(table.column_names)
    module, name = type(table).__module__.partition(".")[0], type(table).__qualname__
    kind = name if module == "builtins" else f"{module} {name}"
    hint = "; give its .to_pandas()" if hasattr(table, "to_pandas") else ""
    raise InputError(f"{key} is a {kind}; it must be {KINDS}{hint}")


def _values(table: Table, name: str) -> list[Any]:
    """The values of one column, None where one is missing."""
    if isinstance(table, Mapping):
        return list(cast(Mapping[str, list[Any]], table)[name])
    if _is_a(table, "pandas", "DataFrame"):
        column = table.iloc[:, list(map(str, table.columns)).index(name)]
        gone: list[bool] = column.isna().tolist()
        return [None if g else v for v, g in zip(column.tolist(), gone, strict=True)]
    values: list[Any] = list(table[name])
    classes: list[str] | None = getattr(table.features[name], "names", None)
    if classes is None:
        return values
    return [classes[v] if v is not None and v >= 0 else None for v in values]  # -1: no class


def _joined(tables: Mapping[Any, Table], wanted: Mapping[str, str], source: str) -> Rows:
    """The rows of all institutions, with the column `INSTITUTION`."""
    if not tables:
        raise InputError(f"{source} is an empty dictionary; it must be {KINDS}")
    own = {name: key for name, key in wanted.items() if name != INSTITUTION}
    rows: Rows = {name: [] for name in wanted}
    names: dict[str, Any] = {}
    for institution, table in tables.items():
        other = names.setdefault(folded(str(institution)), institution)
        if other is not institution:
            raise InputError(
                f"{source} has the institutions {other!r} and {institution!r}, whose names are "
                "the same but for case, spaces or type; rename one, or give their rows together"
            )
        place = f"{source}[{institution!r}]"
        if by_institution(table):
            raise InputError(f"{place} is a dictionary of tables; it must be one table")
        part = columns(table, own, place)
        if not any(part.values()):
            raise InputError(f"{place} has no row; leave this institution out, or give its rows")
        add_institution(rows, str(institution), part)
    return rows


def add_institution(rows: Rows, institution: str, part: Rows) -> None:
    """Append an institution's rows; the column `INSTITUTION`, where it is wanted, gets its name."""
    length = max((len(values) for values in part.values()), default=0)
    for name, values in rows.items():
        values += [institution] * length if name == INSTITUTION else part[name]


def _is_column(values: Any) -> bool:
    """Whether a thing is a list, or has one dimension as a series of pandas or array of numpy."""
    return isinstance(values, list | tuple) or getattr(values, "ndim", None) == 1


def _is_a(thing: Any, module: str, name: str) -> bool:
    """Whether a thing is of a class of a library that this process has imported, if it has."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(thing, getattr(loaded, name))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """A value without numpy's type; a missing one of pandas, or a number that is none, is None."""
    if getattr(value, "ndim", None) == 0:
        if str(getattr(value, "dtype", "")) in ("datetime64[ns]", "datetime64[ps]"):
            value = value.astype("datetime64[us]")  # of finer ones numpy gives numbers
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return None
    pandas = sys.modules.get("pandas")
    return None if pandas is not None and value is pandas.NA else value
