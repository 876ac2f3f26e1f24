"""What joining gives: statistics of the models that institutions train at home.

Three models of an institution are compared on its own held-out rows: alone, shared and own
(`client.home`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from fedlora import accounting, metrics
from fedlora.joining_verdict import MAX_SCARCE_RECORDS, MODELS
from fedlora.shards import Shard

CONFIDENCE = 0.95
RESAMPLES = 4000
CHOICES = ("alone_steps", "own_steps", "alone_learning_rate", "own_learning_rate", "weight")
"""Names of what an institution chose at home."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One institution's held-out rows and what the models say of them.

    Args:
        records: Number of its training records.
        truth: The class of each held-out row ``(n,)`` int64.
        predicted: Model -> predicted classes ``(n,)`` int64.
        scarce: Whether each row's class is scarce at the institution ``(n,)``: it has at most
            `MAX_SCARCE_RECORDS` training records of it.
        choice: What the institution chose: `CHOICES`.
    """

    records: int
    truth: NDArray[np.int64]
    predicted: Mapping[str, NDArray[np.int64]]
    scarce: NDArray[np.bool_]
    choice: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        train: Shard,
        truth: NDArray[np.int64],
        said: Mapping[str, Any],
        classes: int,
    ) -> Self:
        """The rows of one institution.

        Args:
            train: Its training records.
            truth: The class of each held-out row ``(n,)`` int64.
            said: Its `fedlora.messages.Evaluation` at home.
            classes: The number of classes.

        Raises:
            ValueError: If the predictions of a model are no classes of these rows.
        """
        predicted: dict[str, NDArray[np.int64]] = {}
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
        alone: mean over all rows, 95 % interval of a paired bootstrap within institutions, and how
        many institutions gain or lose by more than their own interval. ``scarce``: accuracies on
        rows of classes that are scarce at their institution. ``sizes``: size class ->
        institutions, rows, accuracies, gain. ``institutions``: name -> the same of
        one institution, with ``records``, ``low``, ``high`` and what validation records chose.
        Empty without rows.
    """
    if not found:
        return {}
    everyone = [found[name] for name in sorted(found)]
    draw = np.random.default_rng(0)  # resampling of a measurement: repeatable, and no privacy
    institutions: dict[str, dict[str, Any]] = {}
    for name in sorted(found):
        rows = found[name]
        low, high = _interval([rows], draw)
        institutions[name] = {
            "records": rows.records,
            **_accuracies([rows]),
            "low": low,
            "high": high,
            **rows.choice,
        }
    low, high = _interval(everyone, draw)
    sizes: dict[int, list[Rows]] = {}
    for rows in everyone:
        sizes.setdefault(accounting.public_size(rows.records), []).append(rows)
    return {
        **{model: _quality(everyone, model, labels) for model in MODELS},
        "gain": {
            "mean": _accuracies(everyone)["gain"],
            "low": low,
            "high": high,
            "gaining": sum(i["low"] > 0 for i in institutions.values()),
            "losing": sum(i["high"] < 0 for i in institutions.values()),
        },
        "scarce": _accuracies([_selected(rows, rows.scarce) for rows in everyone]),
        "sizes": {
            str(size): {"institutions": len(group), **_accuracies(group)}
            for size, group in sorted(sizes.items())
        },
        "institutions": institutions,
    }


def _selected(rows: Rows, which: NDArray[np.bool_]) -> Rows:
    return Rows(
        records=rows.records,
        truth=rows.truth[which],
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


def _interval(group: Sequence[Rows], draw: np.random.Generator) -> tuple[float, float]:
    """The 95 % interval of the gain by a paired bootstrap: rows are drawn within institutions.

    A row's difference is -1, 0 or 1, so that the counts of the three are multinomial.
    """
    total = np.zeros(RESAMPLES)
    for rows in group:
        alone = rows.predicted["alone"] == rows.truth
        own = rows.predicted["own"] == rows.truth
        better, worse, n = int((own & ~alone).sum()), int((alone & ~own).sum()), len(rows.truth)
        counts = draw.multinomial(n, [better / n, worse / n, (n - better - worse) / n], RESAMPLES)
        total += counts[:, 0] - counts[:, 1]
    shares = total / sum(len(rows.truth) for rows in group)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(shares, [tail, 1 - tail])
    return float(low), float(high)
