"""Measuring a simulation's adapters on held-out rows."""

import logging
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlora import metrics, wire
from fedlora.adapters import AdapterState
from fedlora.errors import Refusal
from fedlora.tasks import CLOSED_ANSWERS, CLOSED_CHARACTERS
from fedlora.trainable import Trainable
from server.exchange import exchange
from server.population import Population
from server.replies import content

OF_TOKENS = ("tokens", "token_loss", "perplexity", "exact_match", "generated")
"""Figures of a model that writes its answer."""
MOST_TOKENS = 2**40
log = logging.getLogger("fedlora.server")


def evaluate_global(
    work: Trainable, adapter: AdapterState, population: Population
) -> dict[str, Any]:
    """Metrics of one adapter on all held-out rows together.

    Returns:
        What `fedlora.tasks.Task.evaluate` says, and ``institutions``: the accuracy on each one's
        rows, where it is known whose they are. Nothing but that where there are no rows.
    """
    if population.held_out is None:
        return {"institutions": {}}
    adapter.load_into(work.model)
    result = work.task.evaluate(
        work.model, population.held_out, work.labels, owner=population.owner
    )
    result["institutions"] = {
        population.names[int(i)]: value for i, value in result.pop("by_owner", {}).items()
    }
    return result


def evaluate_own(
    grid: Grid,
    order: wire.EvaluateOrder,
    nodes: Mapping[int, str],
    *,
    rows: Mapping[str, int],
    labels: tuple[str, ...],
    timeout: float,
    patience: float,
) -> dict[str, Any]:
    """The same of each institution's own adapter on its own rows.

    Args:
        grid: To the institutions.
        order: What they add their own part to.
        nodes: Node -> institution.
        rows: Institution -> its held-out rows, on which its figures must be; none: no figures.
        labels: The classes; empty for sft.
        timeout: Seconds that one may take.
        patience: Seconds without any answer after which nobody is waited for.

    Returns:
        Besides, ``not_evaluated``: institution -> reason of those whose answer does not count, if
        there are any; the metrics are then those of the others.
    """
    arrays = wire.pack_adapter(order.adapter)
    messages = [
        Message(
            wire.pack_order(order, arrays),
            node,
            MessageType.EVALUATE,
            group_id=str(order.round),
            ttl=timeout,
        )
        for node in nodes
    ]
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for node, reply in exchange(grid, messages, patience):
        name = nodes[node]
        try:
            answer = wire.unpack_evaluation(content(reply))
            if answer.institution != name:
                raise Refusal("wrong-institution", f"{name} answered as {answer.institution}")
            if answer.metrics:  # else it holds no row
                check_figures(answer.metrics, rows.get(name, 0), labels)
                results[name] = dict(answer.metrics)
        except Refusal as refusal:
            failed[name] = refusal.code
            log.warning("%s was not evaluated: %s", name, refusal)
    names = sorted(results)
    return {
        **metrics.pooled([results[name] for name in names]),
        "institutions": {n: results[n]["accuracy"] for n in names if "accuracy" in results[n]},
        **({"not_evaluated": dict(sorted(failed.items()))} if failed else {}),
    }


def check_figures(figures: Mapping[str, Any], rows: int, labels: tuple[str, ...]) -> None:
    """Refuse an institution's figures unless `fedlora.tasks.Task.evaluate` can have made them.

    Args:
        figures: As they came.
        rows: The institution's held-out rows.
        labels: The classes; empty for sft.

    Raises:
        Refusal: ``invalid-metrics``.
    """
    of_classes = {"accuracy", "macro_f1", "per_class"}
    wanted = {"n", "loss", *of_classes} if labels else {"n", *OF_TOKENS}
    if not labels and "per_class" in figures:  # where references are few and short
        wanted |= {"unparseable", *of_classes}
    if set(figures) != wanted:
        _refuse(f"it sends {len(figures)} figures, and {', '.join(sorted(wanted))} are asked for")
    if not _count(figures["n"], rows) or figures["n"] != rows:
        _refuse(f"n is {_short(figures['n'])}, and it holds {rows} held-out rows")
    for name in sorted(wanted & {"tokens", "generated"}):
        if not _count(figures[name], MOST_TOKENS) or figures[name] < 1:
            _refuse(f"{name} is {_short(figures[name])}, and must be a number from 1")
    for name in sorted(wanted & {"accuracy", "macro_f1", "exact_match"}):
        if not _amount(figures[name]) or figures[name] > 1:
            _refuse(f"{name} is {_short(figures[name])}, and must be from 0 to 1")
    for name in sorted(wanted & {"loss", "token_loss", "perplexity"}):
        if not _amount(figures[name]):
            _refuse(f"{name} is {_short(figures[name])}, and must be a finite number from 0")
    judged = rows if labels else figures["generated"]
    if judged > rows:
        _refuse(f"generated is {judged}, and it holds {rows} held-out rows")
    if "unparseable" in wanted and not _count(figures["unparseable"], judged):
        _refuse(f"unparseable is {_short(figures['unparseable'])} of {judged} rows")
    if "per_class" in wanted:
        _check_classes(figures["per_class"], judged, labels)


def _check_classes(classes: Any, rows: int, labels: tuple[str, ...]) -> None:
    """Refuse counts by class that cannot be of so many rows."""
    if not isinstance(classes, dict) or not all(isinstance(c, dict) for c in classes.values()):
        _refuse("per_class is no table")
    if labels and set(classes) != set(labels):
        _refuse(f"per_class has {len(classes)} classes, not the run's {len(labels)}")
    if not labels and (
        len(classes) > CLOSED_ANSWERS or any(len(name) > CLOSED_CHARACTERS for name in classes)
    ):
        _refuse(f"per_class has more or longer answers than are read as classes: {len(classes)}")
    for name, counts in classes.items():
        if set(counts) != {"truth", "predicted", "correct"} or not all(
            _count(value, rows) for value in counts.values()
        ):
            _refuse(f"per_class counts {_short(counts)} for {_short(name)} of {rows} rows")


def _count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _short(value: Any) -> str:
    return repr(value)[:80]


def _refuse(what: str) -> NoReturn:
    raise Refusal("invalid-metrics", what)
