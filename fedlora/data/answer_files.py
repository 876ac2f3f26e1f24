"""Files of texts for ``fedlora predict``, and the same rows with a column of answers."""

import csv
import importlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast

from fedlora.data import csv_files, rows
from fedlora.data.columns import as_text, check_columns, check_single
from fedlora.data.csv_files import PLAIN, CsvForm
from fedlora.data.text import is_unicode
from fedlora.errors import InputError
from fedlora.files import existing_parent, expanded, replacing

STDIN = "-"
ANSWER, SCORE = "answer", "score"
"""The columns that are added: the answer, and its probability where there are classes."""
PARQUET = ".parquet"
KINDS = (".csv", ".jsonl", PARQUET)
_NAMED = "a .csv, .jsonl or .parquet file"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Rows with a text each.

    Attributes:
        texts: One for each row, never empty.
        rows: The rows with all their columns.
        columns: Column names in the file's order.
    """

    texts: list[str]
    rows: list[dict[str, Any]]
    columns: list[str]


def of(texts: list[str]) -> Texts:
    """Texts without a file."""
    return Texts(texts=texts, rows=[{"text": text} for text in texts], columns=["text"])


def read(source: str, text: str, form: CsvForm = PLAIN) -> Texts:
    """Read the texts of a file, or of standard input with one text a line.

    Args:
        source: A ``.csv`` file, a ``.jsonl`` file in UTF-8, a ``.parquet`` file, or ``-``.
        text: The column of the text; several columns, separated by commas, are joined as in a run.
            Standard input has no columns.
        form: The delimiter and encoding of a ``.csv`` file.

    Raises:
        InputError: If the file cannot be read or has another form, a column is missing, or a row
            has no text.
    """
    place = "standard input" if source == STDIN else source
    try:
        if source == STDIN:
            lines = sys.stdin.read().removeprefix("\ufeff").removesuffix("\n").split("\n")
            found = [{"text": line.rstrip("\r")} for line in lines if lines != [""]]
            columns, wanted = ["text"], ["text"]
        else:
            wanted = rows.text_columns(text)
            found, columns = _rows(source, wanted, form)
    except InputError:
        raise
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{place} cannot be read ({type(error).__name__}: {error}); give {_NAMED} "
            "in UTF-8, or - for one text a line of standard input; data.encoding and "
            "data.delimiter set another form of a .csv file"
        ) from None
    if not found:
        raise InputError(f"{place} has no row; give one text at least")
    check_columns(place, dict.fromkeys(wanted, "data.text"), columns)
    texts = [rows.joined([as_text(row.get(c), place, c) for c in wanted]) for row in found]
    if "" in texts:
        raise InputError(
            f"row {texts.index('') + 1} of {place} has no text in {', '.join(wanted)} "
            f"({texts.count('')} of {len(texts)} rows); fill it in or drop these rows"
        )
    return Texts(texts=texts, rows=cast(list[dict[str, Any]], found), columns=columns)


def check_out(out: Path, texts: Texts) -> None:
    """Refuse a place for answers before any work starts.

    Raises:
        InputError: If the file exists, has another ending or cannot be written, or the rows have a
            column of the answers' names.
    """
    if out.suffix.lower() not in KINDS:
        raise InputError(f"--out is {str(out)!r}; give {_NAMED}")
    try:
        if out.exists():
            raise InputError(f"{out} exists; give an --out that does not exist")
        existing_parent(out)
    except OSError as error:
        raise InputError(f"{error}; give another --out") from None
    if taken := {ANSWER, SCORE} & set(texts.columns):
        raise InputError(
            f"the rows have a column {sorted(taken)[0]!r} already, which --out would replace; "
            "rename it in the file"
        )
    for number, row in enumerate(texts.rows, start=1):
        if not is_unicode(json.dumps(row, ensure_ascii=False, default=_as_json)):
            raise InputError(
                f"row {number} holds half of a surrogate pair, which no file can; correct the row"
            )
    if out.suffix.lower() == PARQUET:
        try:
            _table(texts.rows, texts.columns)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"the rows make no .parquet file ({' '.join(str(error).split())[:120]}); give an "
                "--out that ends in .jsonl"
            ) from None


def write(out: Path, texts: Texts, answers: Sequence[dict[str, Any]]) -> None:
    """Write the rows with their answers, whole or not at all; see `check_out`.

    Raises:
        InputError: If the file cannot be written, as on a full disk.
    """
    added = [name for name in (ANSWER, SCORE) if name in answers[0]]
    both = (
        row | {name: answer[name] for name in added}
        for row, answer in zip(texts.rows, answers, strict=True)
    )
    suffix = out.suffix.lower()
    try:
        with replacing(out) as file:
            if suffix == PARQUET:
                parquet: Any = importlib.import_module("pyarrow.parquet")
                table = _table(texts.rows, texts.columns)
                for name in added:
                    table = table.append_column(name, [[answer[name] for answer in answers]])
                parquet.write_table(table, file)
                return
            text = io.TextIOWrapper(file, "utf-8", newline="")
            if suffix == ".csv":
                lines = csv.DictWriter(text, [*texts.columns, *added])
                lines.writeheader()
                lines.writerows(both)
            else:
                text.writelines(
                    json.dumps(row, ensure_ascii=False, default=_as_json) + "\n" for row in both
                )
            text.detach()  # flushed, and the file stays open
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror or error}); give another --out"
        ) from None


def _rows(
    source: str, wanted: Sequence[str], form: CsvForm
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file and its columns; none of an empty file."""
    path = expanded(source)
    if path.suffix.lower() not in KINDS:
        raise InputError(f"--data is {source!r}; give {_NAMED}, or - for standard input")
    if path.suffix.lower() == PARQUET:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        table = parquet.read_table(path)
        columns = [name.strip() for name in table.column_names]
        check_single(f"--data {source}", columns, columns)
        return table.rename_columns(columns).to_pylist(), columns
    if path.suffix.lower() == ".csv":
        columns = csv_files.checked_header(source, path, wanted, form)
        found = list(csv_files.records(source, path, form))[1:]
        check_single(f"--data {source}", columns, columns)
        return [dict(zip(columns, row, strict=True)) for row in found], columns
    with path.open(encoding="utf-8-sig") as file:
        lines: list[Any] = [json.loads(line) for line in file if line.strip()]
    if not all(isinstance(row, dict) for row in lines):
        raise ValueError("a line is not an object")
    return lines, list(dict.fromkeys(column for row in lines for column in row))


def _table(found: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Any:
    """The rows as a table of Arrow. Raises ValueError or TypeError for values of mixed types."""
    arrow: Any = importlib.import_module("pyarrow")
    return arrow.table({name: [row.get(name) for row in found] for name in columns})


def _as_json(value: Any) -> str:
    """A value of a .parquet file that JSON has no form for, as a run reads it."""
    return value.isoformat() if isinstance(value, date) else str(value)
