"""The base of both simulation grids: virtual nodes, and a reply for every message."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlora.flower_internals import set_identity, set_message_id
from fedlora.wire import wire

log = logging.getLogger("fedlora.simulation")
RUN_ID = 1
MAX_MESSAGES_PER_CALL = 32
MAX_ADAPTER_BYTES_PER_CALL = 128 * 2**20  # sums and replies take several times as much memory


class SimulationGrid(Grid):
    """A Grid of ``institutions`` virtual nodes; node ``i + 1`` is partition ``i``.

    Args:
        institutions: Number of nodes.
        run_config: Flower's run config for every app.

    Attributes:
        pushed: The number of messages of the exchange in progress, for a progress display.
        answered: The number of its replies so far.
        pushed_type: The type of its messages.
    """

    def __init__(self, institutions: int, run_config: Mapping[str, Any]) -> None:
        identify()
        self._contexts: dict[int, Context] = {}
        for index in range(institutions):
            about = {"partition-id": index, "num-partitions": institutions, "simulation": True}
            self._contexts[index + 1] = Context(
                run_id=RUN_ID,
                node_id=index + 1,
                node_config=about,
                state=RecordDict(),
                run_config=dict(run_config),
            )
        self.pushed = self.answered = 0
        self.pushed_type = ""

    def _begin(self, messages: Iterable[Message]) -> dict[str, Message]:
        """Begin an exchange: give each message its id, and note them for a progress display."""
        pushed = {set_message_id(message): message for message in messages}
        self.pushed, self.answered = len(pushed), 0
        self.pushed_type = next((m.metadata.message_type for m in pushed.values()), "")
        return pushed

    def _end(self, replies: list[Message]) -> list[Message]:
        """Give replies their ids, and note them."""
        for reply in replies:
            set_message_id(reply)
        self.answered += len(replies)
        return replies

    def set_run(self, run: Any) -> None:
        """Do nothing: a simulation has one run."""

    @property
    def run(self) -> Any:
        """Flower's record of the run; a simulation has none."""
        return None

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to one node; ``ttl`` limits its handling, in seconds."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all node ids. Virtual nodes are always available."""
        return list(self._contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages, then pull until every reply has arrived."""
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            replies += (arrived := list(self.pull_messages(waiting)))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
        return replies


def identify() -> None:
    """Set the sender that Flower writes into messages of this process."""
    set_identity(1, RUN_ID, 1)


def error_reply(message: Message, code: int, reason: str) -> Message:
    """Return the error reply to a message that could not be handled."""
    return Message(Error(code=code, reason=reason), reply_to=message)


def run_server(app: ServerApp, grid: SimulationGrid, run_config: Mapping[str, Any]) -> None:
    """Run a ServerApp on a grid in this process; its exceptions propagate."""
    context = Context(
        run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    app(grid, context)


def call_together(app: ClientApp, calls: Sequence[tuple[Message, Context]]) -> list[Message]:
    """Let a ClientApp handle messages, in shared passes if it supports them.

    An exception of one call becomes an error reply, as in Flower.
    """
    together = getattr(app, "together", None)
    kinds = {message.metadata.message_type for message, _ in calls}
    if together is not None and len(calls) > 1 and kinds == {MessageType.TRAIN}:
        try:
            return together(calls)
        except Exception:  # each call then gets the reply, or the error, that it would get alone
            log.exception("a call of %d messages failed; each is handled alone", len(calls))
    replies: list[Message] = []
    for message, context in calls:
        try:
            replies.append(app(message, context))
        except Exception as error:
            replies.append(error_reply(message, 2, type(error).__name__))
    return replies


def fitting(messages: Iterable[Message]) -> int:
    """Return how many of these messages fit into one call, by the size of their adapters."""
    largest = max([1, *(wire.adapter_bytes(message.content) for message in messages)])
    return max(1, min(MAX_MESSAGES_PER_CALL, MAX_ADAPTER_BYTES_PER_CALL // largest))
