"""Tokenised records on disk: written once, atomically, and memory-mapped.

A corpus holds the tokens of a data set, a partition the numbers of each institution's rows in it.
Each is an entry of the cache: a directory of ``.npy`` arrays, ``meta.json`` and a checksum over
both. It is written under another name and renamed under a lock, so that all processes that race for
one entry get a complete one. An entry that does not match its checksum counts as absent, and so
does a partition of another corpus. Importing this module and opening entries loads numpy and
nothing heavier.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.data.shards import Corpus, Federation, Shard
from fedlora.errors import InputError

MAX_AGE_DAYS = 30
"""Entries that were not opened for so long are removed: they hold the texts of records."""


def open_corpus(directory: Path) -> Corpus | None:
    """Open a cached corpus, memory-mapped; None if it is absent or damaged."""
    found = _open(directory)
    return None if found is None else Corpus(checksum=found.checksum, **found.arrays)


def store_corpus(directory: Path, corpus: Corpus) -> Corpus:
    """Write a corpus as a cache entry and open it; another or damaged one is replaced.

    Raises:
        InputError: If the directory cannot be written or the disk is full; nothing is left then.
    """
    arrays = {name: array for name, array in vars(corpus).items() if name != "checksum"}
    found = _store(directory, {}, arrays)
    return Corpus(checksum=found.checksum, **found.arrays)


def open_partition(directory: Path, corpus: Corpus) -> Federation | None:
    """Open a cached partition of a corpus; None if it is absent, damaged or of another corpus."""
    found = _open(directory)
    if found is None or found.meta["corpus"] != corpus.checksum:
        return None
    return _federation(found, corpus)


def store_partition(directory: Path, federation: Federation) -> Federation:
    """Write which rows each institution has as a cache entry; another or damaged one is replaced.

    Args:
        directory: The entry.
        federation: Rows of one corpus from the cache. No text or token of them is written.

    Raises:
        InputError: If the directory cannot be written or the disk is full; nothing is left then.
    """
    train, held_out = federation.all_train, federation.all_held_out
    meta = {
        "corpus": train.corpus.checksum,
        "names": federation.names,
        "labels": federation.labels,
        "counts": dict(federation.counts),
        "left_out": dict(federation.left_out),
    }
    arrays = {
        "train_rows": train.rows,
        "train_units": train.units,
        "train_bounds": federation.train_bounds,
        "held_out_rows": held_out.rows,
        "held_out_units": held_out.units,
        "held_out_bounds": federation.held_out_bounds,
    }
    return _federation(_store(directory, meta, arrays), train.corpus)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cache entry on disk.

    Args:
        path: Its directory.
        size: Bytes of its files.
        used: When it was opened last, in seconds since 1970.
    """

    path: Path
    size: int
    used: float


def entries(base: Path) -> list[Entry]:
    """All cache entries, also unfinished ones, the one that was opened last first."""
    found: list[Entry] = []
    for path in base.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.iterdir())
                found.append(Entry(path=path, size=size, used=path.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def expire(base: Path) -> None:
    """Remove the cache entries that no process has opened for `MAX_AGE_DAYS`."""
    oldest = time.time() - MAX_AGE_DAYS * 86400
    for path in base.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and path.stat().st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True)


def evict(base: Path) -> None:
    """Remove all cache entries but the corpus and the partition that were opened last."""
    whole = [entry.path for entry in entries(base) if (entry.path / "checksum").is_file()]
    for kind in ("corpus-*", "partition-*"):
        for path in [path for path in whole if path.match(kind)][1:]:
            shutil.rmtree(path, ignore_errors=True)  # processes that have it mapped keep it


class _Files(NamedTuple):
    checksum: str
    meta: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def _federation(found: _Files, corpus: Corpus) -> Federation:
    meta, arrays = found.meta, found.arrays
    return Federation(
        names=tuple(meta["names"]),
        labels=tuple(meta["labels"]),
        counts=meta["counts"],
        left_out=meta["left_out"],
        all_train=Shard(corpus=corpus, rows=arrays["train_rows"], units=arrays["train_units"]),
        train_bounds=arrays["train_bounds"],
        all_held_out=Shard(
            corpus=corpus, rows=arrays["held_out_rows"], units=arrays["held_out_units"]
        ),
        held_out_bounds=arrays["held_out_bounds"],
    )


def _open(directory: Path) -> _Files | None:
    """The content of a cache entry, its arrays memory-mapped; None if it is absent or damaged."""
    try:
        checksum = _checksum(directory)
        if checksum != (directory / "checksum").read_text():
            return None
        os.utime(directory)
        meta: dict[str, Any] = json.loads((directory / "meta.json").read_text())
        arrays: dict[str, NDArray[Any]] = {
            # as plain arrays of the mapped file: those of the type np.memmap are slow to slice
            path.stem: np.load(path, mmap_mode="r").view(np.ndarray)
            for path in directory.glob("*.npy")
        }
    except (OSError, ValueError):
        return None
    return _Files(checksum, meta, arrays)


def _store(directory: Path, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> _Files:
    """Write a cache entry, unless there is an equal one, and open it.

    Raises:
        InputError: If the directory cannot be written or the disk is full; nothing is left then.
    """
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".new-"))  # 0700
        try:
            for name, array in arrays.items():
                np.save(new / f"{name}.npy", array)
            (new / "meta.json").write_text(json.dumps(meta, indent=1))
            checksum = _checksum(new)
            (new / "checksum").write_text(checksum)
            with (directory.parent / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (first := _open(directory)) is not None and first.checksum == checksum:
                    return first
                shutil.rmtree(directory, ignore_errors=True)  # a damaged one, or another one
                new.rename(directory)
                if (stored := _open(directory)) is None:
                    raise OSError(f"{directory} does not read back as written")
                return stored
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"the shard cache {directory.parent} cannot be written ({error.strerror or error}); "
            "make room there, or set FEDLORA_CACHE to another directory"
        ) from None


def _checksum(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in (directory / "meta.json", *sorted(directory.glob("*.npy"))):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
