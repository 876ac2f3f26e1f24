"""A request for a message waits for it, and a message waits for its objects."""

import contextlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message, ObjectTree
from flwr.proto.node_pb2 import Node

from deployment import arrivals

NODE, OTHER, RUN = ("node", 1), ("node", 2), ("run", 1)


@pytest.fixture
def kept():
    return arrivals.Arrivals()


def test_a_bell_rings_when_the_last_object_has_arrived(kept):
    bell = kept.bell(NODE)
    kept.announce(NODE, "order", ["a", "b"])
    kept.arrive("b")
    assert not bell.is_set() and kept.incomplete(NODE) == {"order"}
    kept.arrive("a")
    assert bell.is_set() and not kept.incomplete(NODE)


def test_a_message_whose_objects_are_all_there_rings_at_once(kept):
    bell, other = kept.bell(RUN), kept.bell(NODE)
    kept.announce(RUN, "order", [])
    assert bell.is_set() and not other.is_set() and not kept.incomplete(RUN)


def test_an_object_counts_for_every_message_that_needs_it(kept):
    bells = {receiver: kept.bell(receiver) for receiver in (NODE, OTHER, RUN)}
    kept.announce(NODE, "first", ["shared", "own"])
    kept.announce(OTHER, "second", ["shared", "another"])
    kept.arrive("own")
    kept.arrive("shared")
    assert [bell.is_set() for bell in bells.values()] == [True, False, False]
    assert kept.incomplete(OTHER) == {"second"}


def test_one_order_in_two_runs_is_two_messages(kept):
    kept.announce(RUN, "order", ["a"])
    kept.announce(("run", 2), "order", ["b"])
    kept.arrive("b")
    assert kept.incomplete(RUN) == {"order"} and not kept.incomplete(("run", 2))


def test_who_asks_again_ends_an_earlier_request(kept):
    first = kept.bell(NODE)
    second = kept.bell(NODE)
    assert first.is_set() and not second.is_set()


def test_objects_that_never_arrive_hold_nobody_up_for_ever(kept, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(arrivals.time, "monotonic", lambda: now[0])
    kept.announce(NODE, "order", ["a", "b"])
    kept.announce(OTHER, "other", ["b"])
    now[0] += arrivals.STALL_SECONDS
    assert kept.incomplete(NODE) and kept.incomplete(OTHER)
    kept.arrive("a")  # more time for the first
    now[0] += arrivals.STALL_SECONDS
    assert kept.incomplete(NODE) and not kept.incomplete(OTHER)
    now[0] += 1
    assert not kept.incomplete(NODE)
    kept.arrive("b")  # too late, and nobody's
    assert not any(vars(kept)[name] for name in ("_expected", "_messages", "_needed_by"))


def test_no_more_requests_wait_than_there_are_threads(monkeypatch):
    monkeypatch.setattr(arrivals, "MAX_WAITING", 1)
    monkeypatch.setattr(arrivals, "SECONDS", 3600.0)
    waiting = arrivals.Waiting(contextlib.nullcontext)
    pull = waiting.order_pull(lambda **_: PullMessagesResponse())
    ended = threading.Event()

    def ask(node):
        pull(PullMessagesRequest(node=Node(node_id=node)), None, None)

    def first():
        ask(1)
        ended.set()

    threading.Thread(target=first, daemon=True).start()
    deadline = time.monotonic() + 30
    while waiting._places._value:  # until it waits
        assert time.monotonic() < deadline
    second = threading.Thread(target=ask, args=(2,), daemon=True)
    second.start()
    second.join(30)  # a wait would take an hour
    assert not second.is_alive() and not ended.is_set()
    waiting._arrivals.announce(NODE, "order", [])
    assert ended.wait(30)


def test_the_superlinks_container_has_room_for_every_wait():
    compose = Path(__file__).resolve().parents[2] / "docker-compose.yml"
    room = yaml.safe_load(compose.read_text())["services"]["superlink"]["pids_limit"]
    assert room >= arrivals.MAX_WAITING + 40 + 30  # anyio's threads, and the other ones


def test_nothing_is_stored_between_the_look_for_incomplete_messages_and_the_pull():
    waiting, stored, pushes = arrivals.Waiting(contextlib.nullcontext), threading.Event(), []

    def store(*_):
        stored.set()
        return SimpleNamespace(objects_to_push=["large"])

    def look(**_):
        message = Message()
        message.metadata.dst_node_id, message.metadata.message_id = 1, "order"
        tree = ObjectTree(object_id="root", children=[ObjectTree(object_id="large")])
        request = SimpleNamespace(messages_list=[message], message_object_trees=[tree])
        push = waiting.order_push(store)
        pushes.append(threading.Thread(target=push, args=(request, None, None)))
        pushes[0].start()
        assert not stored.wait(0.2)
        return PullMessagesResponse(messages_list=[message])

    waiting.order_pull(look)(PullMessagesRequest(node=Node(node_id=1)), None, None)
    pushes[0].join(30)
    assert stored.is_set() and waiting._arrivals.incomplete(NODE) == {"order"}


@pytest.mark.parametrize("fails", [True, False])
def test_a_push_that_fails_ends_no_wait_and_holds_nobody_up(fails):
    waiting = arrivals.Waiting(contextlib.nullcontext)
    message = Message()
    message.metadata.run_id, message.metadata.reply_to_message_id = 1, "order"
    request = SimpleNamespace(messages_list=[message], message_object_trees=[ObjectTree()])

    def store(request, state):
        if fails:
            raise ValueError("no")
        return SimpleNamespace(objects_to_push=[])  # all objects are there

    bell = waiting._arrivals.bell(RUN)
    with pytest.raises(ValueError, match="no") if fails else contextlib.nullcontext():
        waiting.reply_push(store)(request, None)
    assert bell.is_set() != fails and not waiting._arrivals.incomplete(RUN)
