"""Rows of named text columns from files, Python packages and the Hugging Face Hub.

A source is one string: the path of a ``.csv``, ``.jsonl`` or ``.parquet`` file; a directory or glob
of such files, one for each institution, which gives the column ``institution``;
``package:NAME/FILE`` for such a file inside an installed package, ``package:edgartools`` for the
us-gaap concepts that edgartools ships, ``hub:NAME[:CONFIG]``, ``python:MODULE:FUNCTION`` for a
function that returns a table, or ``memory:DIGEST`` for a table that this process holds
(`data.tables`). Every value is read as text; a missing value is the empty text. Each function
imports its heavy reader itself, so a cached federation opens without those readers.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

from fedlora.config import plugins, schemes
from fedlora.data import csv_files, tables
from fedlora.data.columns import Rows, as_text, check_columns, check_single, unreadable
from fedlora.data.csv_files import PLAIN, CsvForm
from fedlora.data.text import folded
from fedlora.errors import InputError, RecordError
from fedlora.extras import require
from fedlora.files import expanded, sha256

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
        rows = tables.columns(_load_hub(source, split), wanted, source)
    elif source.startswith(tables.MEMORY):
        rows = tables.read(source, wanted)
    elif source.startswith(schemes.PYTHON):
        rows = tables.columns(_call(source, split), wanted, source)
    elif files := institution_files(source):
        rows = _read_files(files, wanted, form)
    else:
        rows = _read_file(source, wanted, form)
    if not any(rows.values()):
        raise InputError(
            f"data source {source!r} names its columns, but has no row below them; "
            "give one that has rows"
        )
    return rows


def _read_file(source: str, wanted: Mapping[str, str], form: CsvForm) -> Rows:
    path = locate(source)
    if source == US_GAAP:
        return _read_us_gaap(path, wanted)
    if _suffix(source) == CSV:
        return csv_files.read(source, path, wanted, form)
    return _READERS[_suffix(source)](source, path, wanted)


def _read_files(files: Mapping[str, Path], wanted: Mapping[str, str], form: CsvForm) -> Rows:
    """The rows of all files, and the name of each row's file as the column ``institution``."""
    own = {name: key for name, key in wanted.items() if name != tables.INSTITUTION}
    rows: Rows = {name: [] for name in wanted}
    for institution, path in files.items():
        part = _read_file(str(path), own, form)
        if not any(part.values()):
            raise InputError(
                f"{str(path)!r} has no row; remove the file, or give the institution's rows"
            )
        tables.add_institution(rows, institution, part)
    return rows


def institution_files(source: str) -> dict[str, Path]:
    """Institution -> its file, sorted, of a source that is a directory or a glob; else nothing.

    Raises:
        InputError: If there is no file, or two files have one name apart from their ending.
    """
    path = expanded(source)
    with _accessible(source):
        if path.is_dir():
            found = [file for file in path.iterdir() if file.suffix.lower() in (CSV, *_READERS)]
        elif is_glob(source) and not path.exists():
            matching = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
            found = [file for file in matching if file.is_file()]
        else:
            return {}
    if not found:
        raise InputError(
            f"data source {source!r} has no file; give a directory or glob of "
            f"{', '.join((CSV, *_READERS))} files, one for each institution"
        )
    files: dict[str, Path] = {}
    for file in sorted(found):
        if other := files.get(folded(file.stem)):
            raise InputError(
                f"data source {source!r} has {other.name} and {file.name}, which are both the "
                "institution's of that name; join or rename them"
            )
        files[folded(file.stem)] = file
    return {file.stem: file for file in files.values()}


def is_path(source: str) -> bool:
    """Whether a source is a path, of a file, a directory or a glob."""
    return not source.startswith(("hub:", "package:", schemes.PYTHON, tables.MEMORY))


def is_glob(source: str) -> bool:
    """Whether a source is a path with wildcards."""
    return any(sign in source for sign in "*?[") and not re.match(r"\w{2,}:", source)


def is_per_institution(source: str) -> bool:
    """Whether a source is a directory or glob, whose files are the institutions'."""
    path = expanded(source)
    with _accessible(source):
        return path.is_dir() or (is_glob(source) and not path.exists())


