"""Orders out, replies in, through any Flower Grid: streaming, with every node accounted for."""

import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import httpx
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedlora.wire import wire

log = logging.getLogger("fedlora.server")

MAX_PUSHES = 3
MAX_PAUSE = 0.5  # seconds between polls when nothing arrives
LARGE = 16 * 2**20
"""Bytes of an adapter above which sent messages are collected at once: their records are cycles."""
GRACE = 30.0
"""Seconds without any reply after which nobody waits for replies that are not needed."""
WORKER_DIED, TIMEOUT, MALFORMED_REPLY = 100, 101, 102
"""Error codes beside Flower's own; the last is that of a reply that the Grid cannot read."""


def exchange(
    grid: Grid,
    messages: list[Message],
    timeout: float,
    *,
    enough: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Message | None]]:
    """Send messages and yield each node's reply as it arrives, as `send` and `receive` do."""
    yield from receive(grid, send(grid, messages), timeout, enough=enough)


def receive(
    grid: Grid,
    waiting: dict[str, Message],
    timeout: float,
    *,
    enough: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Message | None]]:
    """Yield each node's reply as it arrives; None for a node without a reply.

    A Grid ends a message that outlives its time to live. If a Grid fails to do so, the wait ends
    when no reply has arrived for ``timeout`` seconds.

    Memory: no reply is held once it is yielded.

    Args:
        grid: Any Flower Grid.
        waiting: What `send` returned, at most one message for each node; it is empty afterwards.
        timeout: Seconds without any reply.
        enough: Whether the replies so far suffice; the others then have `GRACE` to arrive.

    Yields:
        Node id and its reply; an error with the code `MALFORMED_REPLY` replaces a reply that the
        Grid cannot read.
    """
    deadline, pause = time.monotonic() + timeout, 0.001
    while waiting and time.monotonic() < deadline:
        asked, received = time.monotonic(), False
        replies = _pull(grid, waiting)
        while (arrived := next(replies, None)) is not None:
            # Keyed by the message of the reply: an error for a lost node comes from the SuperLink.
            # A second reply to one message is dropped.
            order = waiting.pop(arrived[-1].metadata.reply_to_message_id, None)
            if order is None:
                continue
            received = True
            yield order.metadata.dst_node_id, arrived.pop()
        if received:
            left = min(timeout, GRACE) if enough() else timeout
            deadline, pause = time.monotonic() + left, 0.001
        elif time.monotonic() - asked < pause:  # a grid that waits by itself needs no pause
            time.sleep(pause)
            pause = min(pause * 2, MAX_PAUSE)
    while waiting:
        yield waiting.popitem()[1].metadata.dst_node_id, None


def send(grid: Grid, messages: list[Message]) -> dict[str, Message]:
    """Push messages and empty their list; repeat a push that a restarting SuperLink has forgotten.

    A node that gets an order twice answers both with one update, since its ledger has the order.

    Returns:
        Message id -> the message without its content.
    """
    for attempt in range(MAX_PUSHES):
        try:
            ids = list(grid.push_messages(messages))
            break
        except ObjectPushError as error:
            if attempt == MAX_PUSHES - 1:
                raise
            log.warning(
                "the SuperLink lost a push (%s); the push is repeated", type(error).__name__
            )
        messages[:] = [
            Message(
                m.content,
                m.metadata.dst_node_id,
                m.metadata.message_type,
                ttl=m.metadata.ttl,
                group_id=m.metadata.group_id,
            )
            for m in messages
        ]
    sent = {i: remove_content_from_message(m) for i, m in zip(ids, messages, strict=True)}
    large = any(m.has_content() and wire.adapter_bytes(m.content) > LARGE for m in messages[:1])
    messages.clear()
    if large:
        gc.collect()
    return sent


def _pull(grid: Grid, waiting: Mapping[str, Message]) -> Iterator[list[Message]]:
    """The replies that have arrived, each alone in a list, from which the caller takes it.

    A Grid may raise for a whole request where one reply is malformed. Each message is then pulled
    by itself, and an error takes the place of the malformed reply. Flower's SuperLink hands out a
    reply once, so that the valid replies of the failed request may be lost with it: under
    `fedlora.flower_internals.stream_replies` Flower's Grid does not raise at all.

    Raises:
        OSError, httpx.HTTPError: When the SuperLink cannot be reached; no reply is at fault.
    """
    try:
        return _one_by_one(grid.pull_messages(list(waiting)))
    except (OSError, httpx.HTTPError):
        raise
    except Exception as error:
        log.warning("a reply cannot be read (%s); replies are pulled singly", type(error).__name__)
    arrived: list[Message] = []
    for message_id, order in waiting.items():
        try:
            arrived += grid.pull_messages([message_id])
        except (OSError, httpx.HTTPError):
            raise
        except Exception as error:
            fault = Error(code=MALFORMED_REPLY, reason=type(error).__name__)
            arrived.append(Message(fault, reply_to=order))
    return _one_by_one(arrived)


def _one_by_one(replies: Iterable[Message]) -> Iterator[list[Message]]:
    """Each reply alone in a list; none is held here once the next list is asked for.

    A Grid that hands out an iterator keeps it; from any other, all replies are taken at once.
    """
    if isinstance(replies, Iterator):
        return map(_alone, replies)
    held = list(replies)[::-1]
    return iter(lambda: [held.pop()] if held else None, None)


def _alone(reply: Message) -> list[Message]:
    return [reply]
