"""The plug-ins that a server runs: an aggregation, metrics, callbacks (`fedlora.config.plugins`).

They see what the server sees: updates that are noised already under DP, held-out rows of the
server, and figures of rounds. So they spend no privacy.
"""

import contextlib
import copy
import dataclasses
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
    """The strategy of a run, with the aggregation of ``federation.aggregate`` if there is one.

    A plug-in gets copies of the round's adapters, so that it cannot change them. An adapter that it
    returns must have the names and shapes of the global one, or, from ``start``, of an
    institution's, and its values are taken without their gradients.

    Raises:
        InputError: If the plug-in cannot be loaded.
    """
    own, name = STRATEGIES[federation.strategy], federation.aggregate
    if not name:
        return own
    found = plugins.load("federation.aggregate", name)
    given = found if isinstance(found, Strategy) else dataclasses.replace(own, aggregate=found)
    residual = federation.traits.residuals

    def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
        with _named("federation.aggregate", name):
            made = _plain(given.aggregate(copy.deepcopy(this_round), updates))
            whole = this_round.before.updated(made)
            if problem := whole.validate_against(this_round.before, residual=residual):
                raise TypeError(f"its adapter does not fit: {problem}")
        return made

    def start(this_round: Round, rank: int) -> AdapterState:
        with _named("federation.aggregate", name):
            made = _plain(given.start(copy.deepcopy(this_round), rank))
            wanted = this_round.before.cut(rank)
            if problem := made.validate_against(wanted, residual=residual):
                raise TypeError(f"its start for rank {rank} does not fit: {problem}")
        return made

    return Strategy(aggregate=aggregate, start=start if isinstance(found, Strategy) else own.start)


def _plain(tensors: Mapping[str, torch.Tensor]) -> AdapterState:
    """An adapter of these values, which remembers nothing of how they were computed."""
    return AdapterState({name: tensor.detach() for name, tensor in tensors.items()})


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
