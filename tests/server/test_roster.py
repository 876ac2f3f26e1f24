"""Who is let into a run, and under which name."""

import json
from typing import ClassVar

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

import fedlora
from fedlora.config import config
from fedlora.errors import InputError
from fedlora.runs.run_files import NODES, SIZES
from fedlora.wire import wire
from fedlora.wire.messages import Hello, Query
from server import roster
from server.roster import Roster, RunFailed
from simulation.engines.inline import InlineGrid

DEPLOYED = {"data.source": "institutions", "data.institutions": 3, "data.labels": '["x", "y"]'}
SIMULATED = {"data.source": "package:edgartools", "data.labels": "[]"}


class Nodes(InlineGrid):
    """Nodes 1, 2, ... that call themselves what they are told to; who is away is not there.

    Those in ``refusing`` answer with the code there.
    """

    def __init__(self, *names, sizes=None):
        app, self.names, self.asked, self.refusing = ClientApp(), list(names), [], {}
        self.version, self.codes = fedlora.__version__, {}

        @app.query()
        def hello(message, context):
            self.asked.append(context.node_id)
            name = self.names[context.node_id - 1]
            if name in self.refusing:
                return Message(wire.pack_refusal(self.refusing[name]), reply_to=message)
            size = (sizes or {}).get(name, 0)
            said = Hello(
                institution=name,
                version=self.version,
                fits=True,
                size=size,
                code=self.codes.get(name, ""),
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


@pytest.fixture
def clock(monkeypatch):
    """The roster's time, which passes as the test says, and while the roster sleeps.

    ``then`` has what happens as soon as a time has come.
    """

    class Clock:
        now = 0.0
        then: ClassVar = {}

        @classmethod
        def sleep(cls, seconds):
            cls.now += seconds
            for at in [at for at in cls.then if at <= cls.now]:
                cls.then.pop(at)()

    monkeypatch.setattr(roster.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(roster.time, "sleep", Clock.sleep)
    return Clock


def test_a_node_takes_part_under_the_name_of_its_key_and_no_other(made, register, caplog):
    register(a=2, b=3, c=1)
    one = made(Nodes("a", "a", "b"))  # node 1 has the key of c, and says hello first
    assert one.online() == {"a": 2, "b": 3}
    assert one.refused == {1: "wrong-name"}
    assert "it calls itself a, but has the key of c" in caplog.text


@pytest.mark.parametrize("content", [None, "", "[1]", '{"x": "a"}', "{"])
def test_without_a_sound_file_nobody_takes_part(made, tmp_path, clock, content):
    if content is not None:
        (tmp_path / NODES).write_text(content)
    grid = Nodes("a", "b")
    with pytest.raises(RunFailed, match=r"0 institutions are ready.*not-registered x 2"):
        made(grid).wait(2, 1)
    assert not grid.asked


def test_who_runs_another_version_takes_no_part(made, register):
    register(a=1)
    grid = Nodes("a")
    grid.version = "0.0.1"
    one = made(grid)
    assert one.online() == {} and one.left_out == {1: "version-mismatch"}


def test_whose_key_is_taken_off_is_out_at_once(made, register):
    register(a=1, b=2)
    one = made(Nodes("a", "b"))
    assert one.online() == {"a": 1, "b": 2}
    register(b=2)
    assert one.online() == {"b": 2}


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


def test_a_deployment_waits_longer_than_a_minute_only_while_too_few_are_ready(
    made, register, clock, caplog
):
    """After a cut the SuperLink lets a node in again when its last sign of life is a minute old."""
    register(a=1, b=2, c=3)
    grid = Nodes("a", "", "")
    clock.then[300] = lambda: grid.names.__setitem__(1, "b")
    one = made(grid)
    one.wait(3, 2)
    assert 300 <= clock.now <= 310 and len(one) == 2
    assert caplog.text.count("1 institutions are ready, and 2 are needed; waiting") == 1
    clock.now = 0.0
    made(grid).wait(3, 2)
    assert 60 <= clock.now <= 62
    clock.now, grid.names[2] = 0.0, "c"
    made(grid).wait(3, 2)
    assert clock.now == 0.0


def test_a_claim_beyond_the_operators_bound_ends_no_secure_run(made, register, tmp_path):
    """Delta must be below one in the number of records: 2^40 of them would refuse any run."""
    values = {
        "privacy.trust": "secure-aggregation",
        "privacy.honest": 3,
        "privacy.delta": 1e-5,
        "training.batch-size": 0.2,
        "federation.weighting": "public-size",
    }
    register(a=1, b=2, c=3)
    one = made(Nodes("a", "b", "c", sizes={"a": 2**40, "b": 1024, "c": 1024}), **values)
    (tmp_path / SIZES).write_text(json.dumps({"a": 2000, "b": 2000, "c": 2000}))
    assert len(one.online()) == 3
    one.check_noise(30)
    (tmp_path / SIZES).write_text(json.dumps({"a": 2**41, "b": 2000, "c": 2000}))
    one.online()
    with pytest.raises(InputError, match=r"privacy\.delta"):
        one.check_noise(30)
