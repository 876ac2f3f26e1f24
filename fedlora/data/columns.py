"""What all readers of data sources share: values as text, and errors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

from fedlora.data.text import is_unicode
from fedlora.errors import InputError, RecordError

Rows = dict[str, list[str]]
"""Columns of equal length, every value text."""


def check_columns(source: str, wanted: Mapping[str, str], present: Iterable[str]) -> None:
    """Refuse a source without a wanted column.

    Args:
        source: The source, for messages.
        wanted: Column name -> its config key.
        present: The columns of the source.

    Raises:
        InputError: If the source has no column.
        RecordError: For the first missing column. It quotes the columns, which without a header
            are the values of the first record.
    """
    columns = list(dict.fromkeys(present))
    if not columns:
        raise InputError(f"data source {source!r} is empty; give one that has rows")
    for column, key in wanted.items():
        if column in columns:
            continue
        remedy = f"set {key} to one of them"
        if key == "data.partition":
            remedy = (
                "give rows with that column, or set data.partition to natural:COLUMN with one of "
                "them, or to iid with data.institutions"
            )
        if key in ("data.text", "data.label") and {"context", "target"} <= set(columns):
            remedy = 'these are FinLoRA rows: set data.text to "context" and data.label to "target"'
        if key == "data.text" and (with_comma := [name for name in columns if "," in name]):
            remedy += (
                f"; commas separate columns there, so that {with_comma[0]!r} must be renamed to be "
                "one"
            )
        raise RecordError(
            f"{key} is {column!r}, but {source} has the columns {listed(columns)}; {remedy}"
        )


def listed(columns: list[str]) -> str:
    """The first 30 columns, joined by commas."""
    return ", ".join(columns[:30]) + (", ..." if len(columns) > 30 else "")


def check_single(source: str, wanted: Iterable[str], names: Sequence[str]) -> None:
    """Refuse a source in which a wanted column stands twice. Raises `InputError`."""
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise InputError(f"{source} has two columns {twice[0]!r}; rename or remove one of them")


def unreadable(source: str, error: Exception) -> InputError:
    """The error for a file that its reader cannot read; it quotes no record."""
    return InputError(
        f"data source {source!r} cannot be read: {' '.join(str(error).split())[:300]}; mend the "
        "file"
    )


def as_text(value: Any, source: str, column: str) -> str:
    """A value of a row as text; a missing one is the empty text.

    Dates and times are written as ISO 8601 does; pandas' timestamps are dates too.

    Raises:
        InputError: If it is no text, number, date or truth value, or no Unicode.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        if not is_unicode(value):
            raise InputError(
                f"column {column!r} of {source} holds half of a surrogate pair, which is no "
                "character; write the whole pair, or leave it out"
            )
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return "" if value.is_nan() else str(value)
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, date):
        text = value.isoformat()
        return "" if text == "NaT" else text  # pandas' missing date
    kind: str = type(value).__name__
    remedy = "flatten it" if kind in ("list", "tuple", "dict") else "write it as text"
    raise InputError(
        f"column {column!r} of {source} holds a {kind}; it must hold one text, number or date a "
        f"row: {remedy}"
    )
