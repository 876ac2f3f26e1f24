"""Measuring a simulation's adapters on held-out rows."""

import math
from collections.abc import Mapping
from typing import Any

from flwr.app import MessageType
from flwr.serverapp import Grid

from fedlora.config.config import RunConfig
from fedlora.errors import Refusal
from fedlora.models import metrics
from fedlora.models.adapters import AdapterState
from fedlora.models.trainable import Trainable
from fedlora.wire.messages import EvaluateOrder, Evaluation
from server.answers import ask
from server.population import Population


def evaluate_global(
    work: Trainable,
    adapter: AdapterState,
    population: Population,
) -> dict[str, Any]:
    """Metrics of one adapter on all held-out rows together.

    Returns:
        The metrics of `models.tasks.Task.evaluate`, and ``institutions``: institution -> accuracy
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
    )
    result["institutions"] = {
        population.names[int(i)]: value for i, value in result.pop("by_owner", {}).items()
    }
    return result


def evaluate_own(
    grid: Grid,
    order: EvaluateOrder,
    nodes: Mapping[int, str],
    config: RunConfig,
) -> dict[str, Any]:
    """Metrics of each institution's own adapter on its own rows, pooled.

    Args:
        grid: The Grid that reaches the institutions.
        order: The global adapter, to which each institution adds its local parts.
        nodes: Node -> institution.
        config: The run.

    Returns:
        As `evaluate_global`. If replies were refused, ``not_evaluated`` is institution -> reason,
        and the metrics are those of the other institutions.
    """
    found, failed = ask(grid, config, order, MessageType.EVALUATE, nodes, _figures)
    results = {name: figures for name, figures in found.items() if figures}
    names = sorted(results)
    return {
        **metrics.pooled([results[name] for name in names]),
        "institutions": {n: results[n]["accuracy"] for n in names if "accuracy" in results[n]},
        **({"not_evaluated": failed} if failed else {}),
    }


def _figures(_: str, answer: Evaluation) -> Mapping[str, Any]:
    if not all(math.isfinite(x) for x in answer.metrics.values() if isinstance(x, float)):
        raise Refusal("invalid-metrics", "the institution's own adapter has no finite figures")
    return answer.metrics
