"""Flower still has, and still uses, each private name that is assigned to."""

import inspect
import time
from types import SimpleNamespace

import httpx
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import array
from flwr.common.serde import message_to_proto
from flwr.supercore import sql_mixin
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid
from flwr.superlink.routers.fleet import router
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode import start_client_internal

from fedlora import flower_internals


def _restore(monkeypatch, owner, *names):
    """Put Flower's own values back after the test; fail where a name is gone."""
    for name in names:
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.fixture
def identity(monkeypatch):
    _restore(monkeypatch, TaskIdentity, "_task_id", "_run_id", "_node_id")


def test_a_message_names_the_run_and_node_that_were_set(identity):
    flower_internals.set_identity(3, 4, 5)
    metadata = Message(RecordDict(), 7, "train").metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.dst_node_id) == (4, 5, 7)


def test_a_reply_names_the_message_id_that_was_set(identity):
    flower_internals.set_identity(1, 1, 1)
    message = Message(RecordDict(), 7, "train")
    known = flower_internals.set_message_id(message)
    assert known and Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == known


def test_a_supernode_states_no_time_of_its_messages(monkeypatch):
    from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

    name = "get_message_processing_duration"
    _restore(monkeypatch, InMemoryNodeState, name)
    assert name in inspect.getsource(start_client_internal)
    state = InMemoryNodeState(object_store=None)
    monkeypatch.setattr(state, "_cleanup_old_message_times", lambda: None)  # of unknown messages
    state.record_message_processing_start("m")
    time.sleep(0.01)
    state.record_message_processing_end("m")
    assert state.get_message_processing_duration("m") > 0
    flower_internals.hide_processing_time()
    assert state.get_message_processing_duration("m") == 0


def test_the_superlink_s_route_uses_the_handler_that_is_wrapped(monkeypatch):
    _restore(monkeypatch, fleet_handlers, "push_messages")
    flower_internals.wrap_node_messages(lambda push: lambda request, state: ("wrapped", push))
    said, inner = router.fleet_push_messages(request=None, state=None)
    assert said == "wrapped" and callable(inner)


def test_a_connection_of_the_superlink_waits_as_long_as_was_set(monkeypatch):
    import sqlite3

    _restore(monkeypatch, sql_mixin, "SQLITE_PRAGMAS")
    flower_internals.set_database_wait(1234)
    connection = sqlite3.connect(":memory:")
    sql_mixin._set_sqlite_pragmas(connection, None)
    assert connection.execute("PRAGMA busy_timeout").fetchone() == (1234,)


class FakeRuntime:
    """Serves the replies of nodes from memory, and notes which ones are confirmed."""

    def __init__(self, replies):
        self.objects, self.replies, self.confirmed = {}, replies, []

    def PullMessages(self, request):  # noqa: N802
        return SimpleNamespace(
            messages_list=[message_to_proto(reply) for reply in self.replies],
            message_object_trees=[get_object_tree(reply) for reply in self.replies],
        )

    def PullObject(self, request):  # noqa: N802
        content = self.objects[request.object_id]
        return SimpleNamespace(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request):  # noqa: N802
        self.confirmed.append(request.message_object_id)


def _replies(identity, *data):
    """A reply of each node with one array, a SuperLink that holds them, and Flower's Grid."""
    flower_internals.set_identity(1, 1, 1)
    replies = []
    for node, content in enumerate(data, 1):
        order = Message(RecordDict(), node, "train", ttl=60.0)
        flower_internals.set_message_id(order)
        array = Array("uint8", (len(content),), "safetensors", content)
        reply = Message(RecordDict({"adapter": ArrayRecord({"a": array})}), reply_to=order)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        replies.append(reply)
    runtime = FakeRuntime(replies)
    for reply in replies:
        runtime.objects |= {
            key: value.deflate() for key, value in get_all_nested_objects(reply).items()
        }
    grid = http_grid.HttpGrid(token="x")
    grid._run, grid._client = Run.create_empty(1), runtime
    return replies, runtime, grid


@pytest.fixture
def streaming(identity, monkeypatch):
    """Flower's Grid hands out replies one by one; pieces of arrays have four bytes."""
    _restore(monkeypatch, http_grid.HttpGrid, "pull_messages")
    monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 4)
    flower_internals.stream_replies(10_000, 5.0)


def _only_array(message):
    (found,) = message.content["adapter"].values()
    return found


