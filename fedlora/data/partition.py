"""Selection of held-out rows, and assignment of rows to institutions.

Every function is pure: the same rows and seed give the same result. The partitions by a scheme come
from ``flwr-datasets``, which is imported only here and only while a federation is built.
"""

import contextlib
import hashlib
import importlib
import io
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.arrays import Int64
from fedlora.config import schemes
from fedlora.data.text import each_folded, folded
from fedlora.errors import InputError
from fedlora.privacy.streams import RandomSource

DRAWS = 10
"""How often rows are dealt until all institutions have enough of them."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The assignment of rows to institutions.

    ``train`` and ``held_out`` are int64, one entry a row: the index into ``names``, or -1 for a row
    that no institution of this federation holds. ``left_out`` has the training rows of each
    institution left out, the largest first.
    """

    names: tuple[str, ...]
    train: Int64
    held_out: Int64
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])


def normalise(text: str) -> str:
    """Return the form in which texts are compared: `folded`, only words and numbers.

    Marks are part of a word: in Hindi, Thai or Arabic they are its vowels.
    """
    shown = folded(text)
    if shown.isascii():
        return " ".join(re.findall(r"\w+", shown)) or shown
    kept = (
        c if c == "_" or c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in shown
    )
    return " ".join("".join(kept).split()) or shown


def hold_out(
    texts: Sequence[str], *, fraction: float, seed: int, labels: Sequence[str] | None
) -> NDArray[np.bool_]:
    """Choose the held-out rows by text.

    A text is held out when a hash of it and the seed falls below the fraction. Equal texts are
    therefore on one side, even where institutions split their data separately, and new rows move no
    old row, except the one text that a label keeps for training (``labels``).

    Args:
        texts: The text of each row.
        fraction: Expected share of distinct texts held out, in [0, 1).
        seed: Seed of the split.
        labels: The label of each row, where each label must keep a training text: if a label would
            lose all, its text with the greatest hash stays. None where the classes are known
            without the rows.

    Returns:
        bool (n,), True where held out.
    """
    keys = [normalise(text) for text in texts]
    draw = {key: _uniform(seed, key) for key in keys}
    held = {key for key, value in draw.items() if value < fraction}
    if labels is not None:
        by_label: dict[str, set[str]] = {}
        for key, label in zip(keys, labels, strict=True):
            by_label.setdefault(label, set()).add(key)
        for label in sorted(by_label):
            if by_label[label] <= held:
                held.discard(max(by_label[label], key=lambda key: (draw[key], key)))
    return np.fromiter((key in held for key in keys), dtype=np.bool_, count=len(keys))


def _uniform(seed: int, key: str) -> float:
    digest = hashlib.sha256(f"held-out\0{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def by_column(
    column: str,
    train: Sequence[str],
    held_out: Sequence[str],
    *,
    institutions: int,
    min_records: int,
) -> Assignment:
    """Give each value of a column its own institution; values are compared as `folded`.

    Args:
        column: The column's name, for messages.
        train: The column's value of each training row.
        held_out: The column's value of each held-out row.
        institutions: The number of largest ones to keep (ties by value); 0 keeps all.
        min_records: Values with fewer training rows are left out; at least one is always needed.

    Returns:
        The assignment, sorted by name. A name is the first spelling of its value, made unique and
        safe for file names.

    Raises:
        InputError: If no value or fewer than ``institutions`` values have enough rows, or two would
            get one name.
    """
    least = max(1, min_records)
    same = {value: folded(value) for value in {*train, *held_out}}
    first: dict[str, str] = {}
    for value in sorted(same):
        first.setdefault(same[value], value)
    sizes = Counter(first[same[value]] for value in train)
    values = sorted(first.values())
    kept = sorted((v for v in sizes if sizes[v] >= least), key=lambda v: (-sizes[v], v))
    if not kept or len(kept) < institutions:
        wish = (
            f"data.institutions is {institutions}"
            if institutions
            else f"data.min-records is {min_records}"
        )
        raise InputError(
            f"{wish}, but only {len(kept)} of {len(values)} values of {column!r} have {least} or "
            f"more training rows (the most is {max(sizes.values(), default=0)}); lower it"
            + (f" or data.min-records (now {min_records})" if institutions else "")
        )
    safe = file_names(values)
    name_of = {value: safe[value] for value in kept[: institutions or len(kept)]}
    names = tuple(sorted(name_of.values()))
    place = {value: names.index(name) for value, name in name_of.items()}
    index = {value: place.get(first[key], -1) for value, key in same.items()}
    owner, held = (
        np.fromiter((index[value] for value in column), dtype=np.int64, count=len(column))
        for column in (train, held_out)
    )
    left = sorted(set(values) - set(name_of), key=lambda v: (-sizes[v], v))
    return Assignment(names=names, train=owner, held_out=held, left_out={v: sizes[v] for v in left})


