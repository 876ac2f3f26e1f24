"""Who is let into a run, and under which name."""

import json

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

import fedlora
from fedlora import config, wire
from fedlora.messages import Hello, Query
from fedlora.run_files import NODES, SIZES
from server import roster
from server.roster import Roster, RunFailed
from simulation.engines.inline import InlineGrid

DEPLOYED = {"data.source": "institutions", "data.institutions": 3, "data.labels": '["x", "y"]'}


class Nodes(InlineGrid):
    """Nodes 1, 2, ... that call themselves what they are told to; who is away is not there."""

    def __init__(self, *names, sizes=None):
        app, self.names, self.asked = ClientApp(), list(names), []

        @app.query()
        def hello(message, context):
            self.asked.append(context.node_id)
            name = self.names[context.node_id - 1]
            size = (sizes or {}).get(name, 0)
            said = Hello(
                institution=name, version=fedlora.__version__, fits=True, rank=8, size=size
            )
            return Message(wire.pack_hello(said), reply_to=message)

        super().__init__(app, len(names), {})

    def get_node_ids(self):
        return [node for node, name in enumerate(self.names, 1) if name]


@pytest.fixture
def register(tmp_path):
    """Write down whose keys the nodes have."""
    return lambda **nodes: (tmp_path / NODES).write_text(
        json.dumps({str(node): name for name, node in nodes.items()})
    )


@pytest.fixture
def made(tmp_path):
    """The roster of a run of a deployment."""

    def make(grid, **values):
        values = {**DEPLOYED, "run-dir": str(tmp_path / "run"), **values}
        query = Query(run="0", first=True, participations=1)
        return Roster(grid, config.from_flat(values), query)

    return make


def test_a_node_takes_part_under_the_name_of_its_key_and_no_other(made, register, caplog):
    register(a=2, b=3, c=1)
    one = made(Nodes("a", "a", "b"))  # node 1 has the key of c, and says hello first
    assert one.online() == {"a": 2, "b": 3}
    assert one.refused == {1: "wrong-name"}
    assert "it calls itself a, but has the key of c" in caplog.text


@pytest.mark.parametrize("content", [None, "", "[1]", '{"x": "a"}', "{"])
def test_without_a_sound_file_nobody_takes_part(made, tmp_path, monkeypatch, content):
    monkeypatch.setattr(roster, "NODES_TIMEOUT", 0.0)
    monkeypatch.setattr(roster.time, "sleep", lambda _: None)
    if content is not None:
        (tmp_path / NODES).write_text(content)
    grid = Nodes("a", "b")
    with pytest.raises(RunFailed, match=r"0 institutions are ready.*not-registered x 2"):
        made(grid).wait(2)
    assert not grid.asked


def test_a_node_that_is_not_registered_is_asked_nothing_until_it_is(made, register, caplog):
    register(a=1)
    grid = Nodes("a", "b")
    one = made(grid)
    assert one.online() == one.online() == {"a": 1}
    assert grid.asked == [1] and not one.refused
    assert caplog.text.count("node 2: not-registered") == 1
    register(a=1, b=2)
    assert one.online() == {"a": 1, "b": 2}


def test_whoever_takes_no_part_is_named_with_the_reason(made, register, tmp_path):
    register(a=1, b=2, c=3)
    (tmp_path / SIZES).write_text(json.dumps({"a": 64, "c": 64}))
    grid = Nodes("a", "b", "x", "d")  # b has no size, the settings of c have another name
    one = made(grid, **{"federation.weighting": "public-size"})
    assert one.online() == {"a": 1}
    assert one.left_out == {2: "no-size", 3: "wrong-name", 4: "not-registered"}


def test_a_new_key_takes_the_place_of_the_old_one_in_mid_run(made, register):
    grid = Nodes("a", "b", "")
    register(a=1, b=2)
    one = made(grid)
    assert one.online() == {"a": 1, "b": 2}
    register(a=3, b=2)  # the operator has put another a.pub in place
    grid.names = ["a", "b", "a"]
    assert one.online() == {"a": 3, "b": 2}
    assert not one.refused


def test_whose_key_is_taken_off_is_out_at_once(made, register):
    register(a=1, b=2)
    one = made(Nodes("a", "b"))
    assert one.online() == {"a": 1, "b": 2}
    register(b=2)
    assert one.online() == {"b": 2}


@pytest.fixture
def clock(monkeypatch):
    """The roster's time, which passes as the test says."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(roster.time, "monotonic", lambda: Clock.now)
    return Clock


def test_whoever_did_not_take_part_is_asked_again_after_a_while(made, register, clock, caplog):
    register(a=1, b=2)
    grid = Nodes("a", "x")  # the settings of b have another name
    one = made(grid)
    asked = lambda: len(grid.asked)  # noqa: E731
    assert one.online() == one.online() == {"a": 1} and asked() == 2
    for pause in (60.0, 120.0, 240.0):
        clock.now += pause - 1
        assert one.online() == {"a": 1}
        before = asked()
        clock.now += 1
        assert one.online() == {"a": 1} and asked() == before + 1
    assert one.refused == {2: "wrong-name"} and caplog.text.count("wrong-name") == 1
    grid.names = ["a", "b"]  # mended
    clock.now += 480.0
    assert one.online() == {"a": 1, "b": 2} and not one.refused


def test_who_leaves_orders_without_an_answer_is_asked_no_more_until_it_answers(
    made, register, clock, caplog
):
    register(a=1, b=2)
    one = made(Nodes("a", "b"))
    assert one.online() == {"a": 1, "b": 2}
    one.note({"b": "message-lost"}, ["a", "b"])
    one.note({"b": "timed-out"}, ["a", "b"])  # an answer, although a refusal
    one.note({"b": "no-answer"}, ["a", "b"])
    assert one.online() == {"a": 1, "b": 2}
    one.note({"b": "message-lost"}, ["a", "b"])
    assert one.online() == {"a": 1} and one.refused == {2: "silent"}
    assert "b left 2 orders in a row without an answer" in caplog.text
    clock.now += 60.0
    assert one.online() == {"a": 1, "b": 2}
    one.note({"b": "message-lost"}, ["a", "b"])  # once more: it is out for twice as long
    clock.now += 60.0
    assert one.online() == {"a": 1}
    clock.now += 60.0
    assert one.online() == {"a": 1, "b": 2}
    one.note({}, ["a", "b"])
    one.note({"b": "message-lost"}, ["a", "b"])
    assert one.online() == {"a": 1, "b": 2}


def test_a_simulation_needs_no_registration(made):
    one = made(Nodes("a", "b", "a"), **{"data.source": "package:edgartools", "data.labels": "[]"})
    assert one.online() == {"a": 1, "b": 2}
    assert one.refused == {3: "name-taken"}


def test_under_secure_aggregation_the_roster_has_each_size_class():
    values = {
        "privacy.trust": "secure-aggregation",
        "privacy.honest": 2,
        "privacy.delta": 1e-5,
        "training.sample-rate": 0.2,
        "federation.weighting": "public-size",
    }
    grid = Nodes("a", "b", "c", "d", sizes={"a": 64, "b": 100, "c": 0, "d": 1})
    query = Query(run="0", first=True, participations=1)
    one = Roster(grid, config.from_flat(values), query)
    assert one.online() == {"a": 1, "d": 4}
    assert one.refused == {2: "invalid-size", 3: "invalid-size"}
    assert one.sizes() == {"a": 64.0, "d": 1.0}
