"""The plug-ins that a server runs: an aggregation, callbacks (`fedlora.config.plugins`).

They see what the server sees: updates that are noised already under DP, and figures of rounds.
So they spend no privacy.
"""

import contextlib
import copy
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import torch

from fedlora.config import plugins
from fedlora.config.config import RunConfig
from fedlora.config.sections import FederationConfig
from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState
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


def callbacks(config: RunConfig) -> list[Callable[[Mapping[str, Any]], object]]:
    """The functions of ``tracking.callbacks``. What they raise ends the run as it is.

    A class is called with the run first; what it gives is the function.

    Raises:
        InputError: If a plug-in cannot be loaded.
    """
    found = [plugins.load("tracking.callbacks", name) for name in config.tracking.callbacks]
    return [made(config) if isinstance(made, type) else made for made in found]


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