@contextlib.contextmanager
def _accessible(source: str) -> Generator[None]:
    """Turn an error of the file system, such as a directory closed to this user, into one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"data source {source!r} cannot be read: {error.strerror}; let user {os.geteuid()}, "
            "who runs this, read it, or give another"
        ) from None
    except ValueError as error:  # of a pattern that is none, or a path with a null character
        raise InputError(f"data source {source!r} is no path: {error}; correct it") from None


@functools.lru_cache(maxsize=2)
def _call(source: str, split: str) -> tables.Table:
    """The table that a function of one's own returns: one call for digest and rows."""
    key = "data.source" if split == "train" else "data.test-source"
    function = plugins.load(key, source.removeprefix(schemes.PYTHON))
    try:
        return function()
    except InputError:
        raise
    except Exception as error:
        raise RecordError(
            f"{key} is {source!r}, which failed with {type(error).__name__}: {error}; mend it"
        ) from error


def forget() -> None:
    """Drop the tables of functions of one's own, so that they are called again."""
    _call.cache_clear()


def columns(source: str, form: CsvForm) -> list[str]:
    """The columns of a file, in order.

    Raises:
        InputError: If the source is no file, or cannot be read.
    """
    if source.startswith("hub:") or source == US_GAAP:
        raise InputError(f"data source {source!r} is no file; give a .csv, .jsonl or .parquet file")
    path, suffix = locate(source), _suffix(source)
    if suffix == CSV:
        return csv_files.header(source, path, form)
    if suffix == ".jsonl":
        return list(dict.fromkeys(name for record in _records(source, path) for name in record))
    parquet: Any = importlib.import_module("pyarrow.parquet")
    arrow: Any = importlib.import_module("pyarrow")
    try:
        return [name.strip() for name in parquet.ParquetFile(path).schema_arrow.names]
    except (arrow.lib.ArrowException, OSError, ValueError) as error:
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
    if source.startswith(tables.MEMORY):
        return source.removeprefix(tables.MEMORY)
    if source.startswith(schemes.PYTHON):
        return tables.digest(_call(source, split), source)
    if files := institution_files(source):
        content = [[name, _file_digest(str(path))] for name, path in files.items()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return _file_digest(source)


def _file_digest(source: str) -> str:
    content = sha256(locate(source))
    kind = source if source == US_GAAP else _suffix(source)
    return hashlib.sha256(json.dumps([kind, content]).encode()).hexdigest()


def locate(source: str) -> Path:
    """Return the file of a path or ``package:`` source; packages are found without an import."""
    if source == US_GAAP:
        path = _in_package("edgar", "xbrl/standardization/gaap_mappings.json")
        if path is None:
            raise InputError(
                f"data source {source!r} needs the package edgartools, which is not installed or "
                "has no us-gaap mapping; pip install edgartools"
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
    path = expanded(source)
    with _accessible(source):
        if path.is_file():
            path.open("rb").close()
            return path
    raise InputError(
        f"data source {source!r} is not a file ({path.absolute()}); give a .csv, .jsonl or "
        ".parquet file, a directory or glob of them, hub:NAME, package:NAME/FILE or "
        "python:MODULE:FUNCTION"
    )


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
                    values = cast(dict[str, Any], record)
                    record = {name.strip(): value for name, value in values.items()}
                    if len(record) < len(values):
                        raise ValueError(f"line {number} has a name twice, but for blanks")
                    records.append(record)
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
    name, rows = "", Rows()
    try:
        file = parquet.ParquetFile(path)
        names = [name.strip() for name in file.schema_arrow.names]
        written = dict(zip(names, file.schema_arrow.names, strict=True))
        check_columns(source, wanted, names)
        check_single(source, wanted, names)
        for name in wanted:
            column = file.read(columns=[written[name]]).column(written[name])
            rows[name] = [as_text(value, source, name) for value in column.to_pylist()]
    except InputError:
        raise
    except (arrow.lib.ArrowException, OSError, ValueError, OverflowError) as error:
        where = f"column {name!r}: " if name else ""
        raise unreadable(source, ValueError(f"{where}{error}")) from None
    return rows


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
    root = expanded(os.environ.get("HF_DATASETS_CACHE", f"{home}/datasets"))

    def normalised(text: str) -> str:  # datasets writes owner/camelCase as owner___camel_case
        return text.lower().replace("_", "").replace("/", "")

    folders = [folder for folder in root.glob("*") if normalised(folder.name) == normalised(name)]
    return sorted(
        str(info.parent.relative_to(root))
        for f in folders
        for info in f.glob("*/*/*/dataset_info.json")
    )


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
