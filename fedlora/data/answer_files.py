"""Files of texts for ``fedlora predict``, and the same rows with a column of answers."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.data import rows, sources, tables
from fedlora.data.tables import Frame
from fedlora.errors import InputError
from fedlora.files import existing_parent, replacing

STDIN = "-"
ANSWER, SCORE = "answer", "score"
"""The columns that are added: the answer, and its probability where there are classes."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Rows with a text each.

    Attributes:
        texts: One for each row, never empty.
        rows: The rows with all their columns.
    """

    texts: list[str]
    rows: Frame


def of(texts: list[str]) -> Texts:
    """Texts without a file."""
    return Texts(texts=texts, rows=tables.frame({"text": texts}, "texts"))


def read(source: str, text: str) -> Texts:
    """Read the texts of a file, or of standard input with one text a line.

    Args:
        source: A ``.csv``, ``.jsonl`` or ``.parquet`` file, or ``-``.
        text: The column of the text; several columns, separated by commas, are joined as in a run.
            Standard input has no columns.

    Raises:
        InputError: If the file cannot be read, a column is missing, or a row has no text.
    """
    if source == STDIN:
        try:
            given = sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
        except UnicodeDecodeError:
            raise InputError("standard input is not UTF-8; convert it") from None
        source, text = "standard input", "text"
        lines = [line.rstrip("\r") for line in given.split("\n")] if given else []
        table = tables.frame({"text": lines}, source)
    else:
        table = tables.read_file(sources.locate(source), source)
    if not len(table):
        raise InputError(f"{source} has no row; give one text at least")
    wanted = dict.fromkeys(rows.text_columns(text), "data.text")
    columns = tables.texts(table, wanted, source).values()
    texts = [rows.joined(parts) for parts in zip(*columns, strict=True)]
    if "" in texts:
        raise InputError(
            f"row {texts.index('') + 1} of {source} has no text in {text} "
            f"({texts.count('')} of {len(texts)} rows); fill it in or drop these rows"
        )
    return Texts(texts=texts, rows=table)


def check_out(out: Path, texts: Texts) -> None:
    """Refuse a place for answers before any work starts.

    Raises:
        InputError: If the file exists, has another ending or cannot be written, or the rows have a
            column of the answers' names.
    """
    if out.suffix.lower() not in tables.READERS:
        raise InputError(f"--out is {str(out)!r}; give a .csv, .jsonl or .parquet file")
    try:
        if out.exists():
            raise InputError(f"{out} exists; give an --out that does not exist")
        existing_parent(out)
    except OSError as error:
        raise InputError(f"{error}; give another --out") from None
    if taken := {ANSWER, SCORE} & set(texts.rows.columns):
        raise InputError(
            f"the rows have a column {sorted(taken)[0]!r} already, which --out would replace; "
            "rename it in the file"
        )


def write(out: Path, texts: Texts, answers: Sequence[dict[str, Any]]) -> None:
    """Write the rows with their answers, whole or not at all; see `check_out`.

    Raises:
        InputError: If the file cannot be written, as on a full disk, or the rows do not fit it.
    """
    added = {name: [a[name] for a in answers] for name in (ANSWER, SCORE) if name in answers[0]}
    table = texts.rows.assign(**added)
    try:
        with replacing(out) as file:
            if out.suffix.lower() == ".parquet":
                table.to_parquet(file, index=False)
            elif out.suffix.lower() == ".csv":
                table.to_csv(file, index=False)
            else:
                table.to_json(
                    file, orient="records", lines=True, force_ascii=False, date_format="iso"
                )
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{out} cannot be written ({' '.join(str(error).split())[:120]}); give another --out"
        ) from None
