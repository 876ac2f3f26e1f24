"""Every assignment into a private name of Flower 1.42, in one place.

Flower is pinned to the version in which these names were read. Each function here has a test in
``tests/fedlora/test_flower_internals.py``, so that an upgrade shows which name moved. A function
imports the module that it changes when it is called: a node loads nothing of the SuperLink.
"""

# pyright: basic, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import httpx
from flwr.app import Array, Message
from flwr.supercore.task_identity import TaskIdentity

MAX_BESIDE_ARRAYS = 16 * 2**20
"""The most bytes of a reply's objects other than pieces of arrays."""
MAX_STALL = 30.0
"""Seconds without another object of a reply after which the server gives it up: a node sends its
objects before or while the server pulls them."""

Handler = Callable[..., Any]


def set_identity(task_id: int, run_id: int, node_id: int) -> None:
    """Tell Flower which node sends messages from this process."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, run_id, node_id


def set_message_id(message: Message, message_id: str | None = None) -> str:
    """Give a message an id, by default a new one, as a SuperLink does, and return the id."""
    message.metadata.__dict__["_message_id"] = message_id or str(uuid.uuid4())
    return message.metadata.message_id


def wrap_node_messages(wrap: Callable[[Handler], Handler]) -> None:
    """Wrap the SuperLink's handler of messages from nodes."""
    from flwr.superlink.servicer.fleet import fleet_handlers

    fleet_handlers.push_messages = wrap(fleet_handlers.push_messages)


def hide_processing_time() -> None:
    """Have the SuperNode state that each message took no time.

    Flower sends with each answer how long this node worked on it. Free of the network's jitter,
    such a figure tells more of the sampled records than an observer could measure.
    """
    from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

    measured = InMemoryNodeState.get_message_processing_duration

    def hidden(state: InMemoryNodeState, message_id: str) -> float:
        measured(state, message_id)  # it also forgets old messages
        return 0.0

    InMemoryNodeState.get_message_processing_duration = hidden


def set_database_wait(milliseconds: int) -> None:
    """Set how long a request of the SuperLink waits for a locked database."""
    from flwr.supercore import sql_mixin

    sql_mixin.SQLITE_PRAGMAS = (*sql_mixin.SQLITE_PRAGMAS, ("busy_timeout", str(milliseconds)))


def stream_replies(most_bytes: int, seconds: float) -> None:
    """Have Flower's Grid hand out replies one by one, and an error for one that cannot be read.

    Flower's own ``HttpGrid.pull_messages`` holds all replies that have arrived before it returns.
    It confirms a reply before it inflates it, and raises where it cannot; the SuperLink does not
    hand out the other replies of that request again. For a reply whose node has stopped sending it
    Flower would wait more than an hour, and so for all others. A second call changes the bounds
    only.

    Args:
        most_bytes: The most bytes of one reply, also of its arrays, whose pieces may repeat.
        seconds: The longest wait for one reply's objects.
    """
    from flwr.superlink.grid import http_grid

    def pull_messages(self: Any, message_ids: Iterable[str]) -> Iterator[Message]:
        run_id, client = self.run.run_id, self._runtime_client
        response = client.PullMessages(http_grid.PullAppMessagesRequest(message_ids=message_ids))
        pull = http_grid.make_pull_object_fn_protobuf(client.PullObject, self.node, run_id)
        trees = zip(response.messages_list, response.message_object_trees, strict=True)
        for proto, tree in trees:
            about = proto.metadata
            try:
                message = _inflated(tree, pull, most_bytes, seconds)
                _check_sender(message, about)
            except (OSError, httpx.HTTPError):  # the SuperLink's fault, and no reply's
                raise
            except Exception as error:  # a stranger's bytes can raise anything
                yield _unavailable(self, about, type(error).__name__)
                continue
            client.ConfirmMessageReceived(
                http_grid.ConfirmMessageReceivedRequest(
                    node=self.node, run_id=run_id, message_object_id=about.message_id
                )
            )
            set_message_id(message, about.message_id)
            yield message

    http_grid.HttpGrid.pull_messages = pull_messages


def _check_sender(message: Any, checked: Any) -> None:
    """Hold what a reply says of itself against the metadata that the SuperLink has checked."""
    if not isinstance(message, Message):
        raise ValueError("no message")
    own = message.metadata
    if (own.src_node_id, own.reply_to_message_id) != (
        checked.src_node_id,
        checked.reply_to_message_id,
    ):
        raise ValueError("the reply names another sender or order")


def _unavailable(grid: Any, about: Any, reason: str) -> Message:
    """The error that stands for a reply that cannot be pulled."""
    from flwr.superlink.grid import http_grid

    metadata = http_grid.Metadata(
        run_id=grid.run.run_id,
        message_id="",
        src_node_id=grid.node.node_id,
        dst_node_id=grid.node.node_id,
        message_type=http_grid.SYSTEM_MESSAGE_TYPE,
        group_id="",
        ttl=0,
        reply_to_message_id=about.reply_to_message_id,
        created_at=time.time(),
    )
    code = http_grid.ErrorCode.MESSAGE_UNAVAILABLE
    error = http_grid.Error(code, f"the reply cannot be pulled ({reason})")
    return http_grid.make_message(metadata, error=error)


def _inflated(tree: Any, pull: Callable[[str], bytes], most_bytes: int, seconds: float) -> Any:
    """The object at the root of a tree, within bounds of bytes and time."""
    from flwr.supercore.inflatable import inflatable_utils
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

    ids = {part.object_id for part in iterate_object_tree(tree)}
    pulled, last, deadline = 0, time.monotonic(), time.monotonic() + seconds

    def bounded(object_id: str) -> bytes:
        nonlocal pulled, last
        if time.monotonic() > min(deadline, last + MAX_STALL):
            raise ValueError("the parts of the reply did not arrive in time")
        content = pull(object_id)
        pulled, last = pulled + len(content), time.monotonic()
        if pulled > most_bytes:
            raise ValueError(f"a reply above {most_bytes} bytes")
        return content

    contents = inflatable_utils.pull_objects(
        list(ids),
        bounded,
        max_time=None,
        max_tries_per_object=None,
        initial_backoff=0.1,
        backoff_cap=1.0,
    )
    _check_arrays(contents, most_bytes)
    return inflatable_utils.inflate_object_from_contents(tree.object_id, contents)


def _check_arrays(contents: Mapping[str, bytes], most_bytes: int) -> None:
    """Bound what a reply takes in memory: an array may name one small piece a thousand times."""
    from flwr.app.message.arraychunk import ArrayChunk
    from flwr.supercore.inflatable.inflatable_object import (
        get_object_body,
        get_object_children_ids_from_object_content,
        get_object_head_values_from_object_content,
    )

    held, beside = 0, 0
    for content in contents.values():
        kind = get_object_head_values_from_object_content(content)[0]
        beside += len(content) if kind != ArrayChunk.__qualname__ else 0
        if kind == Array.__qualname__:
            pieces = get_object_children_ids_from_object_content(content)
            numbers = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            held += sum(len(contents[pieces[number]]) for number in numbers)
    if held > most_bytes or beside > MAX_BESIDE_ARRAYS:
        raise ValueError(f"arrays of {held} bytes, and {beside} bytes beside their pieces")
