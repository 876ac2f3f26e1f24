"""Orders out, answers in, through any Flower Grid: streaming, with every node accounted for."""

import time
from collections.abc import Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

LONGEST_PAUSE = 0.5  # seconds between polls when nothing arrives


def exchange(
    grid: Grid, messages: Sequence[Message], timeout: float
) -> Iterator[tuple[int, Message | None]]:
    """Send messages and yield each node's reply as it arrives; None for a node that stayed silent.

    Grids end what takes too long by the message's time to live. Should one fail to, the wait ends
    when nothing at all has arrived for ``timeout`` seconds.

    Args:
        grid: Any Flower Grid.
        messages: At most one for each node.
        timeout: Seconds without any reply.

    Yields:
        Node id and its reply.
    """
    ids = list(grid.push_messages(messages))
    waiting = {i: m.metadata.dst_node_id for i, m in zip(ids, messages, strict=True)}
    deadline, pause = time.monotonic() + timeout, 0.001
    while waiting and time.monotonic() < deadline:
        asked = time.monotonic()
        arrived, came = list(grid.pull_messages(list(waiting))), False
        while arrived:
            # By the message replied to: the source of an error for a lost node is the SuperLink.
            # Of two replies to one message the second is nobody's. Nothing here keeps a reply once
            # it is handed over.
            node = waiting.pop(arrived[-1].metadata.reply_to_message_id, None)
            if node is None:
                arrived.pop()
                continue
            came = True
            yield node, arrived.pop()
        if came:
            deadline, pause = time.monotonic() + timeout, 0.001
        elif time.monotonic() - asked < pause:  # a grid that waits by itself needs no pause
            time.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
    for node in waiting.values():
        yield node, None