def at_most(placed: Assignment, records: int, *, seed: int) -> Int64:
    """Leave each institution a random part of its training rows, of a given size at most.

    A smaller part lies within a larger one, and does not depend on other institutions.

    Args:
        placed: The assignment.
        records: The most training rows of an institution; 0: any number.
        seed: Seed of the parts.

    Returns:
        The index of each training row's institution (n,), or -1 for a row that is left out.
    """
    owner = placed.train.copy()
    for index, name in enumerate(placed.names) if records else ():
        rows = np.flatnonzero(owner == index)
        order = RandomSource.seeded("max-records", seed, name).permutation(len(rows))
        owner[rows[order[records:]]] = -1
    return owner


def pooled(placed: Assignment) -> Assignment:
    """One institution that holds the rows of all."""
    return replace(
        placed,
        names=("pooled",),
        train=np.minimum(placed.train, 0),
        held_out=np.minimum(placed.held_out, 0),
    )


def by_scheme(
    spec: str,
    train: Int64 | int,
    held_out: Int64 | int,
    *,
    institutions: int,
    min_records: int,
    seed: int,
    units: Sequence[str] | None = None,
) -> Assignment:
    """Assign rows to a number of synthetic institutions.

    Training rows follow the scheme, and rows of one unit of privacy stay together: they count as
    one of the class that most of them have. Held-out rows of a class are assigned in proportion to
    each institution's training rows of that class, so that an institution is tested on its own mix.
    A class without training rows is assigned in proportion to size.

    Args:
        spec: A partition other than natural.
        train: int64 (n,) class index of each training row; or n alone, where rows have no classes.
        held_out: The same for the held-out rows.
        institutions: The number of institutions.
        min_records: Every institution gets at least this many training rows, and at least one.
        seed: Seed of the partition.
        units: The unit of privacy of each training row, compared as `folded`; None where each row
            is one.

    Raises:
        InputError: If there are more institutions than rows or units, the scheme needs classes and
            there are none, or it cannot give every institution ``min_records`` rows.

    Reference: dirichlet: Hsu et al. (2019), arXiv 1909.06335; pathological: McMahan et al. (2017),
    arXiv 1602.05629.
    """
    scheme, argument = schemes.parse(
        spec, institutions=institutions, has_classes=isinstance(train, np.ndarray)
    )
    targets = np.zeros(train, dtype=np.int64) if isinstance(train, int) else train
    held = np.zeros(held_out, dtype=np.int64) if isinstance(held_out, int) else held_out
    least = max(1, min_records)
    unit_of, dealt = _together(units, targets)
    if institutions > len(dealt):
        raise InputError(
            f"data.institutions is {institutions}, but there are only {len(dealt)} training "
            f"{'rows' if units is None else 'units of privacy'}; lower it"
        )
    source = RandomSource.seeded("partition", seed)
    order = source.child("order").permutation(len(dealt))
    owner = np.zeros(len(targets), dtype=np.int64)
    why = "some institution has fewer"
    for draw in source.child("flower").words(DRAWS).tolist() if institutions > 1 else ():
        places = np.empty(len(dealt), dtype=np.int64)
        try:  # rows of units are counted here, which Flower cannot
            fewest = least if units is None else 1
            partitioner = _partitioner(scheme, argument, institutions, fewest, draw)
            places[order] = _through_flower(partitioner, dealt[order])
        except ValueError as error:
            why = " ".join(str(error).split())[:200]
            break
        owner = places[unit_of]
        if _sizes(owner, institutions).min() >= least:
            break
    sizes = _sizes(owner, institutions)
    if sizes.min() < least:
        raise InputError(
            f"data.partition {spec} cannot give {institutions} institutions {least} or more of "
            f"{len(targets)} training rows each ({why}); lower data.institutions or "
            "data.min-records, or choose a more even partition"
        )
    width = max(2, len(str(institutions - 1)))
    names = tuple(f"institution-{index:0{width}d}" for index in range(institutions))
    return Assignment(
        names=names, train=owner, held_out=_assign_held_out(held, targets, owner, sizes, source)
    )


