"""The plug-ins that a server runs: an aggregation, metrics, callbacks (`fedlora.plugins`).

They see what the server sees: updates that are noised already under DP, held-out rows of the
server, and figures of rounds. So they spend no privacy.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

from fedlora import plugins
from fedlora.adapters import AdapterState
from fedlora.errors import Refusal
from fedlora.metrics import Metric, Predictions
from fedlora.sections import FederationConfig
from server.roster import RunFailed
from strategies import STRATEGIES
from strategies.base import Round, Strategy, Weighted


def strategy(federation: FederationConfig) -> Strategy:
    """The strategy of a run, with the aggregation of ``federation.aggregate`` if there is one.

    Raises:
        InputError: If the plug-in cannot be loaded.
    """
    own, name = STRATEGIES[federation.strategy], federation.aggregate
    if not name:
        return own
    found = plugins.load("federation.aggregate", name)
    if isinstance(found, Strategy):
        own, found = found, found.aggregate
    residuals = federation.traits.residuals

    def aggregate(this_round: Round, updates: Iterable[Weighted]) -> AdapterState:
        with _named("federation.aggregate", name):
            made = AdapterState(found(this_round, updates))
            whole = this_round.before.updated(made)
            if problem := whole.validate_against(this_round.before, residual=residuals):
                raise TypeError(f"its adapter does not fit: {problem}")
        return made

    return dataclasses.replace(own, aggregate=aggregate)


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
