"""The base of both simulation grids: virtual nodes, and a reply for every message."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlora.flower_internals import set_identity
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
    """

    def __init__(self, institutions: int, run_config: Mapping[str, Any]) -> None:
        identify()
        self._contexts = {
            index + 1: Context(
                run_id=RUN_ID,
                node_id=index + 1,
                node_config={
                    "partition-id": index,
                    "num-partitions": institutions,
                    "simulation": True,
                },
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for index in range(institutions)
        }
        self.pushed = self.answered = 0  # of the exchange in progress, for a progress display
        self.pushed_type = ""  # the type of its messages

    def _begin_exchange(self, messages: Collection[Message]) -> None:
        """Note an exchange for a progress display."""
        self.pushed, self.answered = len(messages), 0
        self.pushed_type = next((m.metadata.message_type for m in messages), "")

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
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
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


def call(app: ClientApp, message: Message, context: Context) -> Message:
    """Let a ClientApp handle a message; an exception becomes an error reply, as in Flower."""
    try:
        return app(message, context)
    except Exception as error:
        return error_reply(message, 2, type(error).__name__)


def call_together(app: ClientApp, calls: Sequence[tuple[Message, Context]]) -> list[Message]:
    """Let a ClientApp handle several messages, in shared passes if it supports them."""
    together = getattr(app, "together", None)
    kinds = {message.metadata.message_type for message, _ in calls}
    shared = len(kinds) == 1 and kinds <= set(wire.SHARED_TYPES)
    if together is not None and shared and len(calls) > 1:
        try:
            return together(calls)
        except Exception:  # each call then gets the reply, or the error, that it would get alone
            log.exception("a call of %d messages failed; each is handled alone", len(calls))
    return [call(app, message, context) for message, context in calls]


def fitting(adapter_bytes: Iterable[int]) -> int:
    """Return how many messages fit into one call, by the size of their adapters; at least 1."""
    return max(
        1, min(MAX_MESSAGES_PER_CALL, MAX_ADAPTER_BYTES_PER_CALL // max([1, *adapter_bytes]))
    )
