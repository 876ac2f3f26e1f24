"""Tokenised records: a corpus, its rows as shards, and the shards of all institutions.

Importing this module loads numpy and nothing heavier.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedlora.arrays import Int64


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """The tokenised rows of a data set, flat.

    Attributes:
        tokens: int32, the token ids of all rows, one after the other.
        offsets: int64 (n + 1,), row i is ``tokens[offsets[i]:offsets[i + 1]]``.
        targets: int64 (n,), class index, or for sft the position of the first response token.
        truncated: bool (n,), whether a row was cut to length.
        records: uint8 (n, 32), sha256 of each row's text and answer before tokenising; (0, 32) for
            rows of no source, which have no fingerprint.
        checksum: That of its cache entry; empty if it is not from the cache.
    """

    tokens: NDArray[np.int32]
    offsets: Int64
    targets: Int64
    truncated: NDArray[np.bool_]
    records: NDArray[np.uint8]
    checksum: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """Rows of a corpus.

    The arrays must not change: what is computed from them, such as the fingerprint, is computed
    once. Other rows or units are another shard.

    Attributes:
        corpus: The corpus.
        rows: int64 (n,), the number of each row in the corpus.
        units: int64 (n,), unit of privacy of each row, numbered from 0 within an institution.
    """

    corpus: Corpus
    rows: Int64
    units: Int64

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.units):
            raise ValueError(f"{len(self.rows)} rows, {len(self.units)} units")

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> Int64:
        """Tokens of each row, int64 (n,)."""
        return self.corpus.offsets[self.rows + 1] - self.corpus.offsets[self.rows]

    @cached_property
    def targets(self) -> Int64:
        """Class index, or for sft the position of the first response token, int64 (n,)."""
        return self.corpus.targets[self.rows]

    @property
    def records(self) -> NDArray[np.uint8]:
        """The sha256 of each row's text and answer before tokenising, uint8 (n, 32), a copy."""
        return self.corpus.records[self.rows]

    @cached_property
    def num_units(self) -> int:
        """Number of units of privacy."""
        return len(np.unique(self.units))

    def rows_of_unit(self, place: int) -> Int64:
        """Return the rows of one unit, int64, ascending.

        Args:
            place: The unit's place among the shard's units, from 0, in the order of their numbers.

        Raises:
            IndexError: If there are not so many units.
        """
        order, bounds = self._by_unit
        if not 0 <= place < len(bounds) - 1:
            raise IndexError(f"unit {place} of {len(bounds) - 1}")
        return order[bounds[place] : bounds[place + 1]]

    def row(self, index: int) -> NDArray[np.int32]:
        """Return the token ids of one row, int32, without copying."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self.rows[index]
        return self.corpus.tokens[self.corpus.offsets[row] : self.corpus.offsets[row + 1]]

    def select(self, indices: Sequence[int] | Int64 | slice) -> "Shard":
        """Return these rows, in this order, without copying tokens; units keep their numbers."""
        index = indices if isinstance(indices, slice) else np.asarray(indices, dtype=np.int64)
        return Shard(corpus=self.corpus, rows=self.rows[index], units=self.units[index])

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 (hex) of the records and their grouping by units.

        It depends neither on the order of rows nor on the numbers of units, nor on the tokenizer,
        so a ledger stays with its data when the base model changes.
        """
        order, bounds = self._by_unit
        records = [record.tobytes() for record in self.records[order]]
        grouped = sorted(
            hashlib.sha256(b"".join(sorted(records[begin:end]))).digest()
            for begin, end in itertools.pairwise(bounds.tolist())
        )
        return hashlib.sha256(b"".join(grouped)).hexdigest()

    @cached_property
    def _by_unit(self) -> tuple[Int64, Int64]:
        """The rows sorted by unit, and where each unit's begin and the last's end ``(units + 1,)``.

        Rows of one unit keep their order.
        """
        order = np.argsort(self.units, kind="stable")
        _, begins = np.unique(self.units[order], return_index=True)
        return order, np.append(begins, len(order))


def joined(parts: Sequence[Corpus]) -> Shard:
    """The rows of all corpora in turn, in a corpus without a checksum, each its own unit."""
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    corpus = Corpus(
        tokens=np.concatenate([part.tokens for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        targets=np.concatenate([part.targets for part in parts]),
        truncated=np.concatenate([part.truncated for part in parts]),
        records=np.concatenate([part.records for part in parts]),
    )
    return Shard(corpus=corpus, rows=np.arange(len(lengths)), units=np.arange(len(lengths)))


def concatenate(parts: Sequence[Shard]) -> Shard:
    """The rows of all parts in turn, without copying tokens; units keep their numbers.

    Raises:
        ValueError: If the parts are not of one corpus.
    """
    corpus = parts[0].corpus
    if any(part.corpus is not corpus for part in parts):
        raise ValueError("the parts are of several corpora")
    return Shard(
        corpus=corpus,
        rows=np.concatenate([part.rows for part in parts]),
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
            data.max-records); and institutions_dropped, truncated, test_rows_dropped (those of
            rows_dropped that are of data.test-source), units_at_several (units of privacy with
            training rows at more than one institution).
        left_out: Institution left out (too few training rows, or not among the largest
            ``data.institutions``) -> its training rows.
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

    @cached_property
    def units(self) -> list[int]:
        """The number of units of privacy of each institution, in the order of names."""
        return [shard.num_units for shard in self._train_shards]

    @cached_property
    def _train_shards(self) -> list[Shard]:
        bounds = itertools.pairwise(self.train_bounds.tolist())
        return [self.all_train.select(slice(begin, end)) for begin, end in bounds]

    def train(self, index: int) -> Shard:
        """Return one institution's training rows.

        Each call returns the same object, so that later rounds find what the first one computed,
        such as the fingerprint.

        Raises:
            IndexError: If there is no institution of that number.
        """
        if not 0 <= index < len(self.names):
            raise IndexError(f"institution {index} of {len(self.names)}")
        return self._train_shards[index]

    def held_out(self, index: int) -> Shard:
        """Return one institution's held-out rows; there may be none."""
        return self.all_held_out.select(slice(*self.held_out_bounds[index : index + 2].tolist()))

    def fingerprint(self) -> str:
        """Return a sha256 (hex) of each institution's name, training and held-out records."""
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            shards = (self.train(index), self.held_out(index))
            digest.update("\n".join((name, *(shard.fingerprint for shard in shards), "")).encode())
        return digest.hexdigest()

    def pooled_held_out(self) -> tuple[Shard, Int64]:
        """Return all held-out rows and the institution of each, int64 (n,)."""
        owner = np.repeat(np.arange(len(self.names)), np.diff(self.held_out_bounds))
        return self.all_held_out, owner
