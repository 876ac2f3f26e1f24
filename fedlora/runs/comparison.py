"""What joining gives: statistics of the models that institutions train at home.

Three models of an institution are compared on its own held-out rows: alone, shared and own
(`client.home`). Three sets of rows are counted: all of them (at home), those of classes of which
the institution has no training record (new), and those of classes of which it has few.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np

from fedlora.arrays import Floats, Int64
from fedlora.data.shards import Shard
from fedlora.models import metrics
from fedlora.runs.joining_verdict import FEW, MIN_TEXTS, MODELS

RESAMPLES = 4000
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
        known: The number of the institution's training records of each row's class ``(n,)`` int64.
        choice: What the institution chose: `CHOICES`.
    """

    records: int
    truth: Int64
    texts: Int64
    predicted: Mapping[str, Int64]
    known: Int64
    choice: Mapping[str, Any]

    @classmethod
    def of(
        cls, train: Shard, held_out: Shard, texts: Int64, said: Mapping[str, Any], classes: int
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
        return cls(
            records=len(train),
            truth=truth,
            texts=texts,
            predicted=predicted,
            known=np.bincount(train.targets, minlength=classes)[truth],
            choice={name: said.get(name) for name in CHOICES},
        )

    def where(self, which: Any) -> Self:
        """The rows that a mask ``(n,)`` bool chooses."""
        predicted = {model: said[which] for model, said in self.predicted.items()}
        return type(self)(
            records=self.records,
            truth=self.truth[which],
            texts=self.texts[which],
            predicted=predicted,
            known=self.known[which],
            choice=self.choice,
        )


def summary(found: Mapping[str, Rows], labels: Sequence[str]) -> dict[str, Any]:
    """Compare three models of every institution.

    Args:
        found: Institution -> its rows; at least one row each.
        labels: The classes.

    Returns:
        ``alone``, ``shared`` and ``own``: accuracy and macro-F1 over all rows. ``gain`` of own over
        alone and ``gain_shared`` of shared over alone: mean over all rows, 95 % interval of a
        paired bootstrap over texts and the number of different ``texts``; in ``gain`` also how many
        institutions gain or lose by more than their own interval, of those with `MIN_TEXTS` texts.
        ``new`` and ``few``: rows, accuracies, gain and its interval on rows of classes of which
        their institution has no training record, and 1 to `FEW`. ``institutions``: name -> the
        same of all rows of one institution, with ``records`` and `CHOICES`. Empty without rows.
    """
    if not found:
        return {}
    everyone = [found[name] for name in sorted(found)]
    institutions = {
        name: {"records": found[name].records, **_compared([found[name]]), **found[name].choice}
        for name in sorted(found)
    }
    enough = [of for of in institutions.values() if of["texts"] >= MIN_TEXTS]
    return {
        **{model: _quality(everyone, model, labels) for model in MODELS},
        "gain": {
            **_over_alone(everyone, "own"),
            "gaining": sum(of["low"] > 0 for of in enough),
            "losing": sum(of["high"] < 0 for of in enough),
        },
        "gain_shared": _over_alone(everyone, "shared"),
        "new": _compared([rows.where(rows.known == 0) for rows in everyone]),
        "few": _compared([rows.where((rows.known > 0) & (rows.known <= FEW)) for rows in everyone]),
        "institutions": institutions,
    }


def text_numbers(shard: Shard) -> Int64:
    """A number for each row's text ``(n,)`` int64; rows of equal tokens have equal numbers."""
    numbers: dict[bytes, int] = {}
    rows = (shard.row(index).tobytes() for index in range(len(shard)))
    return np.array([numbers.setdefault(row, len(numbers)) for row in rows], dtype=np.int64)


def _quality(group: Sequence[Rows], model: str, labels: Sequence[str]) -> dict[str, float]:
    truth = [labels[int(i)] for rows in group for i in rows.truth]
    said = [labels[int(i)] for rows in group for i in rows.predicted[model]]
    return {
        "accuracy": metrics.accuracy(truth, said),
        "macro_f1": metrics.macro_f1(truth, said),
    }


def _compared(group: Sequence[Rows]) -> dict[str, Any]:
    """Rows, texts, the accuracy of each model, own's gain over alone and its interval."""
    truth = np.concatenate([rows.truth for rows in group])
    if not len(truth):
        return {"rows": 0}
    said = {m: np.concatenate([rows.predicted[m] for rows in group]) for m in MODELS}
    found = {model: float((said[model] == truth).mean()) for model in MODELS}
    over = _over_alone(group, "own")
    return {"rows": len(truth), **found, "gain": over.pop("mean"), **over}


def _over_alone(group: Sequence[Rows], model: str) -> dict[str, Any]:
    """A model's gain over alone: ``mean``, its 95 % interval and the number of texts.

    Rows of one text, at one institution or at several, are right or wrong together, so a text is
    drawn with all of its rows, and texts of all institutions are drawn together. Texts with equal
    sums count alike, so that their counts are multinomial. Each call draws the same.

    Reference: Field and Welsh (2007), Bootstrapping clustered data.
    """
    gains = np.concatenate(
        [
            (rows.predicted[model] == rows.truth).astype(np.int64)
            - (rows.predicted["alone"] == rows.truth)
            for rows in group
        ]
    )
    texts, text = np.unique(np.concatenate([rows.texts for rows in group]), return_inverse=True)
    sums = np.stack([np.bincount(text, gains), np.bincount(text)])
    kinds, times = np.unique(sums, axis=1, return_counts=True)
    draw = np.random.default_rng(0)  # repeatable, and no privacy
    drawn: Floats = draw.multinomial(times.sum(), times / times.sum(), RESAMPLES).astype(np.float64)
    difference, count = kinds @ drawn.T
    low, high = np.quantile(difference / count, [0.025, 0.975])
    return {
        "mean": float(gains.mean()),
        "low": float(low),
        "high": float(high),
        "texts": len(texts),
    }
