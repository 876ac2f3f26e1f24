"""What joining gives: the models that institutions train at home against the released adapter.

This is the experimenter's measurement on held-out rows, in simulations only.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedlora import accounting, metrics, trainable, wire
from fedlora.config import RunConfig
from fedlora.errors import Refusal
from fedlora.messages import EvaluateOrder, Evaluation
from server.exchange import exchange
from server.joining_verdict import MAX_SCARCE_RECORDS, MODELS
from server.population import Population
from server.replies import content

CONFIDENCE = 0.95
RESAMPLES = 4000
log = logging.getLogger("fedlora.server")


def is_measured(config: RunConfig, institutions: int) -> bool:
    """Whether a run compares its institutions' models at home."""
    return (
        config.home.method != "none"
        and config.federation.rounds > 0
        and not config.deployed
        and institutions > 1
        and config.model.task == "classification"
    )


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """One institution's held-out rows and what the models say of them.

    Args:
        records: Number of its training records.
        truth: The class of each held-out row ``(n,)`` int64.
        predicted: Model -> predicted classes ``(n,)`` int64.
        scarce: Whether each row's class is scarce at the institution ``(n,)``: it has at most
            `MAX_SCARCE_RECORDS` training records of it.
        choice: ``alone_steps``, ``own_steps`` and ``weight``.
    """

    records: int
    truth: NDArray[np.int64]
    predicted: Mapping[str, NDArray[np.int64]]
    scarce: NDArray[np.bool_]
    choice: Mapping[str, Any]


def measure(
    grid: Grid,
    order: EvaluateOrder,
    nodes: Mapping[int, str],
    config: RunConfig,
    population: Population,
    patience: float,
) -> dict[str, Any]:
    """Let institutions train at home, and compare their models.

    Args:
        grid: To the institutions.
        order: The released adapter.
        nodes: Node -> institution.
        config: The run.
        population: The institutions and their held-out rows.
        patience: Seconds without any reply after which the server stops waiting.

    Returns:
        As `summary`, with ``seconds``, and ``not_compared`` (institution -> reason) if a reply was
        refused.
    """
    started = time.monotonic()
    arrays, timeout = wire.pack_adapter(order.adapter), config.federation.timeout
    messages = [
        Message(wire.pack_order(order, arrays), node, wire.HOME, group_id="home", ttl=timeout)
        for node in nodes
    ]
    found: dict[str, _Rows] = {}
    failed: dict[str, str] = {}
    for node, reply in exchange(grid, messages, patience):
        name = nodes[node]
        try:
            rows = _rows(name, wire.unpack_evaluation(content(reply)), config, population)
            if len(rows.truth):
                found[name] = rows
        except Refusal as refusal:
            failed[name] = refusal.code
            log.warning("%s trained no model at home: %s", name, refusal)
    return {
        **summary(found, population.labels),
        "method": config.home.method,
        "seconds": round(time.monotonic() - started, 2),
        **({"not_compared": dict(sorted(failed.items()))} if failed else {}),
    }


def _rows(name: str, answer: Evaluation, config: RunConfig, population: Population) -> _Rows:
    """One institution's rows, if its answer can be of them.

    Raises:
        Refusal: ``wrong-institution``, ``invalid-metrics``.
    """
    assert population.held_out is not None and population.owner is not None
    if answer.institution != name:
        raise Refusal("wrong-institution", f"{name} answered as {answer.institution}")
    index, classes = population.names.index(name), len(population.labels)
    truth = np.asarray(population.held_out.targets[population.owner == index], dtype=np.int64)
    predicted: dict[str, NDArray[np.int64]] = {}
    for model in MODELS:
        said = answer.metrics.get(model)
        if not isinstance(said, list) or not all(
            type(value) is int and 0 <= value < classes for value in said
        ):
            raise Refusal("invalid-metrics", f"{model} is no list of classes")
        if len(said) != len(truth):
            raise Refusal("invalid-metrics", f"{model} has {len(said)} of {len(truth)} rows")
        predicted[model] = np.array(said, dtype=np.int64)
    train = trainable.records(config).train(index)
    held = np.bincount(train.targets, minlength=classes)
    return _Rows(
        records=len(train),
        truth=truth,
        predicted=predicted,
        scarce=held[truth] <= MAX_SCARCE_RECORDS,
        choice={k: answer.metrics.get(k) for k in ("alone_steps", "own_steps", "weight")},
    )


def summary(found: Mapping[str, _Rows], labels: Sequence[str]) -> dict[str, Any]:
    """Compare three models of every institution.

    Args:
        found: Institution -> its rows; at least one row each.
        labels: The classes.

    Returns:
        ``alone``, ``shared`` and ``own``: accuracy and macro-F1 over all rows. ``gain`` of own over
        alone: mean over all rows, 95 % interval of a paired bootstrap within institutions, and how
        many institutions gain or lose by more than their own interval. ``scarce``: accuracies on
        rows of classes that are scarce at their institution. ``sizes``: size class ->
        institutions, rows, accuracies, gain. ``institutions``: name -> the same of one
        institution, with ``records``, ``low``, ``high`` and what validation records chose.
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
    sizes: dict[int, list[_Rows]] = {}
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


def _selected(rows: _Rows, which: NDArray[np.bool_]) -> _Rows:
    return _Rows(
        records=rows.records,
        truth=rows.truth[which],
        predicted={model: said[which] for model, said in rows.predicted.items()},
        scarce=rows.scarce[which],
        choice=rows.choice,
    )


def _quality(group: Sequence[_Rows], model: str, labels: Sequence[str]) -> dict[str, float]:
    true_classes: list[int] = np.concatenate([rows.truth for rows in group]).tolist()
    said_classes: list[int] = np.concatenate([rows.predicted[model] for rows in group]).tolist()
    truth, said = [labels[i] for i in true_classes], [labels[i] for i in said_classes]
    return {
        "accuracy": metrics.accuracy(truth, said),
        "macro_f1": metrics.macro_f1(truth, said),
    }


def _accuracies(group: Sequence[_Rows]) -> dict[str, Any]:
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


def _interval(group: Sequence[_Rows], draw: np.random.Generator) -> tuple[float, float]:
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
