"""One bad institution, or a bad round, does not end a run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fedlora import wire
from fedlora.adapters import AdapterState, kind
from fedlora.errors import Refusal
from fedlora.run_files import read_records
from server import roster
from server.roster import Roster, RunFailed
from server.rounds import Federation


@pytest.fixture
def answering(monkeypatch):
    """Puts ``change(update)`` in the place of Beta's update, in every round, as it leaves."""

    def change_to(change, name="Beta"):
        honest = wire.pack_update

        def pack_update(update):
            return honest(change(update) if name in ("", update.institution) else update)

        monkeypatch.setattr(wire, "pack_update", pack_update)

    return change_to


def test_an_aggregate_beyond_the_limit_changes_nothing_and_the_run_goes_on(
    tiny_config, simulate_run, answering
):
    def loud(update):
        def value(name, tensor):
            return torch.full_like(tensor, 1000.0) if kind(name) in ("A", "B") else tensor

        state = {name: value(name, tensor) for name, tensor in update.adapter.items()}
        return dataclasses.replace(update, adapter=AdapterState(state))

    answering(loud, name="")
    config = tiny_config(**{"federation.strategy": "svd", "federation.rounds": 2})
    simulate_run(config)
    records = read_records(Path(config.run_dir))
    assert [record["skipped"] for record in records] == [True, True]


def _refuse(update):
    raise Refusal("failed", "broken")


def test_a_run_that_asks_a_part_of_the_institutions_outlives_two_fruitless_rounds(
    tiny_config, simulate_run, answering
):
    answering(_refuse, name="")
    config = tiny_config(**{"federation.institutions-per-round": 1, "federation.rounds": 8})
    with pytest.raises(RunFailed, match="round 3: no institution sent a valid update"):
        simulate_run(config)
    records = read_records(Path(config.run_dir))
    assert [record["skipped"] for record in records] == [True] * 3


def test_where_all_were_asked_and_none_answered_the_run_ends_with_its_checkpoint(
    tiny_config, simulate_run, answering
):
    answering(_refuse, name="")
    config = tiny_config()
    with pytest.raises(RunFailed, match="round 1: no institution sent a valid update"):
        simulate_run(config)
    assert list((Path(config.run_dir) / "checkpoints").iterdir())


def test_an_institution_that_was_asked_before_a_crash_and_never_again_stands_in_the_statement(
    tiny_config, simulate_run, monkeypatch
):
    """Delta is charged in round 1; the server dies before its checkpoint, and Delta is gone."""
    config = tiny_config(**{"privacy.noise": "secure"})
    step = Federation.step

    def die(self, orders, outcome):
        raise KeyboardInterrupt

    monkeypatch.setattr(Federation, "step", die)
    with pytest.raises(KeyboardInterrupt):
        simulate_run(config)
    monkeypatch.setattr(Federation, "step", step)
    monkeypatch.setattr(roster, "NODES_TIMEOUT", 0.0)
    online = Roster.online
    monkeypatch.setattr(
        Roster,
        "online",
        lambda self: {name: node for name, node in online(self).items() if name != "Delta"},
    )
    simulate_run(config)
    said = json.loads((Path(config.run_dir) / "privacy.json").read_text())
    assert set(said["institutions"]) == {"Alpha", "Beta", "Gamma"}
    assert said["without_report"]["Delta"]["rounds_asked"] == 1
    assert all(told["rounds_asked"] == 3 for told in said["institutions"].values())
