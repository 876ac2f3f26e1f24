"""Tokenised records on disk: written once, atomically, and memory-mapped.

A cache entry is a directory of ``.npy`` arrays, ``meta.json`` and a checksum over both. It is
written under another name and renamed under a lock, so that all processes that race for one entry
get a complete one. An entry that does not match its checksum counts as absent. Importing this
module and opening an entry loads numpy and nothing heavier.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import InputError

Int64 = NDArray[np.int64]

MAX_AGE_DAYS = 30
"""Cache entries that were not opened for so long are removed: they hold the texts of records."""

_ARRAYS = ("tokens", "offsets", "targets", "units", "records", "bounds")
_SIDES = ("train", "held_out")


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """Tokenised records, flat.

    Attributes:
        tokens: int32, the token ids of all rows, one after the other.
        offsets: int64 (n + 1,), row i is ``tokens[offsets[i]:offsets[i + 1]]``.
        targets: int64 (n,), class index, or for sft the position of the first response token.
        units: int64 (n,), unit of privacy of each row, numbered from 0 within an institution.
        records: uint8 (n, 32), sha256 of each row's text and answer before tokenising. None:
            hashes of tokens and target take their place.
    """

    tokens: NDArray[np.int32]
    offsets: Int64
    targets: Int64
    units: Int64
    records: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        rows = len(self.offsets) - 1
        if len(self.targets) != rows or len(self.units) != rows:
            raise ValueError(f"{rows} rows, {len(self.targets)} targets, {len(self.units)} units")

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> Int64:
        """Tokens of each row, int64 (n,)."""
        return np.diff(self.offsets)

    @property
    def num_units(self) -> int:
        """Number of units of privacy."""
        return len(np.unique(self.units))

    def row(self, index: int) -> NDArray[np.int32]:
        """Return the token ids of one row, int32, without copying."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def select(self, indices: Sequence[int] | Int64) -> "Shard":
        """Return a copy of these rows, in this order; units keep their numbers."""
        index = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[index]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        shifts = np.repeat(self.offsets[index] - offsets[:-1], lengths)  # (tokens,)
        return Shard(
            tokens=self.tokens[np.arange(len(shifts)) + shifts],
            offsets=offsets,
            targets=self.targets[index],
            units=self.units[index],
            records=None if self.records is None else self.records[index],
        )

    def slice(self, start: int, stop: int) -> "Shard":
        """Return rows ``start`` to ``stop`` without copying tokens."""
        offsets = self.offsets[start : stop + 1]
        return Shard(
            tokens=self.tokens[offsets[0] : offsets[-1]],
            offsets=offsets - offsets[0],
            targets=self.targets[start:stop],
            units=self.units[start:stop],
            records=None if self.records is None else self.records[start:stop],
        )

    def fingerprint(self) -> str:
        """Return a sha256 (hex) of the records and their grouping by units.

        It depends neither on the order of rows nor on the numbers of units. With ``records`` it
        does not depend on the tokeniser, so a ledger stays with its data when the base model
        changes.
        """
        units: dict[int, list[bytes]] = {}
        for index, unit in enumerate(self.units.tolist()):
            units.setdefault(unit, []).append(self._record(index))
        grouped = sorted(hashlib.sha256(b"".join(sorted(rows))).digest() for rows in units.values())
        return hashlib.sha256(b"".join(grouped)).hexdigest()

    def _record(self, index: int) -> bytes:
        if self.records is not None:
            return self.records[index].tobytes()
        content = [self.row(index).tolist(), int(self.targets[index])]
        return hashlib.sha256(json.dumps(content).encode()).digest()


