"""Measuring a simulation's adapters on held-out rows."""

import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlora import metrics, wire
from fedlora.adapters import AdapterState
from fedlora.errors import Refusal
from fedlora.trainable import Trainable
from server.exchange import exchange
from server.population import Population
from server.replies import content

log = logging.getLogger("fedlora.server")


def of_one(work: Trainable, adapter: AdapterState, population: Population) -> dict[str, Any]:
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


def of_each(
    grid: Grid,
    order: wire.EvaluateOrder,
    nodes: Mapping[int, str],
    *,
    timeout: float,
    patience: float,
) -> dict[str, Any]:
    """The same of each institution's own adapter on its own rows.

    Args:
        grid: To the institutions.
        order: What they add their own part to.
        nodes: Node -> institution.
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
                results[name] = dict(answer.metrics)
        except Refusal as refusal:
            failed[name] = refusal.code
            log.warning("%s was not evaluated: %s", name, refusal)
    names = sorted(results)
    try:
        pooled = metrics.pooled([results[name] for name in names])
        accuracies = {n: float(results[n]["accuracy"]) for n in names if "accuracy" in results[n]}
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        log.warning("round %d: what institutions measured does not add up: %s", order.round, error)
        pooled, accuracies, failed = {}, {}, failed | dict.fromkeys(names, "malformed-message")
    return {
        **pooled,
        "institutions": accuracies,
        **({"not_evaluated": dict(sorted(failed.items()))} if failed else {}),
    }
