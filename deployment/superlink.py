"""The SuperLink: Flower's, with a check on who sends what, and more patience with its database.

Flower checks by its key that a node is the one it says it is, not that the messages it sends are
its own. Whoever knew another node's id could send it orders, which spend its privacy budget, and
whoever guessed the id of an order as well could answer it in the other's name. A node's id is 64
random bits that no call tells to others, but it stands in logs and is not kept as a secret is.

A request that finds the database locked for 5 s gets 500 from Flower, which ends a node or a
ServerApp. Large adapters on a busy machine lock it for longer.
"""

from collections.abc import Callable
from logging import WARNING
from typing import Any

from fastapi import HTTPException
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore import log
from flwr.superlink.cli.flower_superlink import flower_superlink

from fedlora import flower_internals

LOCK_WAIT = 60_000
"""Milliseconds that a request waits for the database. Who asked tries again after 30 s."""

Push = Callable[..., PushMessagesResponse]


def own_answers(push: Push) -> Push:
    """Flower's handler of what nodes send, behind a check that each message is its sender's answer.

    The sender is the node whose key signed the request: Flower has checked that before.
    """

    def checked(request: PushMessagesRequest, state: LinkState) -> Any:
        node = request.node.node_id
        for message in request.messages_list:
            said = message.metadata
            if said.src_node_id != node or not said.reply_to_message_id:
                log(WARNING, "Refused a message of node_id=%s: it is no answer of its own", node)
                raise HTTPException(403, "a node may send answers of its own and nothing else")
        return push(request=request, state=state)

    return checked


def main() -> None:
    """Run it. Its arguments are Flower's."""
    flower_internals.wrap_push_messages(own_answers)
    flower_internals.set_database_wait(LOCK_WAIT)
    flower_superlink()


if __name__ == "__main__":
    main()