def concatenate(parts: Sequence[Shard]) -> Shard:
    """The rows of all parts in turn; units keep their numbers, ``records`` is None."""
    lengths = np.concatenate([part.lengths for part in parts])
    return Shard(
        tokens=np.concatenate([part.tokens for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        targets=np.concatenate([part.targets for part in parts]),
        units=np.concatenate([part.units for part in parts]),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """Every institution's shards, memory-mapped.

    Attributes:
        names: Institutions, safe as file names, unique, sorted.
        labels: The classes in index order; empty for sft.
        counts: rows (of data.source) and test_rows (of data.test-source), as the sum of train,
            held_out, without_text, without_label (a text and no label), without_institution,
            duplicates_removed and rows_dropped (of an institution left out, or above
            data.max-records); and institutions_dropped, truncated.
        left_out: Institution without enough training rows -> its training rows.
        all_train: Training rows of all institutions, one institution after the other.
        train_bounds: int64 (institutions + 1,), where each institution's rows begin.
        all_held_out: The same of the held-out rows.
        held_out_bounds: The same of the held-out rows.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    counts: Mapping[str, int]
    all_train: Shard
    train_bounds: Int64
    all_held_out: Shard
    held_out_bounds: Int64
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])

    def train(self, index: int) -> Shard:
        """Return one institution's training rows."""
        return self.all_train.slice(*self.train_bounds[index : index + 2].tolist())

    def held_out(self, index: int) -> Shard:
        """Return one institution's held-out rows; there may be none."""
        return self.all_held_out.slice(*self.held_out_bounds[index : index + 2].tolist())

    def fingerprint(self) -> str:
        """Return a sha256 (hex) of each institution's name, training and held-out records."""
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            shards = (self.train(index), self.held_out(index))
            digest.update(
                "\n".join((name, *(shard.fingerprint() for shard in shards), "")).encode()
            )
        return digest.hexdigest()

    def seen_as(self, view: str) -> "Federation":
        """Return the same rows with other institutions; held-out rows stay as they are.

        Args:
            view: ``all`` changes nothing. ``pooled`` makes all institutions one; a unit of
                two institutions stays two units, so the promise is that of the federation.
                ``only:NAME`` keeps one institution.

        Raises:
            InputError: If there is no institution of that name.
        """
        if view == "all":
            return self
        if view == "pooled":
            counts = [self.train(i).units.max(initial=-1) + 1 for i in range(len(self.names))]
            first = np.cumsum([0, *counts[:-1]])
            units = self.all_train.units + np.repeat(first, np.diff(self.train_bounds))
            return replace(
                self,
                names=("pooled",),
                all_train=replace(self.all_train, units=units),
                train_bounds=self.train_bounds[[0, -1]],
                held_out_bounds=self.held_out_bounds[[0, -1]],
            )
        name = view.removeprefix("only:")
        if name not in self.names:
            known = ", ".join(self.names[:12]) + (", ..." if len(self.names) > 12 else "")
            raise InputError(
                f"data.view is {view!r}, but there is no such institution; they are {known}"
            )
        index = self.names.index(name)
        train, held_out = self.train(index), self.held_out(index)
        return replace(
            self,
            names=(name,),
            all_train=train,
            train_bounds=np.array([0, len(train)]),
            all_held_out=held_out,
            held_out_bounds=np.array([0, len(held_out)]),
        )

    def pooled_held_out(self) -> tuple[Shard, Int64]:
        """Return all held-out rows and the institution of each, int64 (n,)."""
        owner = np.repeat(np.arange(len(self.names)), np.diff(self.held_out_bounds))
        return self.all_held_out, owner


def open_entry(directory: Path) -> Federation | None:
    """Open a cache entry, memory-mapped; None if it is absent or damaged."""
    try:
        if _checksum(directory) != (directory / "checksum").read_text():
            return None
        os.utime(directory)
        meta: dict[str, Any] = json.loads((directory / "meta.json").read_text())
        sides = [
            {name: np.load(directory / f"{side}_{name}.npy", mmap_mode="r") for name in _ARRAYS}
            for side in _SIDES
        ]
    except (OSError, ValueError):
        return None
    (train, train_bounds), (held_out, held_out_bounds) = (
        (Shard(**{name: side[name] for name in _ARRAYS[:-1]}), side["bounds"]) for side in sides
    )
    return Federation(
        names=tuple(meta["names"]),
        labels=tuple(meta["labels"]),
        counts=meta["counts"],
        left_out=meta["left_out"],
        all_train=train,
        train_bounds=train_bounds,
        all_held_out=held_out,
        held_out_bounds=held_out_bounds,
    )


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


def clear(base: Path) -> None:
    """Remove all cache entries. Processes that have one mapped keep it until they end.

    Raises:
        OSError: If one cannot be removed.
    """
    for entry in entries(base):
        shutil.rmtree(entry.path)


def evict(base: Path) -> None:
    """Remove all cache entries but the one that was opened last."""
    whole = [entry.path for entry in entries(base) if (entry.path / "checksum").is_file()]
    for path in whole[1:]:
        shutil.rmtree(path, ignore_errors=True)  # processes that have it mapped keep it


def store_entry(directory: Path, federation: Federation) -> Federation:
    """Write a federation as a cache entry and open it; a damaged entry in its place is replaced.

    Raises:
        InputError: If the directory cannot be written or the disk is full; nothing is left then.
    """
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".new-"))  # 0700
        try:
            _write(new, federation)
            with (directory.parent / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (first := open_entry(directory)) is not None:
                    return first
                shutil.rmtree(directory, ignore_errors=True)  # a damaged one
                new.rename(directory)
                if (stored := open_entry(directory)) is None:
                    raise OSError(f"{directory} does not read back as written")
                return stored
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"the shard cache {directory.parent} cannot be written ({error.strerror or error}); "
            "make room there, or set FEDLORA_CACHE to another directory"
        ) from None


def _write(directory: Path, federation: Federation) -> None:
    sides = (
        (federation.all_train, federation.train_bounds),
        (federation.all_held_out, federation.held_out_bounds),
    )
    for side, (shard, bounds) in zip(_SIDES, sides, strict=True):
        for name in _ARRAYS:
            array = bounds if name == "bounds" else getattr(shard, name)
            np.save(directory / f"{side}_{name}.npy", array)
    meta = {
        "names": federation.names,
        "labels": federation.labels,
        "counts": dict(federation.counts),
        "left_out": dict(federation.left_out),
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=1))
    (directory / "checksum").write_text(_checksum(directory))


def _checksum(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in ("meta.json", *(f"{side}_{name}.npy" for side in _SIDES for name in _ARRAYS)):
        with (directory / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
