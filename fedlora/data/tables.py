"""Tables of records as columns of text: files, data frames, data sets and dictionaries.

pandas reads every kind. Every value is text, and a missing one is the empty text. `hold` names a
table of this process ``memory:DIGEST``, a source like any other (`fedlora.data.sources`).
"""

import csv
import hashlib
import hmac
import importlib
import json
import secrets
import sys
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, cast

from fedlora.data.text import alike, is_unicode
from fedlora.errors import InputError, RecordError

MEMORY = "memory:"
"""Begins the name of a source that this process holds."""
INSTITUTION = "institution"
"""The column that names the institution of a row, where tables or files are given by
institution."""
KINDS = (
    "a pandas.DataFrame, a datasets.Dataset, a dictionary of columns, or a dictionary with one of "
    "these for each institution"
)
DELIMITERS = ",;\t|"

Table = Any
"""One of `KINDS`. Neither pandas nor datasets is imported here, so there is no narrower type."""
Frame = Any
"""A pandas.DataFrame."""
Rows = dict[str, list[str]]
"""Columns of equal length, every value text."""

_held: dict[str, Rows] = {}
_KEY = secrets.token_bytes(32)
"""Of this process: names of tables say nothing of their rows to others."""


def read_file(path: Path, source: str) -> Frame:
    """Read a file; names of columns lose the blanks around them.

    Args:
        path: A ``.csv`` file in UTF-8, with a header, whose delimiter is the one of `DELIMITERS`
            that gives the header the most columns; a ``.jsonl`` or a ``.parquet`` file.
        source: The file's name, for messages.

    Raises:
        InputError: If it cannot be read; the message quotes no record.
    """
    if path.suffix.lower() not in READERS:
        raise InputError(
            f"data source {source!r} ends in {path.suffix!r}; it must be {', '.join(READERS)}"
        )
    try:
        table = READERS[path.suffix.lower()](path)
    except (ValueError, OSError, NotImplementedError, RecursionError, Warning) as error:
        remedy = "convert it to UTF-8" if isinstance(error, UnicodeDecodeError) else "mend the file"
        raise InputError(
            f"data source {source!r} cannot be read: {' '.join(str(error).split())[:200]}; {remedy}"
        ) from None
    table.columns = [str(name).strip() for name in table.columns]
    return table


def _read_csv(path: Path) -> Frame:
    pandas = _pandas()
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next((line for line in file if line.strip()), "")
        parted = [next(csv.reader([header], delimiter=sign)) for sign in DELIMITERS]
        names = max(parted, key=len)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # a longer row loses values
            table = pandas.read_csv(
                file,
                sep=DELIMITERS[parted.index(names)],
                dtype=str,
                keep_default_na=False,
                index_col=False,
            )
    table.columns = names  # pandas gives a name that is there twice another one
    return table


def _read_jsonl(path: Path) -> Frame:
    with path.open(encoding="utf-8-sig") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not an object")
    return _pandas().DataFrame(rows, dtype=object)


def _read_parquet(path: Path) -> Frame:
    return _pandas().read_parquet(path, dtype_backend="pyarrow")


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
"""Ending of a file -> its reader."""


def frame(table: Table, source: str) -> Frame:
    """A table as a data frame; that of institutions gets the column `INSTITUTION`.

    Raises:
        InputError: For a table of another type, or columns of different lengths.
    """
    if by_institution(table):
        if same := alike([str(name) for name in table]):
            raise InputError(f"{source} has the institutions {same}, one name; rename one")
        return stacked({str(name): frame(part, source) for name, part in table.items()}, source)
    pandas = _pandas()
    if isinstance(table, pandas.DataFrame):
        return table.set_axis([str(name) for name in table.columns], axis=1)
    classes: dict[str, Any] = {}
    if _is_a(table, "datasets", "Dataset"):
        classes = {name: getattr(kind, "names", None) for name, kind in table.features.items()}
        table = table.to_dict()
    if not isinstance(table, Mapping):
        raise InputError(f"{source} is a {type(table).__name__}; it must be {KINDS}")
    columns = {str(name): list(v) for name, v in cast(Mapping[str, Any], table).items()}
    for name in filter(classes.get, classes):  # -1 is no class
        columns[name] = [None if v is None or v < 0 else classes[name][v] for v in columns[name]]
    try:
        return pandas.DataFrame(columns, dtype=object)
    except ValueError:
        lengths = {name: len(values) for name, values in columns.items()}
        raise InputError(
            f"{source} has columns of different lengths, {lengths}; make them equal"
        ) from None


