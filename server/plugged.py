"""The plug-ins that a server runs: an aggregation, metrics, callbacks (`fedlora.config.plugins`).

They see what the server sees: updates that are noised already under DP, held-out rows of the
server, and figures of rounds. So they spend no privacy.
"""

import contextlib
import copy
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import torch

from fedlora.config import plugins
from fedlora.config.sections import FederationConfig
from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState
from fedlora.models.metrics import Metric, Predictions
from server.roster import RunFailed
from strategies import STRATEGIES
from strategies.base import Round, Strategy, Weighted


def strategy(federation: FederationConfig) -> Strategy:
    """The strategy of a run: one of the table, or a plug-in.

    A plug-in gets a copy of the round's adapters, so that it cannot change them. An adapter that it
    returns must have the names and shapes of the global one; its values are taken without their
    gradients.

    Raises:
        InputError: If the plug-in cannot be loaded.
    """
    name = federation.own_code
    if not name:
        return STRATEGIES[federation.strategy]
    found = plugins.load("federation.strategy", name)
    given = found if isinstance(found, Strategy) else Strategy(aggregate=found)

    def fitting(this_round: Round, made: Mapping[str, torch.Tensor]) -> AdapterState:
        made = AdapterState({key: tensor.detach() for key, tensor in made.items()})
        whole = this_round.before.updated(made)
        if problem := whole.validate_against(this_round.before):
            raise TypeError(f"its adapter does not fit: {problem}")
        return made

    def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
        with _named("federation.strategy", name):
            return fitting(this_round, given.aggregate(copy.deepcopy(this_round), updates))

    def start(this_round: Round) -> AdapterState:
        with _named("federation.strategy", name):
            made = fitting(this_round, given.start(copy.deepcopy(this_round)))
            return this_round.before.updated(made)

    return Strategy(aggregate=aggregate, start=start)


def measures(federation: FederationConfig) -> dict[str, Metric]:
    """Name -> metric of ``federation.metrics``; the name is the object's own.

    Raises:
        InputError: If a plug-in cannot be loaded.
    """
    names = zip(federation.metric_names, federation.metrics, strict=True)
    return {short: _measure(name) for short, name in names}


def _measure(name: str) -> Metric:
    metric: Metric = plugins.load("federation.metrics", name)

    def measure(predictions: Predictions) -> float:
        with _named("federation.metrics", name):
            return float(metric(predictions))

    return measure


def callbacks(names: Iterable[str]) -> list[Callable[[Mapping[str, Any]], object]]:
    """The functions of ``tracking.callbacks``. What they raise ends the run as it is.

    Raises:
        InputError: If a plug-in cannot be loaded.
    """
    return [plugins.load("tracking.callbacks", name) for name in names]


@contextlib.contextmanager
def _named(key: str, name: str) -> Generator[None]:
    """A block in which an error of a plug-in's code becomes a `RunFailed` that names it."""
    try:
        yield
    except (Refusal, RunFailed):
        raise
    except Exception as error:
        raise RunFailed(
            f"{key} {name} failed with {type(error).__name__}: {error}; mend it. The last "
            "checkpoint is kept"
        ) from error
