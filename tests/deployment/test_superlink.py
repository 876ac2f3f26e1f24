"""Our SuperLink beside Flower's: messages in another's name."""

import sqlite3
from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore import sql_mixin
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers

from deployment import superlink

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


def test_flowers_superlink_starts_with_our_handler_and_waits_for_its_database(monkeypatch):
    before = fleet_handlers.push_messages
    monkeypatch.setattr(fleet_handlers, "push_messages", before)
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    started = []

    def start():
        connection = sqlite3.connect(":memory:")
        sql_mixin._set_sqlite_pragmas(connection, None)
        started.append(connection.execute("PRAGMA busy_timeout").fetchone())
        assert fleet_handlers.push_messages is not before

    monkeypatch.setattr(superlink, "flower_superlink", start)
    superlink.main()
    assert started == [(superlink.LOCK_WAIT,)]
