"""CSV files: their delimiter and encoding, and errors that name a wrong one as the cause."""

import codecs
import csv
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.columns import Rows, check_columns, listed, unreadable
from fedlora.errors import InputError, RecordError

DELIMITERS = {",": ",", ";": ";", "|": "|", "tab": "\t"}
"""Value of ``data.delimiter`` -> the character."""


@dataclass(frozen=True, kw_only=True)
class CsvForm:
    """The form of a CSV file.

    Args:
        delimiter: A key of `DELIMITERS`.
        encoding: A name that `check_encoding` accepts.
    """

    delimiter: str = ","
    encoding: str = "utf-8"

    @property
    def codec(self) -> str:
        """The encoding for `open`: UTF-8 with or without a byte order mark."""
        utf8 = codecs.lookup(self.encoding).name == "utf-8"
        return "utf-8-sig" if utf8 else self.encoding


PLAIN = CsvForm()
"""Commas and UTF-8."""


def check_encoding(name: str, encoding: str) -> None:
    """Refuse an encoding that Python does not know, or that is none of text.

    Raises:
        InputError: Naming the key.
    """
    try:
        b"a".decode(encoding)
    except (LookupError, UnicodeError, ValueError) as error:
        if isinstance(error, UnicodeError):  # a text encoding of more than one byte, such as utf-16
            return
        raise InputError(
            f"{name} is {encoding[:40]!r}, which is no encoding of text; use one such as utf-8, "
            "latin-1, cp1252 or utf-16"
        ) from None


def read(source: str, path: Path, wanted: Mapping[str, str], form: CsvForm) -> Rows:
    """Read the wanted columns of a CSV file, every value as text.

    Args:
        source: The source, for messages.
        path: The file.
        wanted: Column name -> its config key, for messages.
        form: The file's delimiter and encoding.

    Raises:
        InputError: If the file has another delimiter or encoding, lacks a column, has one twice,
            or cannot be read.
    """
    arrow_csv: Any = importlib.import_module("pyarrow.csv")
    arrow: Any = importlib.import_module("pyarrow")
    _check_not_utf8(source, path, form)
    columns, has_rows = header(source, path, form)
    _check_delimiter(source, path, wanted, form, columns)
    check_columns(source, wanted, columns)
    for column in wanted:
        if columns.count(column) > 1:
            raise InputError(
                f"{source} has {columns.count(column)} columns named {column!r}; rename all but one"
            )
    if not has_rows:  # a parse error to Arrow when the header has no end of line
        return {column: [] for column in wanted}
    utf8 = form.codec == "utf-8-sig"
    try:
        table = arrow_csv.read_csv(
            path,
            # A block must hold a whole row, which may span many lines. With one thread, errors
            # give the row's number.
            read_options=arrow_csv.ReadOptions(
                use_threads=False, block_size=1 << 28, encoding="utf8" if utf8 else form.encoding
            ),
            parse_options=arrow_csv.ParseOptions(
                newlines_in_values=True, delimiter=DELIMITERS[form.delimiter]
            ),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=list(wanted), column_types=dict.fromkeys(wanted, arrow.string())
            ),
        )
    except (arrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise _wrong_encoding(source, path, form) or unreadable(source, error) from None
    return {column: table.column(column).to_pylist() for column in wanted}


def header(source: str, path: Path, form: CsvForm) -> tuple[list[str], bool]:
    """The columns of a CSV file, and whether a row follows.

    Raises:
        InputError: If the file cannot be read in this encoding.
    """
    try:
        with path.open(encoding=form.codec, newline="") as file:
            reader = csv.reader(file, delimiter=DELIMITERS[form.delimiter])
            columns = next(reader, list[str]())
            return columns, any(line.strip() for line in file)
    except (UnicodeError, csv.Error) as error:
        raise _wrong_encoding(source, path, form) or unreadable(source, error) from None


def suspected_encoding(content: bytes) -> str:
    """The most likely encoding of a file: ``utf-8``, ``utf-16``, ``cp1252`` or ``latin-1``."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if _decodes(content, "utf-8"):
        return "utf-8"
    controls = bytes(range(0x80, 0xA0))  # control characters in Latin-1, letters in cp1252
    used = bool(content.translate(None, controls) != content)
    return "cp1252" if used and _decodes(content, "cp1252") else "latin-1"


def suspected_delimiter(source: str, path: Path, encoding: str) -> str:
    """The key of `DELIMITERS` that gives the header the most columns; the comma for one column."""
    forms = (CsvForm(delimiter=name, encoding=encoding) for name in DELIMITERS)
    return max(forms, key=lambda form: len(header(source, path, form)[0])).delimiter


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeError:
        return False
    return True


def _check_delimiter(
    source: str, path: Path, wanted: Mapping[str, str], form: CsvForm, columns: list[str]
) -> None:
    """Refuse a file whose header lacks a column only because its delimiter is another one."""
    if all(column in columns for column in wanted):
        return
    for name in DELIMITERS:
        others = header(source, path, CsvForm(delimiter=name, encoding=form.encoding))[0]
        split = len(columns) == 1 and len(others) > 1
        if name != form.delimiter and (split or all(column in others for column in wanted)):
            raise RecordError(
                f"data.delimiter is {form.delimiter!r}, but the columns of {source} seem to be "
                f"separated by {name!r} (then they are {listed(others)}); set data.delimiter to "
                f"{name!r}"
            )


def _wrong_encoding(source: str, path: Path, form: CsvForm) -> InputError | None:
    """The error for a file of another encoding; None where the encoding is not the cause."""
    content = path.read_bytes()
    try:
        content.decode(form.encoding)
    except UnicodeError as error:
        line = content.count(b"\n", 0, getattr(error, "start", 0)) + 1
        return InputError(
            f"data source {source!r} cannot be read as {form.encoding}, which data.encoding names: "
            f"line {line} holds other bytes; set data.encoding to "
            f"{suspected_encoding(content)!r}, which fits the file, or to its real encoding"
        )
    return None


def _check_not_utf8(source: str, path: Path, form: CsvForm) -> None:
    """Refuse to read UTF-8 as another encoding: most of them accept all bytes as wrong letters."""
    if form.codec == "utf-8-sig":
        return
    content = path.read_bytes()
    if not content.isascii() and _decodes(content, "utf-8"):
        raise InputError(
            f"data.encoding is {form.encoding!r}, but {source} is valid UTF-8, and its letters "
            "would be read as others; set data.encoding to 'utf-8'"
        )
