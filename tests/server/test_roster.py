"""Who is let into a run, and under which name."""

import json
from typing import ClassVar

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

import fedlora
from fedlora.config import config
from fedlora.errors import InputError
from fedlora.runs import run_files
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
    register(a=1, b=2, c=3, e=5)
    assert one.online() == {"a": 1}
    codes = {"b": "no-size", "c": "wrong-name", "e": "offline"}
    assert one.absent() == {"a": "offline", **codes}  # a may have gone since


def test_who_runs_another_version_takes_no_part(made, register):
    register(a=1)
    grid = Nodes("a")
    grid.version = "0.0.1"
    one = made(grid)
    assert one.online() == {} and one.left_out == {1: "version-mismatch"}


def test_who_runs_other_code_of_the_version_is_named_once(made, register, caplog):
    register(a=1, b=2)
    grid = Nodes("a", "b")
    grid.codes = {"a": run_files.code(), "b": "f" * 64}
    one = made(grid)
    assert one.online() == one.online() == {"a": 1, "b": 2}
    (said,) = [r.getMessage() for r in caplog.records if "other code" in r.getMessage()]
    assert "server's: b;" in said


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


def test_where_a_setup_needs_all_institutions_a_deployment_waits_for_all(made, register, clock):
    register(a=1, b=2, c=3)
    grid = Nodes("a", "b", "")
    clock.then[300] = lambda: grid.names.__setitem__(2, "c")
    one = made(grid)
    one.wait(3, 2, all_needed=True)
    assert 300 <= clock.now <= 310 and len(one) == 3
    clock.now, grid.names[2] = 0.0, ""
    made(grid).wait(3, 2, all_needed=True)  # the setup names who is missing
    assert 600 <= clock.now <= 602


@pytest.mark.parametrize("code", ["ledger-locked", "timed-out"])
def test_a_refusal_that_may_pass_is_no_reply_while_too_few_are_ready(made, register, clock, code):
    register(a=1, b=2)
    grid = Nodes("a", "b")
    grid.refusing = {"a": code, "b": code}  # during a backup, say
    clock.then[30] = grid.refusing.clear
    one = made(grid)
    one.wait(2, 2)
    assert clock.now == 60.0 and len(one) == 2  # when they are asked again
    clock.now, grid.refusing = 0.0, {"b": code}
    made(grid).wait(2, 1)
    assert clock.now == 0.0


@pytest.mark.parametrize(("code", "after"), [("ledger-locked", 600), ("epsilon-too-large", 0)])
def test_where_all_refuse_a_run_ends_with_their_reasons(made, register, clock, code, after):
    register(a=1, b=2)
    grid = Nodes("a", "b")
    grid.refusing = {"a": code, "b": code}
    words = rf"0 institutions are ready and 2 refuse .*\({code} x 2\); a round needs 1 \("
    with pytest.raises(RunFailed, match=words):
        made(grid).wait(2, 1)
    assert after <= clock.now <= after + 2


@pytest.mark.parametrize(("names", "after"), [(("a", ""), 60), (("a", "b"), 0)])
def test_a_simulation_waits_a_minute_at_most(made, clock, names, after):
    grid = Nodes(*names)
    grid.refusing = {"a": "ledger-locked", "b": "ledger-locked"}
    with pytest.raises(RunFailed, match="0 institutions are ready"):
        made(grid, **SIMULATED).wait(2, 1)
    assert after <= clock.now <= after + 2


def test_a_simulation_needs_no_registration(made):
    one = made(Nodes("a", "b", "a"), **SIMULATED)
    assert one.online() == {"a": 1, "b": 2}
    assert one.refused == {3: "name-taken"}


def test_under_secure_aggregation_the_roster_has_each_size_class():
    values = {
        "privacy.trust": "secure-aggregation",
        "privacy.honest": 2,
        "privacy.colluding": 1,
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


def test_a_claim_beyond_the_operators_bound_ends_no_secure_run(made, register, tmp_path):
    """Delta must be below one in the number of records: 2^40 of them would refuse any run."""
    values = {
        "privacy.trust": "secure-aggregation",
        "privacy.protocol": "full",
        "privacy.honest": 3,
        "privacy.delta": 1e-5,
        "training.sample-rate": 0.2,
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
