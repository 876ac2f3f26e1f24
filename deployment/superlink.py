"""The SuperLink: Flower's, with checked senders.

Flower checks a node's identity by its key, but not that the node's messages are its own. A node
that knew another node's id could send it orders, which spend its privacy budget; with the id of an
order it could also answer in the other node's name. A node's id is 64 random bits that no call
reveals to others, but logs contain it, and it is not protected like a secret.

A request that finds the database locked for 5 s gets 500 from Flower, which ends a node or a
ServerApp. A busy machine may lock the database for longer.
"""

from collections.abc import Callable
from logging import WARNING
from typing import Any

from fastapi import HTTPException
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore import log
from flwr.superlink.cli.flower_superlink import flower_superlink

from fedlora import flower_internals, logs

LOCK_WAIT = 60_000
"""Milliseconds that a request waits for the database. Clients try again after 30 s."""

Push = Callable[..., PushMessagesResponse]


def own_answers(push: Push) -> Push:
    """Flower's handler of nodes' messages, behind a check that each is its sender's own answer.

    The sender is the node whose key signed the request, which Flower has already checked.
    """

    def checked(request: PushMessagesRequest, state: LinkState) -> Any:
        node = request.node.node_id
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            log(WARNING, "Refused a request of node_id=%s: it has not one message", node)
            raise HTTPException(403, "a node sends one message at a time")
        said = request.messages_list[0].metadata
        if said.src_node_id != node or not said.reply_to_message_id:
            log(WARNING, "Refused a message of node_id=%s: it is no answer of its own", node)
            raise HTTPException(403, "a node may send answers of its own and nothing else")
        return push(request=request, state=state)

    return checked


def main() -> None:
    """Run the SuperLink with Flower's arguments."""
    logs.keep_flower_to_one_line()
    flower_internals.wrap_node_messages(own_answers)
    flower_internals.set_database_wait(LOCK_WAIT)
    flower_superlink()


if __name__ == "__main__":
    main()