def _sizes(owner: Int64, institutions: int) -> Int64:
    """The rows of each institution (institutions,); -1 is none."""
    return np.bincount(owner[owner >= 0], minlength=institutions)


def _together(units: Sequence[str] | None, targets: Int64) -> tuple[Int64, Int64]:
    """What is dealt: the unit of each row (n,), and the most frequent class of each unit (u,)."""
    if units is None:
        return np.arange(len(targets)), targets
    number: dict[str, int] = {}
    unit_of = np.fromiter(
        (number.setdefault(name, len(number)) for name in each_folded(units)),
        dtype=np.int64,
        count=len(units),
    )
    classes = int(targets.max(initial=0)) + 1
    pairs, counts = np.unique(unit_of * classes + targets, return_counts=True)
    order = np.lexsort((pairs, -counts, pairs // classes))
    first = np.unique(pairs[order] // classes, return_index=True)[1]
    return unit_of, pairs[order][first] % classes


def _partitioner(scheme: str, argument: str, institutions: int, least: int, seed: int) -> Any:
    flower: Any = importlib.import_module("flwr_datasets.partitioner")
    if scheme == "iid":
        return flower.IidPartitioner(institutions)
    if scheme == "dirichlet":
        return flower.DirichletPartitioner(
            institutions, "target", float(argument), min_partition_size=least, seed=seed
        )
    return flower.PathologicalPartitioner(
        institutions, "target", int(argument), "first-deterministic", seed=seed
    )


def _assign_held_out(
    held: Int64,
    targets: Int64,
    owner: Int64,
    sizes: Int64,
    source: RandomSource,
) -> Int64:
    owners = np.empty(len(held), dtype=np.int64)
    for target in np.unique(held):
        rows = np.flatnonzero(held == target)
        rows = rows[source.child("held-out", int(target)).permutation(len(rows))]
        share = np.bincount(owner[(targets == target) & (owner >= 0)], minlength=len(sizes))
        share = share if share.any() else sizes
        # Row j of m goes to the institution whose slice of [0, 1] holds (j + 1/2) / m.
        edges = np.cumsum(share) / share.sum()
        owners[rows] = np.searchsorted(
            edges[:-1], (np.arange(len(rows)) + 0.5) / len(rows), side="right"
        )
    return owners


def _through_flower(partitioner: Any, targets: Int64) -> Int64:
    """Return the partition of each row, int64 (n,), -1 for none, without bars and warnings."""
    datasets: Any = importlib.import_module("datasets")
    rows = np.arange(len(targets))
    partitioner.dataset = datasets.Dataset.from_dict({"target": targets, "row": rows})
    owner = np.full(len(rows), -1, dtype=np.int64)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for index in range(partitioner.num_partitions):
            owner[partitioner.load_partition(index)[:]["row"]] = index
    return owner


def file_names(values: Sequence[str]) -> dict[str, str]:
    """Return a name for each value, safe as a file name: ``[A-Za-z0-9_-]``, short, and unique.

    A value that is already such a name keeps it. Other values that would collide with it or with
    each other, even where case is ignored, get ``--`` and a hash of the value: no other name
    contains ``--``.

    Raises:
        InputError: If two values have the same hash, which does not happen by accident.
    """
    plain: dict[str, str] = {}
    for value in values:
        ascii_only = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
        plain[value] = re.sub(r"[^A-Za-z0-9_]+", "-", ascii_only)[:64].strip("-") or "institution"
    uses = Counter(name.casefold() for name in plain.values())
    own = Counter(name.casefold() for value, name in plain.items() if value == name)
    holder: dict[str, str] = {}
    for value, name in plain.items():
        if uses[name.casefold()] > 1 and not (value == name and own[name.casefold()] == 1):
            digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
            plain[value] = f"{name}--{digest[:12]}"
        other = holder.setdefault(plain[value].casefold(), value)
        if other != value:
            raise InputError(
                f"the institutions {other!r} and {value!r} would both be called {plain[value]}; "
                "rename one of them in the data"
            )
    return plain
