"""CSV files: their delimiter and encoding, and errors that name a wrong one as the cause."""

import codecs
import csv
import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora.data.columns import Rows, check_columns, check_single, listed
from fedlora.errors import InputError, RecordError

DELIMITERS = {",": ",", ";": ";", "|": "|", "tab": "\t"}
"""Value of ``data.delimiter`` -> the character."""
_EXCEL = re.compile("sep=.?")
"""What a line of Excel begins with that names the delimiter to it and stands before the header."""


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
    stripped = {column.strip(): key for column, key in wanted.items()}  # as the header is
    columns = checked_header(source, path, stripped, form)
    check_columns(source, stripped, columns)
    check_single(source, stripped, columns)
    places = {column: columns.index(column.strip()) for column in wanted}
    found: Rows = {column: [] for column in wanted}
    rows = records(source, path, form)
    next(rows)  # the header
    for row in rows:
        for column, place in places.items():
            found[column].append(row[place])
    return found


def header(source: str, path: Path, form: CsvForm) -> list[str]:
    """The columns of a CSV file; empty for an empty file.

    Raises:
        InputError: If the file cannot be read in this encoding.
    """
    return next(records(source, path, form, strict=False), list[str]())


def checked_header(source: str, path: Path, wanted: Iterable[str], form: CsvForm) -> list[str]:
    """The columns of a CSV file, after a check of its delimiter and encoding.

    Args:
        source: The source, for messages.
        path: The file.
        wanted: The columns that are needed: one may lack only because the delimiter is another.
        form: The delimiter and encoding that the file is said to have.

    Raises:
        InputError: If the file has another encoding.
        RecordError: If it has another delimiter; it quotes the columns.
    """
    _check_not_utf8(source, path, form)
    columns = header(source, path, form)
    _check_delimiter(source, path, wanted, form, columns)
    return columns


def records(source: str, path: Path, form: CsvForm, *, strict: bool = True) -> Generator[list[str]]:
    """The header of a CSV file, then its rows; blank lines and Excel's line ``sep=;`` are left out.

    Names in the header are stripped of white space, as after the comma in ``id, text``.

    Args:
        source: The source, for messages.
        path: The file.
        form: The file's delimiter and encoding.
        strict: Whether to refuse quotes that are not those of RFC 4180: an open one would make
            text of the rows after it, up to the next.

    Raises:
        InputError: If the file cannot be read in this encoding, or for a row with other quotes or
            with another number of values than the header. The message quotes no record.
    """
    columns: list[str] | None = None
    line = 1  # on which the row begins
    before = csv.field_size_limit(2**31 - 1)  # a text may be longer than csv expects
    try:
        with path.open(encoding=form.codec, newline="") as file:
            reader = csv.reader(file, delimiter=DELIMITERS[form.delimiter], strict=strict)
            for row in reader:
                if row and not (columns is None and _EXCEL.fullmatch(row[0])):
                    if columns is None:
                        columns = row = [name.strip() for name in row]
                    if strict and len(row) != len(columns):
                        raise InputError(
                            f"data source {source!r} has {len(row)} values in the row from line "
                            f"{line}, but {len(columns)} columns; quote values that hold the "
                            "delimiter, or fill in what is missing"
                        )
                    yield row
                line = reader.line_num + 1
    except (UnicodeError, csv.Error) as error:
        raise _wrong_encoding(source, path, form) or InputError(
            f"data source {source!r} cannot be read in the row from line {line} ({error}); a value "
            'that holds a quote must be in quotes, each quote in it doubled ("say ""yes"""), and '
            "the delimiter follows the closing one"
        ) from None
    finally:
        csv.field_size_limit(before)


def suspected_encoding(content: bytes) -> str:
    """The most likely encoding of a file: ``utf-8``, ``utf-16``, ``cp1252`` or ``latin-1``."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    text = content.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    letters = len(text) - len(text.encode("ascii", "ignore")) - broken
    if 4 * broken <= letters:  # all of it, or all but a few places, such as a letter cut in two
        return "utf-8"
    controls = bytes(range(0x80, 0xA0))  # control characters in Latin-1, letters in cp1252
    used = bool(content.translate(None, controls) != content)
    return "cp1252" if used and _decodes(content, "cp1252") else "latin-1"


def suspected_delimiter(source: str, path: Path, encoding: str) -> str:
    """The key of `DELIMITERS` that gives the header the most columns; the comma for one column."""
    forms = (CsvForm(delimiter=name, encoding=encoding) for name in DELIMITERS)
    return max(forms, key=lambda form: len(header(source, path, form))).delimiter


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeError:
        return False
    return True


def _check_delimiter(
    source: str, path: Path, wanted: Iterable[str], form: CsvForm, columns: list[str]
) -> None:
    """Refuse a file whose header lacks a column only because its delimiter is another one."""
    if all(column in columns for column in wanted):
        return
    for name in DELIMITERS:
        others = header(source, path, CsvForm(delimiter=name, encoding=form.encoding))
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
        fits = suspected_encoding(content)
        remedy = f"set data.encoding to {fits!r}, which fits the file, or to its real encoding"
        if fits == form.encoding:
            remedy = "mend this line, since almost all others fit it"
        return InputError(
            f"data source {source!r} cannot be read as {form.encoding}, which data.encoding names: "
            f"line {line} holds other bytes; {remedy}"
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
