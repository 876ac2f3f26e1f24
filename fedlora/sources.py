"""Rows of named text columns from files, Python packages and the Hugging Face Hub.

A source is one string: the path of a ``.csv``, ``.jsonl`` or ``.parquet`` file,
``package:NAME/FILE`` for such a file inside an installed package, ``package:edgartools`` for the
us-gaap concepts that edgartools ships, or ``hub:NAME[:CONFIG]``. Every value is read as text; a
missing value is the empty text. Each function imports its heavy reader itself, so a cached
federation opens without those readers.
"""

import hashlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fedlora import csv_files
from fedlora.columns import Rows, check_columns, unreadable
from fedlora.csv_files import PLAIN, CsvForm
from fedlora.errors import InputError
from fedlora.extras import require
from fedlora.text import is_unicode

CSV = ".csv"
US_GAAP = "package:edgartools"
"""Columns: text (a concept's words), label (its statement), industry (one that reports it)."""


def read(
    source: str,
    wanted: Mapping[str, str],
    split: str = "train",
    form: CsvForm = PLAIN,
) -> Rows:
    """Read the wanted columns of a source.

    Args:
        source: The source, as described above.
        wanted: Column name -> its config key, for error messages.
        split: The split of a Hub data set; files have none.
        form: Delimiter and encoding of a CSV file.

    Raises:
        InputError: If the source is not there or not readable, has no row, or a column is missing;
            the message names the columns that are there.
    """
    if source.startswith("hub:"):
        rows = _read_hub(source, wanted, split)
    else:
        path = locate(source)
        if source == US_GAAP:
            rows = _read_us_gaap(path, wanted)
        elif _suffix(source) == CSV:
            rows = csv_files.read(source, path, wanted, form)
        else:
            rows = _READERS[_suffix(source)](source, path, wanted)
    if not any(rows.values()):
        raise InputError(
            f"data source {source!r} names its columns, but has no row below them; "
            "give one that has rows"
        )
    return rows


def columns(source: str, form: CsvForm = PLAIN) -> list[str]:
    """The columns of a file, in order.

    Raises:
        InputError: If the source is no file, or cannot be read.
    """
    if source.startswith("hub:") or source == US_GAAP:
        raise InputError(f"data source {source!r} is no file; give a .csv, .jsonl or .parquet file")
    path, suffix = locate(source), _suffix(source)
    if suffix == CSV:
        return csv_files.header(source, path, form)[0]
    if suffix == ".jsonl":
        return list(dict.fromkeys(name for record in _records(source, path) for name in record))
    parquet: Any = importlib.import_module("pyarrow.parquet")
    arrow: Any = importlib.import_module("pyarrow")
    try:
        return parquet.ParquetFile(path).schema_arrow.names
    except (arrow.ArrowInvalid, OSError) as error:
        raise unreadable(source, error) from None


def digest(source: str, split: str = "train") -> str:
    """Return a sha256 that changes with the rows that `read` returns.

    A Hub data set is downloaded if the cache of ``datasets`` lacks it. Its digest covers the
    revisions in that cache, so a later run needs neither the network nor that import.
    """
    if source.startswith("hub:"):
        revisions = _hub_revisions(source)
        if not revisions:
            _load_hub(source, split)
            revisions = _hub_revisions(source)
        return hashlib.sha256(json.dumps([source, split, revisions]).encode()).hexdigest()
    path = locate(source)
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    kind = source if source == US_GAAP else _suffix(source)
    return hashlib.sha256(json.dumps([kind, content]).encode()).hexdigest()


def locate(source: str) -> Path:
    """Return the file of a path or ``package:`` source; packages are found without an import."""
    if source == US_GAAP:
        path = _in_package("edgar", "xbrl/standardization/gaap_mappings.json")
        if path is None:
            raise InputError(
                f"data source {source!r} needs the package edgartools, which is not installed or "
                'has no us-gaap mapping; pip install edgartools (or pip install "fedlora[demo]")'
            )
        return path
    if source.startswith("package:"):
        package, slash, relative = source.removeprefix("package:").partition("/")
        if not slash or not relative:
            raise InputError(
                f"data source {source!r} names no file; write package:NAME/path/to/file.csv"
            )
        path = _in_package(package.replace("-", "_"), relative)
        if path is None:
            raise InputError(
                f"data source {source!r} is not there; pip install {package}, or mend the path"
            )
        return path
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(
            f"data source {source!r} is not a file; give a .csv, .jsonl or .parquet file, "
            "hub:NAME or package:NAME/FILE"
        )
    return path


