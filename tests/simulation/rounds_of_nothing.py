"""One round with a ClientApp that does nothing."""

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict

from server.exchange import exchange

EMPTY = "tests.simulation.empty_client:app"


def one_round(grid, ttl=60.0):
    record = ArrayRecord({"w": Array(np.arange(6, dtype=np.float32))})
    messages = [
        Message(RecordDict({"adapter": record}), node, MessageType.TRAIN, ttl=ttl)
        for node in grid.get_node_ids()
    ]
    return dict(exchange(grid, messages, 300.0))


def right(reply):
    return reply.has_content() and reply.content["adapter"]["w"].numpy().tolist() == list(range(6))
