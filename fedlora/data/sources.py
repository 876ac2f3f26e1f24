"""Rows of named text columns from files, Python packages and the Hugging Face Hub.

A source is one string: the path of a ``.csv``, ``.jsonl`` or ``.parquet`` file; a directory or glob
of such files, one for each institution, which gives the column ``institution``;
``package:NAME/FILE`` for such a file inside an installed package, ``package:edgartools`` for the
us-gaap concepts that edgartools ships, ``hub:NAME[:CONFIG]``, ``python:MODULE:FUNCTION`` for a
function that returns a table, or ``memory:DIGEST`` for a table that this process holds
(`fedlora.data.tables`).
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from fedlora.config import plugins, schemes
from fedlora.data import tables
from fedlora.data.tables import READERS, Frame, Rows
from fedlora.data.text import alike
from fedlora.errors import InputError, RecordError
from fedlora.extras import require
from fedlora.files import expanded

HUB, PACKAGE = "hub:", "package:"
US_GAAP = "package:edgartools"
"""Columns: text (a concept's words), label (its statement), industry (one that reports it)."""


def read(source: str, wanted: Mapping[str, str], split: str = "train") -> Rows:
    """Read the wanted columns of a source.

    Args:
        source: The source, as described above.
        wanted: Column name -> its config key, for error messages.
        split: The split of a Hub data set; files have none.

    Raises:
        InputError: If the source is not there or not readable, has no row, or a column is missing;
            the message names the columns that are there.
    """
    return tables.texts(frame(source, split), wanted, source)


def frame(source: str, split: str = "train") -> Frame:
    """All columns of a source as a data frame, values as they are; see `read`."""
    if source.startswith((HUB, schemes.PYTHON)):
        table = _called(source, split)
    elif source.startswith(tables.MEMORY):
        table = tables.held(source)
    elif source == US_GAAP:
        table = _us_gaap(locate(source))
    elif files := institution_files(source):
        parts = {name: tables.read_file(path, str(path)) for name, path in files.items()}
        table = tables.stacked(parts, source)
    else:
        table = tables.read_file(locate(source), source)
    if not len(table):
        raise InputError(f"data source {source!r} has no row; give one that has rows")
    return table


def institution_files(source: str) -> dict[str, Path]:
    """Institution -> its file, sorted, of a source that is a directory or a glob; else nothing.

    Raises:
        InputError: If there is no file, or two files have one name apart from their ending.
    """
    path = expanded(source)
    with _accessible(source):
        if path.is_dir():
            found = [file for file in path.iterdir() if file.suffix.lower() in READERS]
        elif is_per_institution(source):
            matching = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
            found = [file for file in matching if file.is_file()]
        else:
            return {}
    if not found:
        raise InputError(
            f"data source {source!r} has no file; give a directory or glob of "
            f"{', '.join(READERS)} files, one for each institution"
        )
    if same := alike([file.stem for file in found]):
        raise InputError(
            f"data source {source!r} has two files of one institution, {same[0]!r}; join them, or "
            "rename one"
        )
    return {file.stem: file for file in sorted(found)}


def is_path(source: str) -> bool:
    """Whether a source is a path, of a file, a directory or a glob."""
    return not source.startswith((HUB, PACKAGE, schemes.PYTHON, tables.MEMORY))


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
    except (OSError, ValueError) as error:  # a ValueError of a pattern that is none
        raise InputError(
            f"data source {source!r} cannot be read: {getattr(error, 'strerror', None) or error}; "
            f"let user {os.geteuid()}, who runs this, read it, or give another"
        ) from None


@functools.lru_cache(maxsize=2)
def _called(source: str, split: str) -> Frame:
    """The table of the Hub or of a function of one's own, which is called once."""
    if source.startswith(HUB):
        return tables.frame(_load_hub(source, split), source)
    key = "data.source" if split == "train" else "data.test-source"
    function = plugins.load(key, source.removeprefix(schemes.PYTHON))
    try:
        return tables.frame(function(), source)
    except InputError:
        raise
    except Exception as error:
        raise RecordError(
            f"{key} is {source!r}, which failed with {type(error).__name__}: {error}; mend it"
        ) from error


def forget() -> None:
    """Drop the tables of functions of one's own, so that they are called again."""
    _called.cache_clear()


def locate(source: str) -> Path:
    """Return the file of a path or ``package:`` source; packages are found without an import."""
    if source.startswith(PACKAGE):
        package, _, relative = source.removeprefix(PACKAGE).partition("/")
        if source == US_GAAP:
            package, relative = "edgar", "xbrl/standardization/gaap_mappings.json"
        path = _in_package(package.replace("-", "_"), relative)
        if path is None:
            raise InputError(
                f"data source {source!r} is not there; pip install "
                f"{source.removeprefix(PACKAGE).partition('/')[0]}, or write package:NAME/FILE"
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
    folders = (spec.submodule_search_locations if spec else None) or ()
    return next((Path(f, relative) for f in folders if Path(f, relative).is_file()), None)


def _us_gaap(path: Path) -> Frame:
    """Make a row of each concept with a statement and each industry that reports it."""
    rows = [
        # NetIncomeLossUSGovernment1: Net Income Loss US Government 1
        (" ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", concept)), statement, industry)
        for concept, entry in json.loads(path.read_bytes()).items()
        if (statement := entry.get("statement"))
        for industry in sorted(entry.get("industry_overrides") or ())
    ]
    text, label, industry = zip(*rows, strict=True)
    return tables.frame({"text": text, "label": label, "industry": industry}, US_GAAP)


def _load_hub(source: str, split: str) -> Any:
    require("datasets", "simulation", f"data source {source!r}")
    datasets: Any = importlib.import_module("datasets")
    name, _, config = source.removeprefix(HUB).partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub client raises many unrelated types
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"data source {source!r} (split {split}) cannot be loaded from the Hub: "
            f"{type(error).__name__}: {reason}; check the name, the network and HF_TOKEN, or give "
            "a local file"
        ) from None
