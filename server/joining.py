"""What joining gives: the models that institutions train at home against the released adapter.

This is the experimenter's measurement on held-out rows, in simulations only.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from fedlora.arrays import Int64
from fedlora.config.config import RunConfig
from fedlora.config.sections import HOME_BATCH_SIZE
from fedlora.data import records
from fedlora.errors import Refusal
from fedlora.privacy.budget import rate_of
from fedlora.runs.comparison import Rows, summary, text_numbers
from fedlora.runs.joining_verdict import NO_ROWS
from fedlora.wire import wire
from fedlora.wire.messages import EvaluateOrder, Evaluation
from server.answers import ask
from server.population import Population


def measure(
    grid: Grid,
    order: EvaluateOrder,
    nodes: Mapping[int, str],
    config: RunConfig,
    population: Population,
) -> dict[str, Any]:
    """Let institutions train at home, and compare their models.

    Args:
        grid: To the institutions.
        order: The released adapter.
        nodes: Node -> institution.
        config: The run.
        population: The institutions and their held-out rows.

    Returns:
        As `runs.comparison.summary`, with ``seconds`` and ``method``; ``not_compared`` (institution
        -> reason) if a reply was refused or an institution has no held-out rows.
    """
    started = time.monotonic()
    assert population.held_out is not None
    texts = text_numbers(population.held_out)
    timeout = seconds_at_home(config, [population.names.index(name) for name in nodes.values()])
    answers, failed = ask(
        grid,
        config,
        order,
        wire.HOME,
        nodes,
        lambda name, answer: _rows(name, answer, config, population, texts),
        timeout=timeout,
        rows=len(population.held_out),
    )
    found = {name: rows for name, rows in answers.items() if len(rows.truth)}
    failed |= dict.fromkeys(sorted(answers.keys() - found.keys()), NO_ROWS)
    return {
        **summary(found, population.labels),
        "method": config.home.method,
        "seconds": round(time.monotonic() - started, 2),
        **({"not_compared": failed} if failed else {}),
    }


def seconds_at_home(config: RunConfig, institutions: Sequence[int]) -> float:
    """Seconds that an institution may take to train at home.

    They are ``federation.timeout``, which is for a round, as many times as the most records that an
    institution passes at home exceed those of its round, or a batch at home where that is more.

    Args:
        config: The run.
        institutions: The numbers of those that train.
    """
    federation, home = records.load(config), config.home
    longest = 1.0
    for shard in (federation.train(i) for i in institutions):
        rate = rate_of(config, shard)
        of_a_round = config.training.local_steps * rate * len(shard)
        longest = max(longest, home.work(len(shard)) / max(of_a_round, HOME_BATCH_SIZE))
    return longest * config.federation.timeout


def _rows(
    name: str,
    answer: Evaluation,
    config: RunConfig,
    population: Population,
    texts: Int64,
) -> Rows:
    """One institution's rows, if its answer can be of them.

    Args:
        name: The institution.
        answer: Its answer.
        config: The run.
        population: The institutions and their held-out rows.
        texts: The number of the text of each held-out row of all institutions.

    Raises:
        Refusal: ``invalid-metrics``.
    """
    assert population.held_out is not None and population.owner is not None
    index = population.names.index(name)
    own = np.flatnonzero(population.owner == index)
    train, held_out = records.load(config).train(index), population.held_out.select(own)
    try:
        return Rows.of(train, held_out, texts[own], answer.metrics, len(population.labels))
    except ValueError as error:
        raise Refusal("invalid-metrics", str(error)) from None
