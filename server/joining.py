"""What joining gives: the models that institutions train at home against the released adapter.

This is the experimenter's measurement on held-out rows, in simulations only.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedlora import trainable, wire
from fedlora.comparison import Rows, summary
from fedlora.config import RunConfig
from fedlora.errors import Refusal
from fedlora.messages import EvaluateOrder, Evaluation
from server.exchange import exchange
from server.population import Population
from server.replies import content

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
        As `fedlora.comparison.summary`, with ``seconds``, and ``not_compared`` (institution ->
        reason) if a reply was refused.
    """
    started = time.monotonic()
    arrays, timeout = wire.pack_adapter(order.adapter), config.federation.timeout
    messages = [
        Message(wire.pack_order(order, arrays), node, wire.HOME, group_id="home", ttl=timeout)
        for node in nodes
    ]
    found: dict[str, Rows] = {}
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


def _rows(name: str, answer: Evaluation, config: RunConfig, population: Population) -> Rows:
    """One institution's rows, if its answer can be of them.

    Raises:
        Refusal: ``wrong-institution``, ``invalid-metrics``.
    """
    assert population.held_out is not None and population.owner is not None
    if answer.institution != name:
        raise Refusal("wrong-institution", f"{name} answered as {answer.institution}")
    index = population.names.index(name)
    truth = np.asarray(population.held_out.targets[population.owner == index], dtype=np.int64)
    train = trainable.records(config).train(index)
    try:
        return Rows.of(train, truth, answer.metrics, len(population.labels))
    except ValueError as error:
        raise Refusal("invalid-metrics", str(error)) from None
