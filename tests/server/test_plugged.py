"""A plug-in in a strategy's place changes nothing but by what it returns, and that must fit."""

import pytest
import torch

from fedlora.config import plugins
from fedlora.config.sections import FederationConfig
from fedlora.models.adapters import AdapterState
from server import plugged
from server.roster import RunFailed
from strategies import fedavg
from strategies.base import Round, Strategy

A, B = "base.q.lora_A.weight", "base.q.lora_B.weight"


def state(value=1.0):
    return AdapterState({A: torch.full((2, 3), value), B: torch.full((4, 2), value)})


ROUND = Round(number=1, asked=2, before=state())


@pytest.fixture
def under(monkeypatch):
    """Makes the strategy of a run under this plug-in."""

    def make(found):
        monkeypatch.setattr(plugins, "load", lambda key, name: found)
        return plugged.strategy(FederationConfig(strategy="own:code"))

    return make


def test_a_plug_in_that_works_in_place_changes_no_adapter_of_the_round(under):
    def in_place(this_round, updates=()):
        for tensor in this_round.before.values():
            tensor.add_(1.0)
        return this_round.before

    own = Strategy(aggregate=in_place, start=in_place)
    for made in (under(own).aggregate(ROUND, []), under(own).start(ROUND)):
        assert torch.equal(made[A], state(2.0)[A])
        assert torch.equal(ROUND.before[A], state()[A])


@pytest.mark.parametrize(
    "start",
    [
        lambda this_round: 1 / 0,
        lambda this_round: {A: torch.zeros(1, 3)},
        lambda this_round: state(float("nan")),
        lambda this_round: None,
    ],
)
def test_a_start_that_fails_or_does_not_fit_ends_the_run_and_names_the_plug_in(under, start):
    strategy = under(Strategy(aggregate=fedavg.aggregate, start=start))
    with pytest.raises(RunFailed, match=r"federation\.strategy own:code failed .*; mend it"):
        strategy.start(ROUND)
