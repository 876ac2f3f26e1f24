"""What joining gives: statistics of the models that institutions train at home.

Three models of an institution are compared on its own held-out rows: alone, shared and own
(`client.home`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from fedlora.models import metrics
from fedlora.arrays import Floats, Int64
from fedlora.runs.joining_verdict import (
    MAX_SCARCE_RECORDS,
    MIN_CLASS_TEXTS,
    MODELS,
    has_interval,
)
from fedlora.data.shards import Shard

CONFIDENCE = 0.95
RESAMPLES = 4000
DRAWS_AT_ONCE = 16
"""Resamples in memory where each has a number for every text and class; it divides `RESAMPLES`."""
CHOICES = ("weight", "keeps_alone", "held_back")
"""Names of what an institution chose at home, last the records that it held back to choose on."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One institution's held-out rows and what the models say of them.

    Args:
        records: Number of its training records.
        truth: The class of each held-out row ``(n,)`` int64.
        texts: The number of each row's text ``(n,)`` int64 (`text_numbers`).
        predicted: Model -> predicted classes ``(n,)`` int64.
        scarce: Whether each row's class is scarce at the institution ``(n,)``: it has at most
            `MAX_SCARCE_RECORDS` training records of it.
        choice: What the institution chose: `CHOICES`.
    """

    records: int
    truth: Int64
    texts: Int64
    predicted: Mapping[str, Int64]
    scarce: NDArray[np.bool_]
    choice: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        train: Shard,
        held_out: Shard,
        texts: Int64,
        said: Mapping[str, Any],
        classes: int,
    ) -> Self:
        """The rows of one institution.

        Args:
            train: Its training records.
            held_out: Its held-out rows, n of them.
            texts: The number of each row's text ``(n,)`` int64.
            said: Its `fedlora.wire.messages.Evaluation` at home.
            classes: The number of classes.

        Raises:
            ValueError: If the predictions of a model are no classes of these rows.
        """
        predicted: dict[str, Int64] = {}
        truth = held_out.targets
        for model in MODELS:
            values: Any = said.get(model)
            if not isinstance(values, list) or not all(
                type(value) is int and 0 <= value < classes for value in cast(list[Any], values)
            ):
                raise ValueError(f"{model} is no list of classes")
            values = cast(list[int], values)
            if len(values) != len(truth):
                raise ValueError(f"{model} has {len(values)} of {len(truth)} rows")
            predicted[model] = np.array(values, dtype=np.int64)
        held = np.bincount(train.targets, minlength=classes)
        return cls(
            records=len(train),
            truth=truth,
            texts=texts,
            predicted=predicted,
            scarce=held[truth] <= MAX_SCARCE_RECORDS,
            choice={name: said.get(name) for name in CHOICES},
        )


def summary(found: Mapping[str, Rows], labels: Sequence[str]) -> dict[str, Any]:
    """Compare three models of every institution.

    Args:
        found: Institution -> its rows; at least one row each.
        labels: The classes.

    Returns:
        ``alone``, ``shared`` and ``own``: accuracy and macro-F1 over all rows. ``gain`` of own over
        alone: mean over all rows, 95 % interval of a paired bootstrap over texts, the number of
        different ``texts``, and how many institutions gain or lose by more than their own interval;
        those with fewer than `fedlora.runs.joining_verdict.MIN_TEXTS` texts count as neither.
        ``gain_shared``: mean, interval and texts of shared over alone.
        ``gain_macro_f1``: mean and interval of own over alone in macro-F1, and
        ``classes_with_few_texts``, the number of its classes with fewer than `MIN_CLASS_TEXTS`.
        ``scarce``: accuracies, gain and its interval on rows of classes that are scarce at their
        institution. ``institutions``: name -> the same of one institution, with ``records`` and what
        validation records chose. Empty without rows.
    """
    if not found:
        return {}
    everyone = [found[name] for name in sorted(found)]
    institutions: dict[str, dict[str, Any]] = {}
    for name in sorted(found):
        rows = found[name]
        institutions[name] = {
            "records": rows.records,
            **_compared([rows]),
            **rows.choice,
        }
    quality = {model: _quality(everyone, model, labels) for model in MODELS}
    low_f1, high_f1 = _macro_f1_interval(everyone, len(labels))
    scarce = [_selected(rows, rows.scarce) for rows in everyone]
    return {
        **quality,
        "gain": {
            **_over_alone(everyone, "own"),
            **_movers(institutions.values()),
        },
        "gain_shared": _over_alone(everyone, "shared"),
        "gain_macro_f1": {
            "mean": quality["own"]["macro_f1"] - quality["alone"]["macro_f1"],
            "low": low_f1,
            "high": high_f1,
            "classes_with_few_texts": _classes_with_few_texts(everyone, len(labels)),
        },
        "scarce": _compared(scarce),
        "institutions": institutions,
    }


def text_numbers(shard: Shard) -> Int64:
    """A number for each row's text ``(n,)`` int64; rows of equal tokens have equal numbers."""
    numbers: dict[bytes, int] = {}
    rows = (shard.row(index).tobytes() for index in range(len(shard)))
    return np.array([numbers.setdefault(row, len(numbers)) for row in rows], dtype=np.int64)