def stacked(parts: Mapping[str, Frame], source: str) -> Frame:
    """The rows of all institutions, in the columns that all of them have, and `INSTITUTION`.

    Raises:
        InputError: If there is no institution, or one has no row.
    """
    if not parts:
        raise InputError(f"{source} is an empty dictionary; it must be {KINDS}")
    if empty := [name for name, part in parts.items() if not len(part)]:
        raise InputError(f"{empty[0]!r} of {source} has no row; leave it out, or give its rows")
    named = [part.astype(object).assign(**{INSTITUTION: name}) for name, part in parts.items()]
    return _pandas().concat(named, join="inner", ignore_index=True)


def texts(table: Frame, wanted: Mapping[str, str], source: str) -> Rows:
    """The wanted columns of a data frame, every value as text.

    Args:
        table: The data frame.
        wanted: Column name -> its config key, for error messages.
        source: What gave the table, for error messages.

    Raises:
        InputError: If a column is there twice, or a value is no text, number or date.
        RecordError: For the first missing column. It quotes the columns, which without a header
            are the values of the first record.
    """
    present = list(table.columns)
    rows: Rows = {}
    for name, key in wanted.items():
        if present.count(name) != 1:
            listed = ", ".join(present[:30]) + (", ..." if len(present) > 30 else "")
            raise RecordError(
                f"{key} is {name!r}, but {source} has {present.count(name) or 'no'} such column "
                f"(it has {listed}); name one of them, once"
            )
        try:
            values, missing = table[name].tolist(), table[name].isna().tolist()
        except (ValueError, OverflowError) as error:  # dates that Python has not
            raise InputError(
                f"{source} cannot be read: column {name!r}: {str(error)[:100]}; mend the file"
            ) from None
        rows[name] = [
            "" if gone else as_text(value, source, name)
            for value, gone in zip(values, missing, strict=True)
        ]
    return rows


def as_text(value: Any, source: str, column: str) -> str:
    """A value of a row as text; a missing one is the empty text, dates are as in ISO 8601.

    Raises:
        InputError: If it is no text, number, date or truth value, or no Unicode.
    """
    if type(value) is str and is_unicode(value):
        return value
    pandas = _pandas()
    if type(value).__name__ == "datetime64":
        value = pandas.Timestamp(value)
    elif getattr(value, "ndim", None) == 0:  # of numpy or torch
        value = cast(Any, value).item()
    kind = type(value).__name__
    if kind in ("str", "bytes") or not pandas.api.types.is_scalar(value):
        raise InputError(
            f"column {column!r} of {source} holds a {kind} that cannot be read; it must hold one "
            "text, number or date a row: write it as text"
        )
    if pandas.isna(value):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.isoformat() if isinstance(value, date) else str(value)


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
    rows = texts(frame(table, key), wanted, key)
    # a plain digest would let whoever knows all rows but one try out the last
    content = json.dumps(rows, sort_keys=True).encode()
    source = MEMORY + hmac.new(_KEY, content, hashlib.sha256).hexdigest()
    _held[source] = rows
    try:
        yield source
    finally:
        _held.pop(source, None)


def held(source: str) -> Frame:
    """The rows that `hold` has named. Raises `InputError` in another process, or after its end."""
    if source not in _held:
        raise InputError(
            f"data source {source[:20]}... was a table of another Python process; call "
            "fedlora.run again with data=..."
        )
    return _pandas().DataFrame(_held[source])


def is_table(thing: Any) -> bool:
    """Whether a thing is a table of one holder, of the kinds that `frame` reads."""
    known = _is_a(thing, "pandas", "DataFrame") or _is_a(thing, "datasets", "Dataset")
    return known or isinstance(thing, Mapping)


def by_institution(table: Table) -> bool:
    """Whether a table is a dictionary with a table for each institution.

    Raises:
        InputError: For a `datasets.DatasetDict`, whose tables are splits.
    """
    if _is_a(table, "datasets", "DatasetDict"):
        raise InputError(
            f"data has the splits {', '.join(table)}, which would be taken for institutions; give "
            'one, as in data=splits["train"], test_data=splits["test"]'
        )
    if not isinstance(table, Mapping):
        return False
    first = next(iter(cast(Mapping[str, Any], table).values()), None)
    return not isinstance(first, list | tuple) and getattr(first, "ndim", None) != 1


def _is_a(thing: Any, module: str, name: str) -> bool:
    """Whether a thing is of a class of a library that this process has imported, if it has."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(thing, getattr(loaded, name))


def _pandas() -> Any:
    """Pandas, imported late: most commands need none."""
    return importlib.import_module("pandas")
