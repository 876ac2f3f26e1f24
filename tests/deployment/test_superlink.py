"""Our SuperLink beside Flower's: messages in another's name, requests that wait."""

import contextlib
import functools
import sqlite3
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

import pytest
from fastapi import HTTPException
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore import sql_mixin
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.control import control_handlers
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from deployment import arrivals, superlink, superlink_client

CONTENT = RecordDict({"x": ConfigRecord({"y": 1})})


@pytest.fixture
def link(monkeypatch):
    """A SuperLink's state: nodes a and c, and a run that runs."""
    store = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
    state = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), store).state()
    nodes = [state.create_node("", "", name.encode(), 30.0) for name in "ac"]
    for node in nodes:
        assert state.activate_node(node, 30.0)
    run = state.create_run("", "", "", {}, NOOP_FEDERATION_ID, None, "", TaskType.SERVER_APP)
    (found,) = state.get_run_info(run_ids=[run])
    assert state.claim_task(found.primary_task_id) and state.activate_task(found.primary_task_id)
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    TaskIdentity.run_id = run
    return SimpleNamespace(state=state, run=run, a=nodes[0], c=nodes[1])


def _pushed(push, state, node, message):
    message.metadata.__dict__["_message_id"] = message.object_id
    request = PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[message_to_proto(remove_content_from_message(message))],
        message_object_trees=[get_object_tree(message)],
    )
    return push(request=request, state=state)


def _order(link, node):
    """An order to a node, as the ServerApp sends it."""
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    order = Message(CONTENT, node, "train", ttl=600)
    order.metadata.__dict__["_message_id"] = order.object_id
    assert link.state.store_message_ins(order)
    return order


def _answer(order, node):
    TaskIdentity.node_id = node
    return Message(CONTENT, reply_to=order)


def _forged(link):
    """What c sends if it knows a's node id, and the id of an order to a."""
    answer = _answer(_order(link, link.a), link.a)
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    return answer, Message(CONTENT, link.a, "train", ttl=600)


def test_flower_itself_takes_an_answer_and_an_order_in_anothers_name(link):
    """If this fails, Flower has mended it, and deployment/superlink.py can go."""
    answer, order = _forged(link)
    push = fleet_handlers.push_messages
    _pushed(push, link.state, link.c, answer)
    assert link.state.num_message_res() == 1
    _pushed(push, link.state, link.c, order)
    ids = {m.metadata.message_id for m in link.state.get_message_ins(link.a, limit=None)}
    assert order.object_id in ids


def test_ours_takes_neither_and_takes_a_nodes_own_answer(link):
    push = superlink.own_answers(fleet_handlers.push_messages)
    for forged in _forged(link):
        with pytest.raises(HTTPException) as refused:
            _pushed(push, link.state, link.c, forged)
        assert refused.value.status_code == 403
    assert link.state.num_message_res() == 0 and link.state.num_message_ins() == 1
    for count in (0, 2):
        request = PushMessagesRequest(
            node=Node(node_id=link.c),
            messages_list=[message_to_proto(remove_content_from_message(forged))] * count,
            message_object_trees=[get_object_tree(forged)] * count,
        )
        with pytest.raises(HTTPException, match="one message at a time"):
            push(request=request, state=link.state)
    _pushed(push, link.state, link.c, _answer(_order(link, link.c), link.c))
    assert link.state.num_message_res() == 1


def test_a_node_sends_few_lists_of_objects_for_one_order(link):
    """Flower notes each object of a list, while no other request can write."""
    noted = []

    def push(*, request, state):
        noted.append(request)

    checked = superlink.own_answers(push)
    order, other = _order(link, link.c), _order(link, link.c)
    proto = message_to_proto(remove_content_from_message(_answer(order, link.c)))

    def request(number, of=proto):
        return PushMessagesRequest(
            node=Node(node_id=link.c),
            messages_list=[of],
            message_object_trees=[ObjectTree(object_id=f"{number}")],
        )

    for number in (*range(superlink.MAX_LISTS), 0):  # the same one again is a retry
        checked(request=request(number), state=link.state)
    for _ in range(3):
        with pytest.raises(HTTPException) as refused:
            checked(request=request("more"), state=link.state)
    assert refused.value.status_code == 403 and len(noted) == superlink.MAX_LISTS + 1
    again = message_to_proto(remove_content_from_message(_answer(other, link.c)))
    checked(request=request("more", again), state=link.state)


class Bell(threading.Event):
    """An event whose wait is noted, and during which something happens."""

    meanwhile: ClassVar[list[Callable[[], object]]] = []
    waited: ClassVar[list[bool]] = []

    def wait(self, timeout=None):
        assert timeout == arrivals.SECONDS
        if Bell.meanwhile:
            Bell.meanwhile.pop(0)()
        Bell.waited.append(self.is_set())
        return self.is_set()


