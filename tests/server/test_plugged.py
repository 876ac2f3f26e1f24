"""A plug-in in a strategy's place changes nothing but by what it returns, and that must fit."""

import dataclasses

import pytest
import torch

from fedlora.config import plugins
from fedlora.config.sections import FederationConfig
from fedlora.models.adapters import AdapterState
from server import plugged
from server.roster import RunFailed
from strategies import fedavg, svd
from strategies.base import Round, Strategy
from strategies.diagnostics import Watch
from tests.samples import updates_of

A, B = "base.q.lora_A.weight", "base.q.lora_B.weight"


def state(value=1.0, rank=2):
    return AdapterState({A: torch.full((rank, 3), value), B: torch.full((4, rank), value)})


ROUND = Round(number=1, asked=2, before=state(), sent={"bank-00": state(rank=1)})


@pytest.fixture
def under(monkeypatch):
    """Makes the strategy of an svd run under this plug-in."""

    def make(found):
        monkeypatch.setattr(plugins, "load", lambda key, name: found)
        return plugged.strategy(FederationConfig(strategy="svd", aggregate="own:code"))

    return make


def test_values_that_require_gradients_are_taken_without_them(under):
    def learned(this_round, updates):
        mean = fedavg.aggregate(this_round, updates)
        return {name: t * torch.ones((), requires_grad=True) for name, t in mean.items()}

    watch, updates = Watch(ROUND), updates_of([state(2.0), state(4.0)])
    made = under(learned).aggregate(ROUND, watch.through(updates))
    assert not any(tensor.requires_grad for tensor in made.values())
    assert torch.equal(made[A], torch.full((2, 3), 3.0))
    assert watch.figures(made)["error"] is not None
    given = Strategy(aggregate=learned, start=lambda r, k: learned(r, updates_of([r.before])))
    assert not any(t.requires_grad for t in under(given).start(ROUND, 2).values())


def test_a_plug_in_that_works_in_place_changes_no_adapter_of_the_round(under):
    def in_place(this_round, updates):
        list(updates)
        for each in (this_round.before, *this_round.sent.values()):
            for tensor in each.values():
                tensor.add_(1.0)
        return this_round.before

    own = Strategy(aggregate=in_place, start=lambda this_round, rank: in_place(this_round, []))
    for made in (
        under(in_place).aggregate(ROUND, []),
        under(own).aggregate(ROUND, []),
        under(own).start(ROUND, 2),
    ):
        assert torch.equal(made[A], state(2.0)[A])
        assert torch.equal(ROUND.before[A], state()[A])
        assert torch.equal(ROUND.sent["bank-00"][B], state(rank=1)[B])


def test_who_was_sent_the_global_adapter_was_sent_it_in_the_copy_too(under):
    """`svd` would otherwise take the two for different adapters, and add their difference."""
    sent = dataclasses.replace(ROUND, sent={"bank-00": ROUND.before})
    seen = []
    under(lambda this_round, updates: seen.append(this_round) or {}).aggregate(sent, [])
    assert seen[0].sent["bank-00"] is seen[0].before is not ROUND.before


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (lambda this_round, rank: 1 / 0, "with ZeroDivisionError: division by zero"),
        (lambda this_round, rank: this_round.before, r"start for rank 1 does not fit: .*lora_A"),
        (lambda this_round, rank: {A: torch.zeros(1, 3)}, "does not fit: .*lora_B.* is missing"),
        (lambda this_round, rank: state(float("nan"), rank), "not finite"),
        (lambda this_round, rank: None, "with AttributeError"),
    ],
)
def test_a_start_that_fails_or_does_not_fit_ends_the_run_and_names_the_plug_in(under, start, words):
    strategy = under(Strategy(aggregate=fedavg.aggregate, start=start))
    with pytest.raises(
        RunFailed, match=rf"federation\.aggregate own:code failed .*{words}.*; mend it"
    ):
        strategy.start(ROUND, 1)


def test_a_start_that_fits_is_sent_and_a_function_has_that_of_the_strategy(under):
    given = Strategy(aggregate=fedavg.aggregate, start=lambda r, rank: r.before.cut(rank))
    assert under(given).start(ROUND, 1)[A].shape == (1, 3)
    assert under(fedavg.aggregate).start is svd.start
