"""Measuring a simulation's adapters on held-out rows."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from flwr.app import MessageType
from flwr.serverapp import Grid

from fedlora import metrics
from fedlora.adapters import AdapterState
from fedlora.errors import Refusal
from fedlora.messages import EvaluateOrder, Evaluation
from fedlora.sft import MAX_ANSWER_CHARACTERS, MAX_ANSWERS
from fedlora.trainable import Trainable
from server.answers import ask
from server.population import Population

GENERATION_FIGURES = ("tokens", "token_loss", "perplexity", "exact_match", "generated")
"""Names of the figures of a model that generates its answer."""
MAX_TOKENS = 2**40


def evaluate_global(
    work: Trainable,
    adapter: AdapterState,
    population: Population,
    measures: Mapping[str, metrics.Metric],
) -> dict[str, Any]:
    """Metrics of one adapter on all held-out rows together, with ``measures`` beside its own.

    Returns:
        The metrics of `fedlora.tasks.Task.evaluate`, and ``institutions``: institution -> accuracy
        on its rows, where the owners of the rows are known. Without held-out rows: no metrics.
    """
    if population.held_out is None:
        return {"institutions": {}}
    adapter.load_into(work.model)
    result = work.task.evaluate(
        work.model,
        population.held_out,
        work.labels,
        owner=population.owner,
        measures=measures,
    )
    result["institutions"] = {
        population.names[int(i)]: value for i, value in result.pop("by_owner", {}).items()
    }
    return result


def evaluate_own(
    grid: Grid,
    order: EvaluateOrder,
    nodes: Mapping[int, str],
    *,
    rows: Mapping[str, int],
    labels: tuple[str, ...],
    timeout: float,
    patience: float,
) -> dict[str, Any]:
    """Metrics of each institution's own adapter on its own rows, pooled.

    Args:
        grid: The Grid that reaches the institutions.
        order: The global adapter, to which each institution adds its local parts.
        nodes: Node -> institution.
        rows: Institution -> number of its held-out rows, which its figures must cover.
        labels: The classes; empty for sft.
        timeout: Seconds that one institution may take.
        patience: Seconds without any reply after which the server stops waiting.

    Returns:
        As `evaluate_global`. If replies were refused, ``not_evaluated`` is institution -> reason,
        and the metrics are those of the other institutions.
    """

    def read(name: str, answer: Evaluation) -> dict[str, Any]:
        if answer.metrics:  # an institution without held-out rows sends none
            check_figures(answer.metrics, rows.get(name, 0), labels)
        return dict(answer.metrics)

    found, failed = ask(
        grid,
        order,
        MessageType.EVALUATE,
        nodes,
        read,
        timeout=timeout,
        patience=patience,
    )
    results = {name: figures for name, figures in found.items() if figures}
    names = sorted(results)
    return {
        **metrics.pooled([results[name] for name in names]),
        "institutions": {n: results[n]["accuracy"] for n in names if "accuracy" in results[n]},
        **({"not_evaluated": failed} if failed else {}),
    }


def check_figures(figures: Mapping[str, Any], rows: int, labels: tuple[str, ...]) -> None:
    """Refuse an institution's figures unless `fedlora.tasks.Task.evaluate` can have made them.

    Args:
        figures: The figures that the institution sent.
        rows: The number of the institution's held-out rows.
        labels: The classes; empty for sft.

    Raises:
        Refusal: ``invalid-metrics``.
    """
    class_figures = {"accuracy", "macro_f1", "per_class"}
    wanted = {"n", "loss", *class_figures} if labels else {"n", *GENERATION_FIGURES}
    if not labels and "per_class" in figures:  # where references are few and short
        wanted |= {"unparseable", *class_figures}
    if set(figures) != wanted:
        _refuse(f"it sends {len(figures)} figures, and {', '.join(sorted(wanted))} are asked for")
    if not _is_count(figures["n"], rows) or figures["n"] != rows:
        _refuse(f"n is {_short(figures['n'])}, and it holds {rows} held-out rows")
    _check_amounts(figures)
    judged = rows if labels else figures["generated"]
    if judged > rows:
        _refuse(f"generated is {judged}, and it holds {rows} held-out rows")
    if "unparseable" in wanted and not _is_count(figures["unparseable"], judged):
        _refuse(f"unparseable is {_short(figures['unparseable'])} of {judged} rows")
    if "per_class" in wanted:
        _check_classes(figures["per_class"], judged, labels)


def _check_amounts(figures: Mapping[str, Any]) -> None:
    """Refuse counts, shares and losses that are out of bounds."""
    for name, value in sorted(figures.items()):
        if name in ("tokens", "generated") and not (_is_count(value, MAX_TOKENS) and value >= 1):
            _refuse(f"{name} is {_short(value)}, and must be a number from 1")
        if name in ("accuracy", "macro_f1", "exact_match") and not (
            _is_amount(value) and value <= 1
        ):
            _refuse(f"{name} is {_short(value)}, and must be from 0 to 1")
        if name in ("loss", "token_loss", "perplexity") and not _is_amount(value):
            _refuse(f"{name} is {_short(value)}, and must be a finite number from 0")


def _check_classes(classes: Any, rows: int, labels: tuple[str, ...]) -> None:
    """Refuse counts by class that are impossible for the number of rows."""
    if not isinstance(classes, dict) or not all(isinstance(c, dict) for c in classes.values()):
        _refuse("per_class is not a table")
    if labels and set(classes) != set(labels):
        _refuse(f"per_class has {len(classes)} classes, not the run's {len(labels)}")
    if not labels and (
        len(classes) > MAX_ANSWERS or any(len(name) > MAX_ANSWER_CHARACTERS for name in classes)
    ):
        _refuse(f"per_class has more or longer answers than are read as classes: {len(classes)}")
    for name, counts in classes.items():
        if set(counts) != {"truth", "predicted", "correct"} or not all(
            _is_count(value, rows) for value in counts.values()
        ):
            _refuse(f"per_class counts {_short(counts)} for {_short(name)} of {rows} rows")


def _is_count(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _short(value: Any) -> str:
    return repr(value)[:80]


def _refuse(what: str) -> NoReturn:
    raise Refusal("invalid-metrics", what)
