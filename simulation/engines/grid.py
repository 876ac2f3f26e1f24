"""What our Flower Grids share: virtual nodes, and a reply for every message."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlora.flower_internals import set_identity

RUN_ID = 1
TOGETHER = 32  # messages of a call, at most
TOGETHER_BYTES = 128 * 2**20  # and of their adapters: sums and answers take several times as much
WORKER_DIED, TIMEOUT = 100, 101
"""Error codes of replies, beside Flower's own."""


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
        self.pushed = self.answered = 0  # of the round in progress, for a progress display

    def set_run(self, run: Any) -> None:
        """Nothing to set: there is one run."""

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
        """A message to one node; ``ttl`` is the time in seconds that its handling may take."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes: virtual ones are always there."""
        return list(self._contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull until every reply is here."""
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies


def identify() -> None:
    """Tell Flower who sends messages from this process."""
    set_identity(1, RUN_ID, 1)


def error_reply(message: Message, code: int, reason: str) -> Message:
    """The reply to a message that could not be handled."""
    return Message(Error(code=code, reason=reason), reply_to=message)


def run_server(app: ServerApp, grid: SimulationGrid, run_config: Mapping[str, Any]) -> None:
    """Run a ServerApp on a grid in this process; its exceptions come through."""
    context = Context(
        run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    app(grid, context)


def call(app: ClientApp, message: Message, context: Context) -> Message:
    """Let a ClientApp handle a message; an exception becomes the reply Flower's engines give."""
    try:
        return app(message, context)
    except Exception as error:
        return error_reply(message, 2, type(error).__name__)


def call_together(app: ClientApp, calls: Sequence[tuple[Message, Context]]) -> list[Message]:
    """Let a ClientApp handle several messages, at once if it can train institutions together."""
    together = getattr(app, "together", None)
    train = all(message.metadata.message_type == MessageType.TRAIN for message, _ in calls)
    if together is not None and train and len(calls) > 1:
        return together(calls)
    return [call(app, message, context) for message, context in calls]


def fitting(adapter_bytes: Iterable[int]) -> int:
    """How many messages a call holds by the size of their adapters: 1 to `TOGETHER`."""
    return max(1, min(TOGETHER, TOGETHER_BYTES // max([1, *adapter_bytes])))