@pytest.fixture
def waiting(link, monkeypatch):
    """Flower's handlers over the link's state, with a wait."""
    kinds = {"Event": Bell, "Lock": threading.Lock, "BoundedSemaphore": threading.BoundedSemaphore}
    monkeypatch.setattr(arrivals, "threading", SimpleNamespace(**kinds))
    monkeypatch.setattr(arrivals, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(Bell, "meanwhile", [])
    monkeypatch.setattr(Bell, "waited", [])
    made, task = arrivals.Waiting(contextlib.nullcontext), SimpleNamespace(run_id=link.run)
    order_pull = made.order_pull(fleet_handlers.pull_messages)
    reply_pull = made.reply_pull(runtime_handlers.pull_messages)
    order_push = made.order_push(runtime_handlers.push_messages)
    reply_push = superlink.own_answers(made.reply_push(fleet_handlers.push_messages))
    from_server = made.object_push(runtime_handlers.push_object)
    from_node = made.object_push(fleet_handlers.push_object)

    def orders(node):
        request = PullMessagesRequest(node=Node(node_id=node))
        found = order_pull(request=request, state=link.state, store=link.state.object_store)
        return [message.metadata.message_id for message in found.messages_list]

    def replies(*orders):
        request = PullAppMessagesRequest(message_ids=orders)
        found = reply_pull(request, link.state, task)
        return [message.metadata.reply_to_message_id for message in found.messages_list]

    def pushed(push, message):
        message.metadata.__dict__["_message_id"] = message.object_id
        request = PushAppMessagesRequest(
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[get_object_tree(message)],
        )
        return push(request)

    def order(node):
        """Push an order; return its id, and the steps that push its objects."""
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        message = Message(CONTENT, node, "train", ttl=600)
        said = pushed(lambda request: order_push(request, link.state, task), message)
        return message, _objects(message, said, lambda r: from_server(r, link.state, task), link)

    def reply(order, node):
        message = _answer(order, node)
        said = _pushed(reply_push, link.state, node, message)
        return _objects(message, said, lambda r: from_node(request=r, state=link.state), link)

    return SimpleNamespace(orders=orders, replies=replies, order=order, reply=reply)


def _objects(message, said, push, link):
    contents = get_all_nested_objects(message)
    sender = message.metadata.src_node_id
    return [
        functools.partial(
            push,
            PushObjectRequest(
                node=Node(node_id=sender),
                run_id=link.run,
                session_id=said.session_id,
                object_id=each,
                object_content=contents[each].deflate(),
            ),
        )
        for each in said.objects_to_push
    ]


def test_a_nodes_request_waits_for_a_message_and_the_next_one_gets_it(link, waiting):
    sent = []

    def arrives():
        message, objects = waiting.order(link.a)
        for push in objects:
            assert not sent
            push()
        sent.append(message.object_id)

    Bell.meanwhile.append(arrives)
    assert waiting.orders(link.a) == [] and Bell.waited == [True]
    assert waiting.orders(link.a) == sent
    assert waiting.orders(link.c) == [] and Bell.waited == [True, False]


def test_a_node_gets_no_message_that_lacks_objects(link, waiting):
    message, objects = waiting.order(link.a)
    assert len(objects) > 1
    for push in objects:
        assert waiting.orders(link.a) == []
        push()
    assert Bell.waited == [False] * len(objects)
    assert waiting.orders(link.a) == [message.object_id]


def test_the_servers_request_waits_for_a_whole_reply_and_no_slow_one_holds_up_the_others(
    link, waiting
):
    orders = {}
    for node in (link.a, link.c):
        orders[node], objects = waiting.order(node)
        for push in objects:
            push()
        assert waiting.orders(node) == [orders[node].object_id]
    ids = [order.object_id for order in orders.values()]
    slow = waiting.reply(orders[link.a], link.a)

    def arrives():
        for push in waiting.reply(orders[link.c], link.c):
            push()

    Bell.meanwhile.append(arrives)
    assert waiting.replies(*ids) == [] and Bell.waited == [True]
    assert waiting.replies(*ids) == [ids[1]]
    assert waiting.replies(ids[0]) == []
    for push in slow:
        push()
    assert waiting.replies(ids[0]) == [ids[0]] and Bell.waited == [True, False]


def test_flowers_superlink_starts_with_our_handlers_and_waits_for_its_database(monkeypatch):
    handlers = [(fleet_handlers, "push_messages"), (fleet_handlers, "pull_messages")]
    handlers += [(fleet_handlers, "push_object"), (runtime_handlers, "push_object")]
    handlers += [(runtime_handlers, "push_messages"), (runtime_handlers, "pull_messages")]
    before = {(place, name): getattr(place, name) for place, name in handlers}
    for (place, name), handler in before.items():
        monkeypatch.setattr(place, name, handler)
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    started = []

    def start():
        connection = sqlite3.connect(":memory:")
        sql_mixin._set_sqlite_pragmas(connection, None)
        started.append(connection.execute("PRAGMA busy_timeout").fetchone())
        assert all(getattr(place, name) is not old for (place, name), old in before.items())

    monkeypatch.setattr(superlink, "flower_superlink", start)
    superlink.main()
    assert started == [(superlink.LOCK_WAIT,)]


def test_a_run_is_found_by_its_directory_until_it_has_ended(link, monkeypatch):
    values, kind = {"run-dir": "/results/one", "x": 1}, TaskType.SERVER_APP
    run = link.state.create_run("", "", "", values, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, kind)
    account = SimpleNamespace(flwr_aid=NOOP_FLWR_AID, account_name="")
    client = SimpleNamespace(
        ListRuns=lambda request: control_handlers.list_runs(request, account, link.state)
    )
    monkeypatch.setattr(superlink_client, "_superlink", lambda _: contextlib.nullcontext(client))
    assert superlink_client.unfinished(None, "/results/one") == [str(run)]
    assert superlink_client.unfinished(None, "/results/two") == []
    (found,) = link.state.get_run_info(run_ids=[run])
    assert link.state.finish_task(found.primary_task_id, "stopped", "")
    assert superlink_client.unfinished(None, "/results/one") == []