def _selected(rows: Rows, which: NDArray[np.bool_]) -> Rows:
    return Rows(
        records=rows.records,
        truth=rows.truth[which],
        texts=rows.texts[which],
        predicted={model: said[which] for model, said in rows.predicted.items()},
        scarce=rows.scarce[which],
        choice=rows.choice,
    )


def _quality(group: Sequence[Rows], model: str, labels: Sequence[str]) -> dict[str, float]:
    truth = [labels[int(i)] for rows in group for i in rows.truth]
    said = [labels[int(i)] for rows in group for i in rows.predicted[model]]
    return {
        "accuracy": metrics.accuracy(truth, said),
        "macro_f1": metrics.macro_f1(truth, said),
    }


def _accuracies(group: Sequence[Rows]) -> dict[str, Any]:
    """Rows, the accuracy of each model, the gain of own over alone; without rows ``rows`` only."""
    count = sum(len(rows.truth) for rows in group)
    if not count:
        return {"rows": 0}
    right = {
        model: sum(int((rows.predicted[model] == rows.truth).sum()) for rows in group)
        for model in MODELS
    }
    return {
        "rows": count,
        **{model: right[model] / count for model in MODELS},
        "gain": (right["own"] - right["alone"]) / count,
    }


def _compared(group: Sequence[Rows]) -> dict[str, Any]:
    """`_accuracies`, with the number of texts and the interval of the gain, ``low`` to ``high``."""
    found = _accuracies(group)
    if found["rows"]:
        found["texts"] = _texts(group)
        found["low"], found["high"] = _interval(group)
    return found


def _over_alone(group: Sequence[Rows], model: str) -> dict[str, Any]:
    """A model's gain over alone: ``mean``, its interval and the number of texts."""
    low, high = _interval(group, model)
    mean = float(_gains(group, model).mean())
    return {"mean": mean, "low": low, "high": high, "texts": _texts(group)}


def _gains(group: Sequence[Rows], model: str) -> Int64:
    """For each row 1 where only the model is right, -1 where only alone is, 0 otherwise."""
    right = [{m: rows.predicted[m] == rows.truth for m in ("alone", model)} for rows in group]
    return np.concatenate([one[model].astype(np.int64) - one["alone"] for one in right])


def _texts(group: Sequence[Rows]) -> int:
    """The number of different texts."""
    return len(np.unique(np.concatenate([rows.texts for rows in group])))


