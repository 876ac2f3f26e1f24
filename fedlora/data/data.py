"""From the rows of institutions to tokenised shards, cached.

`prepare` is the entry point. The tokens of a data set are one cache entry, which all partitions and
seeds share; each of these is a further entry, of row numbers. Their keys cover the content of the
sources, every setting that shapes the entry, the tokenizer's key and this code. A cached federation
opens in milliseconds, without ``datasets``, pandas or torch.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora import files
from fedlora.arrays import Int64
from fedlora.config import plugins, schemes
from fedlora.config.sections import DataConfig
from fedlora.data import cache, sources
from fedlora.data.encoding import Encoded
from fedlora.data.rows import check_labels, partition_rows, read_table
from fedlora.data.shards import Corpus, Federation, Shard
from fedlora.data.text import MISSING, each_folded
from fedlora.errors import InputError

Encode = Callable[[list[str], list[str], tuple[str, ...]], Encoded]
"""(texts, answers, labels) -> Encoded; labels are empty for sft."""


def cached_shards() -> Path:
    """The directory of cached shards."""
    return files.cache_directory() / "shards"


def prepare(
    settings: DataConfig,
    *,
    unit: str,
    seed: int,
    task: str,
    encoder: Callable[[], Encode],
    encoding_key: str,
) -> Federation:
    """Open a federation from the cache, or build it and cache it; remove entries that are too old.

    All rows with a text and a label are tokenised, so that they serve every partition.

    Args:
        settings: See `fedlora.data.rows.partition_rows`; ``view`` and ``prompt`` are not used.
        unit: "record", or the column that names the unit of privacy of a row.
        seed: Seed of split and partition.
        task: "classification" or "sft".
        encoder: Makes the tokenizer; called once, and only if the tokens are not cached.
        encoding_key: A key of everything on which the tokenizer depends.

    Raises:
        InputError: If a source, column, label or partition does not fit; nothing is written then.
    """
    test_digest = sources.digest(settings.test_source, "test") if settings.test_source else ""
    content = [sources.digest(settings.source), test_digest]
    form = [settings.text, settings.label, settings.labels]
    key = [content, form, task, encoding_key, _CODE]
    reusable = True
    shape = [
        unit,
        settings.partition,
        settings.institutions,
        settings.min_records,
        settings.max_records,
        settings.test_fraction,
        seed,
    ]
    if settings.partition.startswith(schemes.PYTHON):
        named = settings.partition.removeprefix(schemes.PYTHON)
        shape.append(json.dumps(plugins.describe([("data.partition", named)])))
        reusable = False  # a function may read other files, and the process may hold older code
    base = cached_shards()
    cache.expire(base)
    tokens, entry = _entry(base, "corpus", key), _entry(base, "partition", [key, shape])
    corpus = cache.open_corpus(tokens)
    cached = cache.open_partition(entry, corpus) if corpus is not None and reusable else None
    if cached is not None:
        return cached
    encode = encoder() if corpus is None else None  # before rows: a model's error comes first

    found = partition_rows(settings, unit=unit, seed=seed, task=task)
    (train, train_bounds), (held_out, held_out_bounds) = found.train, found.held_out
    units = _units(train.others[unit] if unit != "record" else None, train_bounds, unit)
    records = _digests(found.texts, found.answers)
    if corpus is None or not np.array_equal(corpus.records, records):  # the source just changed
        encode = encode or encoder()
        encoded = encode(found.texts, found.answers, found.classes)
        corpus = cache.store_corpus(tokens, shard_of(encoded, records).corpus)
    truncated = corpus.truncated[np.concatenate([train.numbers, held_out.numbers])]
    own = {"train": len(units), "held_out": len(held_out.texts), "truncated": int(truncated.sum())}
    return cache.store_partition(
        entry,
        Federation(
            names=found.names,
            labels=found.classes,
            counts={**found.counts, **own},
            left_out=found.left_out,
            all_train=Shard(corpus=corpus, rows=train.numbers, units=units),
            train_bounds=train_bounds,
            all_held_out=Shard(
                corpus=corpus, rows=held_out.numbers, units=_units(None, held_out_bounds, "")
            ),
            held_out_bounds=held_out_bounds,
        ),
    )


def _entry(base: Path, kind: str, key: list[Any]) -> Path:
    return base / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()}"


def load_shard(
    settings: DataConfig, source: str, *, labels: tuple[str, ...], encode: Encode
) -> tuple[Shard, dict[str, int]]:
    """Read all rows of one source, uncached; rows without text or label are left out.

    Args:
        settings: ``text`` and ``label`` are used.
        source: A source, see `fedlora.data.sources`.
        labels: The classes that the model knows; empty for sft.
        encode: The tokenizer.

    Returns:
        The rows, and numbers of rows: ``truncated``, those that were cut to length, and those left
        out, ``without_text`` and ``without_label`` (see `fedlora.data.rows.Table`).

    Raises:
        InputError: If a column is missing, a label is unknown, or no row is left.
    """
    table = read_table(source, settings.text, settings.label, {}, "test")
    if labels:
        check_labels(table.labels, labels, source, "the model was trained on no other label")
    encoded = encode(table.texts, table.labels, labels)
    return shard_of(encoded, _digests(table.texts, table.labels)), {
        "truncated": sum(encoded.truncated),
        "without_text": table.without_text,
        "without_label": table.without_label,
    }


def without_tokens(settings: DataConfig, *, unit: str, seed: int, task: str) -> Shard:
    """The training rows of all institutions as `prepare` makes them, but with no tokens.

    For their number, units and fingerprint.

    Args:
        settings: See `prepare`, as the other arguments.
        unit: "record", or the column that names the unit of privacy of a row.
        seed: Seed of split and partition.
        task: "classification" or "sft".

    Raises:
        InputError: If a source, column, label or partition does not fit.
    """
    found = partition_rows(settings, unit=unit, seed=seed, task=task)
    (train, bounds), count = found.train, len(found.texts)
    encoded = Encoded(ids=[[]] * count, targets=[0] * count, truncated=[False] * count)
    corpus = shard_of(encoded, _digests(found.texts, found.answers)).corpus
    units = _units(train.others[unit] if unit != "record" else None, bounds, unit)
    return Shard(corpus=corpus, rows=train.numbers, units=units)


def _units(values: Sequence[str] | None, bounds: Int64, unit: str) -> Int64:
    """Number the units of privacy from 0 within each institution; without values, each row is one.

    Values are compared as `folded`, so that spellings of one customer are one unit.

    Raises:
        InputError: If a row has no value: its unit would be a guess.
    """
    if values is None:
        starts: Int64 = np.repeat(bounds[:-1], np.diff(bounds))
        return np.arange(len(starts)) - starts
    names = each_folded(values)
    if missing := sum(name in MISSING for name in names):
        raise InputError(
            f"privacy.unit is {unit!r}, but {missing} training rows have nothing in that column "
            "(or a word for it, such as NULL), so that strangers would be one unit; fill it in, "
            "drop these rows, or choose another unit"
        )
    units = np.empty(len(values), dtype=np.int64)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        number = {name: i for i, name in enumerate(sorted(set(names[start:stop])))}
        units[start:stop] = [number[name] for name in names[start:stop]]
    return units


def shard_of(encoded: Encoded, records: NDArray[np.uint8] | None = None) -> Shard:
    """A shard of freshly encoded rows, each its own unit.

    Args:
        encoded: The rows.
        records: See `Corpus`; None for rows of no source.
    """
    lengths = np.fromiter(map(len, encoded.ids), dtype=np.int64, count=len(encoded.ids))
    corpus = Corpus(
        tokens=np.fromiter(chain.from_iterable(encoded.ids), dtype=np.int32, count=lengths.sum()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        targets=np.array(encoded.targets, dtype=np.int64),
        truncated=np.array(encoded.truncated, dtype=np.bool_),
        records=np.empty((0, 32), np.uint8) if records is None else records,
    )
    return Shard(corpus=corpus, rows=np.arange(len(lengths)), units=np.arange(len(lengths)))


def _digests(texts: Sequence[str], answers: Sequence[str]) -> NDArray[np.uint8]:
    """The sha256 of each row's text and answer, uint8 (n, 32)."""
    digests = (
        hashlib.sha256(json.dumps([text, answer]).encode()).digest()
        for text, answer in zip(texts, answers, strict=True)
    )
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)


def _code_digest() -> str:
    """Return a SHA-256 of the package that decides the content of a cache entry."""
    return files.code_digest(Path(__file__).parents[1])


_CODE = _code_digest()  # at import: a file may change while the code that runs does not
