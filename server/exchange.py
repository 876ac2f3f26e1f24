"""Orders out, replies in, through any Flower Grid: streaming, with every node accounted for."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import httpx
from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

log = logging.getLogger("fedlora.server")

MAX_PUSHES = 3
MAX_PAUSE = 0.5  # seconds between polls when nothing arrives
MALFORMED_REPLY = 102
"""Error code, beside Flower's own, of a reply that the Grid cannot read."""


def exchange(
    grid: Grid, messages: Sequence[Message], timeout: float
) -> Iterator[tuple[int, Message | None]]:
    """Send messages and yield each node's reply as it arrives; None for a node without a reply.

    A Grid ends a message that outlives its time to live. If a Grid fails to do so, the wait ends
    when no reply has arrived for ``timeout`` seconds.

    Args:
        grid: Any Flower Grid.
        messages: At most one for each node.
        timeout: Seconds without any reply.

    Yields:
        Node id and its reply; an error with the code `MALFORMED_REPLY` replaces a reply that the
        Grid cannot read.
    """
    ids, messages = _push(grid, messages)
    waiting = dict(zip(ids, messages, strict=True))
    deadline, pause = time.monotonic() + timeout, 0.001
    while waiting and time.monotonic() < deadline:
        asked = time.monotonic()
        arrived, received = _pull(grid, waiting), False
        while arrived:
            # Keyed by the message of the reply: an error for a lost node comes from the SuperLink.
            # A second reply to one message is dropped. This loop keeps no reply once it is
            # yielded.
            order = waiting.pop(arrived[-1][0], None)
            if order is None:
                arrived.pop()
                continue
            received = True
            yield order.metadata.dst_node_id, arrived.pop()[1]
        if received:
            deadline, pause = time.monotonic() + timeout, 0.001
        elif time.monotonic() - asked < pause:  # a grid that waits by itself needs no pause
            time.sleep(pause)
            pause = min(pause * 2, MAX_PAUSE)
    for order in waiting.values():
        yield order.metadata.dst_node_id, None


def _push(grid: Grid, messages: Sequence[Message]) -> tuple[list[str], Sequence[Message]]:
    """Push messages, and repeat a push that a restarting SuperLink has forgotten.

    A node that gets an order twice answers both with one update, since its ledger has the order.

    Returns:
        The messages' ids, and the messages that were pushed.
    """
    for _ in range(MAX_PUSHES - 1):
        try:
            return list(grid.push_messages(messages)), messages
        except ObjectPushError as error:
            log.warning(
                "the SuperLink lost a push (%s); the push is repeated", type(error).__name__
            )
        messages = [
            Message(
                m.content,
                m.metadata.dst_node_id,
                m.metadata.message_type,
                ttl=m.metadata.ttl,
                group_id=m.metadata.group_id,
            )
            for m in messages
        ]
    return list(grid.push_messages(messages)), messages


def _pull(grid: Grid, waiting: Mapping[str, Message]) -> list[tuple[str, Message]]:
    """The replies that have arrived, each with the id of its message.

    A Grid raises for a whole request where one reply is malformed. Each message is then pulled by
    itself, and an error takes the place of the malformed reply. Flower's SuperLink hands out a
    reply once, so that the valid replies of the failed request may be lost with it:
    `fedlora.flower_internals.contain_malformed_replies` keeps Flower's Grid from raising at all.

    Raises:
        OSError, httpx.HTTPError: When the SuperLink cannot be reached; no reply is at fault.
    """
    try:
        return _with_ids(grid.pull_messages(list(waiting)))
    except (OSError, httpx.HTTPError):
        raise
    except Exception as error:
        log.warning("a reply cannot be read (%s); replies are pulled singly", type(error).__name__)
    arrived: list[tuple[str, Message]] = []
    for message_id, order in waiting.items():
        try:
            arrived += _with_ids(grid.pull_messages([message_id]))
        except (OSError, httpx.HTTPError):
            raise
        except Exception as error:
            fault = Error(code=MALFORMED_REPLY, reason=type(error).__name__)
            arrived.append((message_id, Message(fault, reply_to=order)))
    return arrived


def _with_ids(replies: Iterable[Message]) -> list[tuple[str, Message]]:
    return [(reply.metadata.reply_to_message_id, reply) for reply in replies]