def _movers(institutions: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many institutions gain or lose by more than their own interval.

    Of few texts the bootstrap makes an interval that is too narrow, of one text none at all.
    """
    found = [of for of in institutions if has_interval(of)]
    return {
        "gaining": sum(of["low"] > 0 for of in found),
        "losing": sum(of["high"] < 0 for of in found),
    }


def _interval(group: Sequence[Rows], model: str = "own") -> tuple[float, float]:
    """The 95 % interval of a model's gain in accuracy by a paired bootstrap over texts."""
    gains = _gains(group, model)
    difference, count = _resampled(group, np.stack([gains, np.ones_like(gains)]))
    return _middle(difference / count)


def _macro_f1_interval(group: Sequence[Rows], classes: int) -> tuple[float, float]:
    """The 95 % interval of the gain in macro-F1 by a paired bootstrap over texts.

    It is rougher than that of the accuracy where classes are rare: a class of one text is
    in no row of every third resample (`_classes_with_few_texts`).
    """
    kinds, times = _kinds_by_class(group, classes)
    # One entry for each place of each kind of text, sorted by place.
    entries = sorted((place, kind, rows) for kind, of in enumerate(kinds) for place, rows in of)
    place, kind, rows = np.array(entries, dtype=np.int64).T
    places, begins = np.unique(place, return_index=True)
    draw = _generator()
    gains: list[Floats] = []
    for _ in range(RESAMPLES // DRAWS_AT_ONCE):
        drawn = draw.multinomial(times.sum(), times / times.sum(), DRAWS_AT_ONCE)
        counts = np.zeros((5 * classes, DRAWS_AT_ONCE))
        counts[places] = np.add.reduceat(drawn[:, kind] * rows, begins, axis=1).T
        alone, own = _macro_f1(counts, classes)
        gains.append(own - alone)
    return _middle(np.concatenate(gains))


def _kinds_by_class(
    group: Sequence[Rows], classes: int
) -> tuple[list[tuple[tuple[int, int], ...]], Int64]:
    """The kinds of texts, which count alike in macro-F1, and the texts of each kind ``(k,)``.

    A kind lists its rows as (place, rows), ascending; a place is a row's number in the counts of
    `_macro_f1`. Most places have none of a text's rows, so a table of all would be too large. The
    kinds have the order that `_resampled` would give them.
    """
    truth = np.concatenate([rows.truth for rows in group])
    said = [np.concatenate([rows.predicted[m] for rows in group]) for m in ("alone", "own")]
    right = [predicted == truth for predicted in said]
    places = [truth, *(classes * n + one for n, one in enumerate(said, start=1))]
    places += [classes * n + truth[one] for n, one in enumerate(right, start=3)]
    texts = np.concatenate([rows.texts for rows in group])
    of_texts = [texts, texts, texts, *(texts[one] for one in right)]
    pairs = np.stack([np.concatenate(of_texts), np.concatenate(places)])
    (text, place), rows = np.unique(pairs, axis=1, return_counts=True)
    _, begins = np.unique(text, return_index=True)
    counted = list(zip(place.tolist(), rows.tolist(), strict=True))
    ends = [*begins[1:].tolist(), len(counted)]
    kinds = Counter(
        tuple(counted[begin:end]) for begin, end in zip(begins.tolist(), ends, strict=True)
    )
    # As columns of a full table: of two, the one with fewer rows in the first place that differs.
    ordered = sorted(kinds, key=lambda kind: [(-place, rows) for place, rows in kind])
    return ordered, np.array([kinds[kind] for kind in ordered])


def _classes_with_few_texts(group: Sequence[Rows], classes: int) -> int:
    """How many classes of macro-F1 have fewer than `MIN_CLASS_TEXTS` different texts.

    Macro-F1 has the classes that rows are of, and those that a model names.
    """
    truth = np.concatenate([rows.truth for rows in group])
    texts = np.concatenate([rows.texts for rows in group])
    named = [rows.predicted[model] for rows in group for model in ("alone", "own")]
    has = np.bincount(np.concatenate([truth, *named]), minlength=classes) > 0
    of_texts, _ = np.unique(np.stack([truth, texts]), axis=1)
    return int((has & (np.bincount(of_texts, minlength=classes) < MIN_CLASS_TEXTS)).sum())


def _macro_f1(counts: Floats, classes: int) -> list[Floats]:
    """Macro-F1 of the two models as `fedlora.models.metrics.macro_f1`, for each column of counts.

    Args:
        counts: ``(5 * classes, n)``: rows of each class, predictions of alone and of own, right
            predictions of alone and of own.
        classes: The number of classes.
    """
    truth, *rest = counts.reshape(5, classes, -1)
    found: list[Floats] = []
    for predicted, right in zip(rest[:2], rest[2:], strict=True):
        rows = truth + predicted
        f1 = np.where(rows > 0, 2 * right / np.maximum(rows, 1), 0.0)
        found.append(f1.sum(0) / (rows > 0).sum(0))
    return found


def _middle(values: Floats) -> tuple[float, float]:
    """The bounds between which 95 % of the values lie."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _generator() -> np.random.Generator:
    """The generator of an interval's resamples: repeatable, and no privacy."""
    return np.random.default_rng(0)


def _resampled(group: Sequence[Rows], values: Int64) -> Floats:
    """Sums of values of rows in resamples of texts.

    Rows of one text, at one institution or at several, are right or wrong together, so a text is
    drawn with all of its rows. Texts of all institutions are drawn together: a draw within each
    institution of n texts would have (n - 1) / n of the variance, none for a single text. So an
    interval also holds how much institutions differ, and is rather too wide than too narrow. Texts
    with equal sums count alike, so that their counts are multinomial. Each call draws the same, so
    that equal rows have equal intervals wherever a report states them.

    Args:
        group: Institutions, n rows in all.
        values: ``(k, n)``.

    Returns:
        ``(k, RESAMPLES)``.

    Reference: Field and Welsh (2007), Bootstrapping clustered data.
    """
    _, text = np.unique(np.concatenate([rows.texts for rows in group]), return_inverse=True)
    sums = np.stack([np.bincount(text, row) for row in values])
    kinds, times = np.unique(sums, axis=1, return_counts=True)
    drawn = _generator().multinomial(times.sum(), times / times.sum(), RESAMPLES)
    return kinds @ drawn.astype(np.float64).T
