"""Everything in this process, one institution after the other: for tests and debuggers."""

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from experiments.engines.grid import SimulationGrid, call, stamp


class InlineGrid(SimulationGrid):
    """Calls the ClientApp when replies are pulled, in the order of the messages.

    Args:
        app: The ClientApp.
        institutions: Number of virtual nodes.
        run_config: Flower's run config.
    """

    def __init__(self, app: ClientApp, institutions: int, run_config: Mapping[str, Any]) -> None:
        super().__init__(institutions, run_config)
        self._app = app
        self._waiting: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until they are pulled."""
        pushed = {stamp(message): message for message in messages}
        self._waiting |= pushed
        self.pushed, self.answered = len(pushed), 0
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handle the first message that waits, and return its reply."""
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                reply = call(self._app, message, self._contexts[message.metadata.dst_node_id])
                stamp(reply)
                self.answered += 1
                return [reply]
        return []