def _in_package(package: str, relative: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder, relative)
        if path.is_file():
            return path
    return None


def _suffix(source: str) -> str:
    suffix = Path(source).suffix.lower()
    if suffix not in (CSV, *_READERS):
        raise InputError(
            f"data source {source!r} ends in {suffix!r}; it must be {', '.join((CSV, *_READERS))}"
        )
    return suffix


def as_text(value: Any, source: str, column: str) -> str:
    """A value of a row as text; a missing one is the empty text.

    Raises:
        InputError: If it is no text, number or truth value, or no Unicode.
    """
    if value is None:
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
    if isinstance(value, int | float):
        return str(value)
    raise InputError(
        f"column {column!r} of {source} holds a {type(value).__name__}; it must hold one text or "
        "number a row: flatten it"
    )


def _records(source: str, path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    records: list[dict[str, Any]] = []
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    record: Any = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"line {number} is not an object")
                    records.append(cast(dict[str, Any], record))
    except json.JSONDecodeError as error:
        raise unreadable(source, ValueError(f"line {number}: {error.msg}")) from None
    except RecursionError:
        raise unreadable(source, ValueError(f"line {number} is nested too deeply")) from None
    except ValueError as error:
        raise unreadable(source, error) from None
    return records


def _read_jsonl(source: str, path: Path, wanted: Mapping[str, str]) -> Rows:
    records = _records(source, path)
    check_columns(source, wanted, (column for record in records for column in record))
    return {c: [as_text(record.get(c), source, c) for record in records] for c in wanted}


def _read_parquet(source: str, path: Path, wanted: Mapping[str, str]) -> Rows:
    parquet: Any = importlib.import_module("pyarrow.parquet")
    arrow: Any = importlib.import_module("pyarrow")
    try:
        file = parquet.ParquetFile(path)
        check_columns(source, wanted, file.schema_arrow.names)
        columns = {c: file.read(columns=[c]).column(c).to_pylist() for c in wanted}
    except (arrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise unreadable(source, error) from None
    return {c: [as_text(v, source, c) for v in values] for c, values in columns.items()}


def _read_us_gaap(path: Path, wanted: Mapping[str, str]) -> Rows:
    """Make a row of each concept with a statement and each industry that reports it."""
    check_columns(US_GAAP, wanted, ("text", "label", "industry"))
    rows: Rows = {"text": [], "label": [], "industry": []}
    for concept, entry in json.loads(path.read_bytes()).items():
        statement = entry.get("statement")
        if not statement:
            continue
        for industry in sorted(entry.get("industry_overrides") or ()):
            rows["text"].append(_words(concept))
            rows["label"].append(statement)
            rows["industry"].append(industry)
    return {column: rows[column] for column in wanted}


def _words(camel_case: str) -> str:
    """Split ``NetIncomeLossUSGovernment1`` into ``Net Income Loss US Government 1``."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", camel_case))


def _load_hub(source: str, split: str) -> Any:
    require("datasets", "simulation", f"data source {source!r}")
    datasets: Any = importlib.import_module("datasets")
    name, _, config = source.removeprefix("hub:").partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub client raises many unrelated types
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"data source {source!r} (split {split}) cannot be loaded from the Hub: "
            f"{type(error).__name__}: {reason}; check the name, the network and HF_TOKEN, or give "
            "a local file"
        ) from None


def _hub_revisions(source: str) -> list[str]:
    """Name the config/version/revision folders that ``datasets`` keeps for a data set, sorted."""
    name = source.removeprefix("hub:").partition(":")[0]
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{home}/huggingface")
    root = Path(os.environ.get("HF_DATASETS_CACHE", f"{home}/datasets")).expanduser()

    def normalised(text: str) -> str:  # datasets writes owner/camelCase as owner___camel_case
        return text.lower().replace("_", "").replace("/", "")

    folders = [folder for folder in root.glob("*") if normalised(folder.name) == normalised(name)]
    return sorted(
        str(info.parent.relative_to(root))
        for f in folders
        for info in f.glob("*/*/*/dataset_info.json")
    )


def _read_hub(source: str, wanted: Mapping[str, str], split: str) -> Rows:
    dataset = _load_hub(source, split)
    check_columns(source, wanted, dataset.column_names)
    rows: Rows = {}
    for column in wanted:
        values: list[Any] = list(dataset[column])
        names: list[str] | None = getattr(dataset.features[column], "names", None)
        if names is not None:  # a ClassLabel: -1 means no label
            values = [
                names[value] if value is not None and value >= 0 else None for value in values
            ]
        rows[column] = [as_text(value, source, column) for value in values]
    return rows


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
