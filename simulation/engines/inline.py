"""Simulation in one process: for tests, for debuggers, and for runs with one core."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedlora.flower_internals import set_message_id
from fedlora.wire import wire
from simulation.engines.grid import MAX_MESSAGES_PER_CALL, SimulationGrid, call_together, fitting


class InlineGrid(SimulationGrid):
    """Calls the ClientApp when replies are pulled, in the order of the messages.

    As in a worker of the Ray engine, one call holds the training messages of several institutions.

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
        pushed = {set_message_id(message): message for message in messages}
        self._waiting |= pushed
        self._begin_exchange(pushed.values())
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handle the first waiting messages and return their replies."""
        known = (self._waiting[i] for i in message_ids if i in self._waiting)
        waiting = list(itertools.islice(known, MAX_MESSAGES_PER_CALL))
        count = 1
        if waiting and waiting[0].metadata.message_type in wire.SHARED_TYPES:
            count = fitting(wire.adapter_bytes(message.content) for message in waiting)
        taken = waiting[:count]
        for message in taken:
            del self._waiting[message.metadata.message_id]
        calls = [(message, self._contexts[message.metadata.dst_node_id]) for message in taken]
        replies = call_together(self._app, calls) if calls else []
        for reply in replies:
            set_message_id(reply)
        self.answered += len(replies)
        return replies
