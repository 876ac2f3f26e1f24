"""A request for a message waits for it, and a message waits for its objects."""

import threading

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
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
    now[0] += arrivals.SENDING_SECONDS
    assert kept.incomplete(NODE) and kept.incomplete(OTHER)
    now[0] += 1
    assert not kept.incomplete(NODE) and not kept.incomplete(OTHER)
    kept.arrive("a")  # too late, and nobody's
    assert not any(vars(kept)[name] for name in ("_expected", "_messages", "_needed_by"))


def test_no_more_requests_wait_than_there_are_threads(monkeypatch):
    monkeypatch.setattr(arrivals, "MAX_WAITING", 1)
    monkeypatch.setattr(arrivals, "SECONDS", 3600.0)
    allowed = []
    waiting = arrivals.Waiting(allowed.append)
    pull = waiting.order_pull(lambda **_: PullMessagesResponse())
    ended = threading.Event()

    def ask(node):
        pull(PullMessagesRequest(node=Node(node_id=node)), None, None)

    def first():
        ask(1)
        ended.set()

    threading.Thread(target=first, daemon=True).start()
    while waiting._places._value:  # until it waits
        pass
    ask(2)  # would wait an hour
    assert allowed == [1] and not ended.is_set()
    waiting._arrivals.announce(NODE, "order", [])
    assert ended.wait(30)
