"""Simulation in one process: for tests, for debuggers, and for runs with one core."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message, MessageType
from flwr.clientapp import ClientApp

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
        pushed = self._begin(messages)
        self._waiting |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handle the first waiting messages and return their replies."""
        known = (self._waiting[i] for i in message_ids if i in self._waiting)
        waiting = list(itertools.islice(known, MAX_MESSAGES_PER_CALL))
        shared = waiting and waiting[0].metadata.message_type == MessageType.TRAIN
        taken = waiting[: fitting(waiting) if shared else 1]
        for message in taken:
            del self._waiting[message.metadata.message_id]
        calls = [(message, self._contexts[message.metadata.dst_node_id]) for message in taken]
        return self._end(call_together(self._app, calls) if calls else [])
