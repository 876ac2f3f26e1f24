"""One bad institution, or a bad round, does not end a run."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlora.config.config import from_flat
from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState, kind
from fedlora.runs.run_files import read_records
from fedlora.wire import wire
from server import aggregation, limits, roster, rounds
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


def _line(rejected, updates=0, refused=""):
    aggregation = {"rejected": rejected, **({"refused": refused} if refused else {})}
    return {"round": 4, "asked": 5, "updates": updates, "aggregation": aggregation}


def _check(line, idle, *, all_asked=True, last=False):
    limits.check_progress({**line, "all_asked": all_asked}, idle, last=last)


@pytest.mark.parametrize("rejected", [{"a": "failed"}, {"a": "node-unavailable"}, {}])
def test_a_run_ends_whose_updates_change_nothing(rejected):
    """Institutions are charged for each such round; after the last one there is none to save."""
    line, most = _line(rejected, updates=4), limits.MAX_IDLE_ROUNDS
    for idle in range(most):
        _check(line, idle)
    _check(line, most, last=True)
    with pytest.raises(RunFailed, match="3 rounds in a row changed nothing, here 4 of 5") as failed:
        _check(line, most)
    assert ("others: " in str(failed.value)) == bool(rejected)
    with pytest.raises(RunFailed, match=r"refused: too-large.*training diverged: lower the"):
        _check(_line({}, updates=5, refused="too-large"), most)


@pytest.fixture
def least(monkeypatch):
    """Makes a mean of fewer updates count as none."""
    return lambda number: monkeypatch.setattr(aggregation.Mean, "least_asked", number)


def test_rounds_with_too_few_valid_updates_end_the_run(tiny_config, simulate_run, answering, least):
    answering(_refuse)
    least(4)
    config = tiny_config(**{"federation.rounds": 8})
    with pytest.raises(RunFailed, match="round 3: 3 rounds in a row changed nothing"):
        simulate_run(config)
    records = read_records(Path(config.run_dir))
    assert [record["updates"] > 0 and record["skipped"] for record in records] == [True] * 3
    with pytest.raises(RunFailed, match="round 4: 4 rounds in a row changed nothing"):
        simulate_run(config)  # a process that goes on has one round, not three


@pytest.fixture
def waiting(monkeypatch):
    """Makes a federation of five whose `online` names ``away``, and all from look ``back`` on."""

    def make(away, back, *, least=1, **values):
        looks: list[int] = []
        clock = SimpleNamespace(now=0.0)

        def online(_):
            looks.append(1)
            names = away if len(looks) < back else ("a", "b", "c", "d", "e")
            return {name: node for node, name in enumerate(names, 1)}

        monkeypatch.setattr(Federation, "online", online)
        monkeypatch.setattr(rounds.time, "monotonic", lambda: clock.now)
        monkeypatch.setattr(rounds.time, "sleep", lambda s: setattr(clock, "now", clock.now + s))
        one: Any = object.__new__(Federation)
        deployed = {
            "data.source": "institutions",
            "data.institutions": 5,
            "data.labels": ["x", "y"],
            "federation.timeout": 60.0,
        }
        one.config = from_flat(deployed | values)
        one.aggregation = SimpleNamespace(least_asked=least)
        one.population = SimpleNamespace(size=5)
        one.participations = one.config.federation.rounds
        one.state = SimpleNamespace(round=3, asked={})
        return one, clock

    return make


@pytest.mark.parametrize(("back", "ends"), [(5, False), (99, True)])
@pytest.mark.parametrize("needed", [1, 3])
def test_a_deployment_waits_for_institutions_that_are_away(waiting, needed, back, ends):
    """A round with fewer than it needs is charged, and cannot count."""
    away = ("a", "b", "c")[: needed - 1]
    one, clock = waiting(away, back, least=needed)
    found = one.awaited()
    assert clock.now <= 60.0
    if ends:
        words = f"{needed - 1} institutions are online and take part, and a round needs {needed} "
        with pytest.raises(RunFailed, match=words) as failed:
            limits.check_online(found, one.least, {7: "silent", 8: "silent"})
        assert "of others: silent x 2; resume the run" in str(failed.value)
    else:
        assert len(found) == 5
        limits.check_online(found, one.least, {})


def test_a_round_whose_updates_could_not_count_asks_nobody(
    tiny_config, simulate_run, monkeypatch, caplog, least
):
    """Without Delta the other three have six rounds left, but not two of them at the end."""
    online = Roster.online

    def without_delta(self):
        return {name: node for name, node in online(self).items() if name != "Delta"}

    monkeypatch.setattr(Roster, "online", without_delta)
    monkeypatch.setattr(roster, "NODES_TIMEOUT", 0.0)
    least(2)
    values = {"rounds": 6, "institutions-per-round": 2}
    config = tiny_config(**{f"federation.{key}": value for key, value in values.items()})
    simulate_run(config)
    asked = [record["asked"] for record in read_records(Path(config.run_dir))]
    assert asked == [2] * 4
    assert "the run ends after round 4" in caplog.text


@pytest.fixture
def crash_in_round(tiny_config, simulate_run, monkeypatch):
    """Run until the server dies in a round, after it was charged; go on without an institution."""

    def go(number, missing, **values):
        config = tiny_config(**{"privacy.noise": "secure"}, **values)
        step = Federation.step

        def die(self, orders, outcome):
            if orders.this_round.number == number:
                raise KeyboardInterrupt
            return step(self, orders, outcome)

        monkeypatch.setattr(Federation, "step", die)
        with pytest.raises(KeyboardInterrupt):
            simulate_run(config)
        monkeypatch.setattr(Federation, "step", step)
        monkeypatch.setattr(roster, "NODES_TIMEOUT", 0.0)
        gone, online = missing(Path(config.run_dir)), Roster.online
        monkeypatch.setattr(
            Roster,
            "online",
            lambda self: {name: node for name, node in online(self).items() if name != gone},
        )
        simulate_run(config)
        return json.loads((Path(config.run_dir) / "privacy.json").read_text())

    return go


def test_an_institution_that_was_asked_before_a_crash_and_never_again_stands_in_the_statement(
    crash_in_round,
):
    said = crash_in_round(1, lambda _: "Delta")
    assert set(said["institutions"]) == {"Alpha", "Beta", "Gamma"}
    assert said["without_report"]["Delta"]["rounds_asked"] == 1
    assert all(told["rounds_asked"] == 3 for told in said["institutions"].values())


def test_a_ledger_that_is_gone_after_the_first_order_is_not_made_anew(crash_in_round):
    def lose_a_ledger(run_dir):
        (run_dir / "ledgers" / "Beta.db").unlink()
        return ""

    said = crash_in_round(1, lose_a_ledger)
    assert set(said["institutions"]) == {"Alpha", "Gamma", "Delta"}
    assert said["without_report"]["Beta"]["rounds_asked"] == 1


def test_a_round_that_was_charged_and_never_played_again_stands_in_the_statement(
    crash_in_round, least
):
    """Two of four are asked in each round, each once. One of the second round does not come back,
    so that the round cannot be played again and the run ends."""
    asked = []
    least(2)

    def one_of_the_second_round(run_dir):
        asked.extend(json.loads(line) for line in (run_dir / "orders.jsonl").open())
        return asked[-1]["institutions"][0]

    said = crash_in_round(
        2,
        one_of_the_second_round,
        **{
            "federation.rounds": 2,
            "federation.institutions-per-round": 2,
        },
    )
    first, second = (set(line["institutions"]) for line in asked)
    assert set(said["institutions"]) == first and set(said["without_report"]) == second
    told = {**said["institutions"], **said["without_report"]}
    assert {entry["rounds_asked"] for entry in told.values()} == {1}
