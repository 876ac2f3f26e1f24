"""The SuperLink: Flower's, with checked senders, requests that wait, and large objects in files.

Flower checks a node's identity by its key, but not that the node's messages are its own. A node
that knew another node's id could send it orders, which spend its privacy budget; with the id of an
order it could also answer in the other node's name. A node's id is 64 random bits that no call
reveals to others, but logs contain it, and it is not protected like a secret.

A request that finds the database locked for 5 s gets 500 from Flower, which ends a node or a
ServerApp. A busy machine may lock the database for longer.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from logging import WARNING
from typing import Any

from fastapi import HTTPException
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore import log
from flwr.superlink.cli.flower_superlink import flower_superlink

from deployment.arrivals import Waiting
from deployment.object_files import FileObjectStore
from fedlora import flower_internals, logs

LOCK_WAIT = 60_000
"""Milliseconds that a request waits for the database. Clients try again after 30 s."""

MAX_LISTS = 4
"""The most different lists of objects for one order: a node that restarts may answer it again."""
KEPT_ORDERS = 1000
"""The most orders of a node whose lists are remembered."""

Push = Callable[..., PushMessagesResponse]


class _Lists:
    """The lists of objects that nodes sent, few for each order.

    Flower notes each object of a list while nobody else can write, again whenever the list is
    another one.
    """

    def __init__(self) -> None:
        self._of_nodes: dict[int, OrderedDict[bytes, set[bytes]]] = {}  # node -> order -> lists
        self._lock = threading.Lock()

    def allow(self, node: int, order: str, tree: ObjectTree) -> bool:
        """Whether a node may send this list for this order: a known one, or one of `MAX_LISTS`."""
        order_digest = hashlib.sha256(order.encode()).digest()
        digest = hashlib.sha256(tree.SerializeToString(deterministic=True)).digest()
        with self._lock:
            orders = self._of_nodes.setdefault(node, OrderedDict())
            known = orders.setdefault(order_digest, set())
            orders.move_to_end(order_digest)
            if len(orders) > KEPT_ORDERS:
                orders.popitem(last=False)
            if digest not in known and len(known) >= MAX_LISTS:
                return False
            known.add(digest)
            return True


def own_answers(push: Push) -> Push:
    """Flower's handler of nodes' messages, behind a check that each is its sender's own answer.

    The sender is the node whose key signed the request, which Flower has already checked.
    """
    lists = _Lists()

    def checked(request: PushMessagesRequest, state: LinkState) -> Any:
        node = request.node.node_id
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            log(WARNING, "Refused a request of node_id=%s: it has not one message", node)
            raise HTTPException(403, "a node sends one message at a time")
        said = request.messages_list[0].metadata
        if said.src_node_id != node or not said.reply_to_message_id:
            log(WARNING, "Refused a message of node_id=%s: it is no answer of its own", node)
            raise HTTPException(403, "a node may send answers of its own and nothing else")
        if not lists.allow(node, said.reply_to_message_id, request.message_object_trees[0]):
            log(WARNING, "Refused a message of node_id=%s: one order has many answers", node)
            raise HTTPException(403, "a node sends one answer to an order")
        return push(request=request, state=state)

    return checked


def main() -> None:
    """Run the SuperLink with Flower's arguments."""
    logs.keep_flower_to_one_line()
    waiting = Waiting(flower_internals.own_thread)
    wrap = flower_internals.wrap_handler
    wrap("runtime", "push_messages", waiting.order_push)
    wrap("runtime", "push_object", waiting.object_push)
    wrap("fleet", "pull_messages", waiting.order_pull)
    wrap("fleet", "push_messages", lambda push: own_answers(waiting.reply_push(push)))
    wrap("fleet", "push_object", waiting.object_push)
    wrap("runtime", "pull_messages", waiting.reply_pull)
    flower_internals.set_database_wait(LOCK_WAIT)
    flower_internals.keep_objects_with(FileObjectStore)
    flower_superlink()


if __name__ == "__main__":
    main()