def test_replies_are_pulled_one_by_one(identity, streaming):
    sent, runtime, grid = _replies(identity, b"abcdefghij", b"aaaaaaaaaaaaaa", b"abc")
    came = []
    for message in grid.pull_messages(["1", "2", "3"]):
        came.append(message)
        assert len(runtime.confirmed) == len(came)  # the next one has not been pulled
    for reply, message in zip(sent, came, strict=True):
        assert message.metadata.message_id == reply.metadata.message_id
        mine, theirs = _only_array(message), _only_array(reply)
        assert bytes(mine.data) == theirs.data
        assert (mine.dtype, mine.shape, mine.stype) == (theirs.dtype, theirs.shape, theirs.stype)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda objects, key: objects.update({key: objects[key].replace(b"Array ", b"Other ")}),
        lambda objects, key: objects.update({key: objects[key].replace(b"[0,", b"[7,")}),
        lambda objects, key: objects.update(
            {key: objects[key].replace(b"[0", b"[" + b"0, " * 3000 + b"0")}
        ),
        lambda objects, key: objects.update({key: objects[key] + bytes(20_000)}),
    ],
    ids=["another-type", "no-such-piece", "a-piece-thousands-of-times", "beyond-the-bound"],
)
def test_a_reply_that_cannot_be_read_is_an_error_and_the_others_arrive(identity, streaming, spoil):
    sent, runtime, grid = _replies(identity, b"abcdefghij", b"abcdefgh")
    spoil(runtime.objects, _only_array(sent[0]).object_id)
    bad, good = grid.pull_messages(["1", "2"])
    assert bad.has_error() and bad.metadata.reply_to_message_id == (
        sent[0].metadata.reply_to_message_id
    )
    assert bytes(_only_array(good).data) == b"abcdefgh"
    assert runtime.confirmed == [sent[1].metadata.message_id]


@pytest.mark.parametrize("field", ["src_node_id", "reply_to_message_id"])
def test_a_reply_in_another_nodes_name_or_to_its_order_is_refused(identity, streaming, field):
    """The SuperLink has checked what stands beside the message, not what the message says."""
    _, runtime, grid = _replies(identity, b"abcdefghij", b"abcdefgh")
    honest = runtime.PullMessages

    def changed(request):
        response = honest(request)
        checked = response.messages_list[0].metadata
        setattr(checked, field, 77 if field == "src_node_id" else "another order")
        return response

    runtime.PullMessages = changed
    bad, good = grid.pull_messages(["1", "2"])
    assert bad.has_error() and bytes(_only_array(good).data) == b"abcdefgh"
    assert len(runtime.confirmed) == 1


@pytest.mark.parametrize("bound", ["one object", "the reply"])
def test_a_node_that_stops_sending_its_reply_does_not_hold_up_the_others(
    identity, streaming, monkeypatch, bound
):
    """Flower waits 500 times up to ten seconds for an object that was announced."""
    if bound == "one object":
        monkeypatch.setattr(flower_internals, "MAX_STALL", 3.0)
    else:
        flower_internals.stream_replies(10_000, 3.0)
    sent, runtime, grid = _replies(identity, b"abcdefghij", b"abcdefgh")
    missing = _only_array(sent[0]).object_id
    honest, asked = runtime.PullObject, []

    def unfinished(request):
        if request.object_id != missing:
            return honest(request)
        asked.append(request.object_id)
        assert len(asked) < 50
        return SimpleNamespace(object_found=True, object_available=False, object_content=b"")

    runtime.PullObject = unfinished
    bad, good = grid.pull_messages(["1", "2"])
    assert bad.has_error() and bytes(_only_array(good).data) == b"abcdefgh"
    assert len(asked) > 1 and runtime.confirmed == [sent[1].metadata.message_id]


def test_an_object_that_arrives_late_is_waited_for(identity, streaming):
    sent, runtime, grid = _replies(identity, b"abcdefghij")
    late = _only_array(sent[0]).object_id
    honest, asked = runtime.PullObject, []

    def slow(request):
        asked.append(request.object_id)
        if asked.count(late) == 1 and request.object_id == late:
            return SimpleNamespace(object_found=True, object_available=False, object_content=b"")
        return honest(request)

    runtime.PullObject = slow
    (good,) = grid.pull_messages(["1"])
    assert bytes(_only_array(good).data) == b"abcdefghij" and asked.count(late) == 2


def test_a_reply_whose_parts_arrive_slowly_ends_at_its_deadline(identity, streaming):
    flower_internals.stream_replies(10_000, 0.3)  # the bounds only
    _, runtime, grid = _replies(identity, bytes(range(200)))
    honest, asked = runtime.PullObject, []

    def slow(request):
        asked.append(request.object_id)
        time.sleep(0.1)
        return honest(request)

    runtime.PullObject = slow
    (bad,) = grid.pull_messages(["1"])
    assert bad.has_error() and len(asked) < 10 and not runtime.confirmed


def test_a_superlink_that_does_not_answer_is_no_fault_of_a_reply(identity, streaming):
    _, runtime, grid = _replies(identity, b"abcdefghij")

    def gone(request):
        raise httpx.ConnectError("gone")

    runtime.PullObject = gone
    with pytest.raises(httpx.ConnectError):
        list(grid.pull_messages(["1"]))
