"""Every assignment into a private name of Flower 1.42, in one place.

Flower is pinned to the version in which these names were read. Each function here has a test in
``tests/fedlora/test_flower_internals.py``, so that an upgrade shows which name moved. A function
imports the module that it changes when it is called: a node loads nothing of the SuperLink.
"""

# pyright: basic, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import contextlib
import functools
import importlib
import json
import mmap
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import httpx
from flwr.app import Array, Message
from flwr.supercore.task_identity import TaskIdentity

MAX_BESIDE_ARRAYS = 16 * 2**20
"""The most bytes of a reply's objects other than pieces of arrays."""
MAX_OBJECTS = 10_000
"""The most objects of a reply other than pieces of large arrays."""
MAX_STALL = 60.0
"""The most seconds that the server waits for all objects of a reply that have not
arrived: a node sends them before or while the server pulls."""

Sleep = Callable[[float], None]


def set_identity(task_id: int, run_id: int, node_id: int) -> None:
    """Tell Flower which node sends messages from this process."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, run_id, node_id


def identity() -> tuple[Any, Any, Any]:
    """The task, run and node as which Flower sees this process."""
    return TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id


def set_message_id(message: Message) -> str:
    """Give a message a new id, as a SuperLink does, and return the id."""
    message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
    return message.metadata.message_id


def use_executor(make: Callable[[], Any]) -> None:
    """Have Flower's SuperExec start tasks with the executor that ``make`` returns."""
    from flwr.supercore.superexec import run_superexec

    run_superexec.get_executor = lambda *_, **__: make()


def use_superexec_sleep(sleep: Sleep) -> None:
    """Replace the pause of the SuperExec's loop between two polls for a task.

    FLWR_SUPEREXEC_TASK_POLL_INTERVAL has no effect in this version.
    """
    from flwr.supercore.superexec import run_superexec

    run_superexec.time = SimpleNamespace(sleep=sleep)  # all that the module uses of it


def use_supernode_sleep(sleep: Sleep) -> None:
    """Replace the pause of the SuperNode's loop between two polls for a message."""
    from flwr.supernode import start_client_internal

    start_client_internal.time = SimpleNamespace(sleep=sleep)  # all that the module uses of it


def use_installed_client_app(app: Callable[..., Message]) -> None:
    """Have ``flwr-clientapp`` call this app, and install nothing from a run's submitter."""
    from flwr.supernode.runtime import run_clientapp

    run_clientapp.install_from_fab = lambda *_, **__: Path()
    run_clientapp.get_project_dir = lambda *_: Path()
    run_clientapp.get_load_client_app_fn = lambda *_, **__: lambda *_: app


def show_server_app_output() -> None:
    """Have the SuperExec pass on the ServerApp's log output."""
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.plugin import AutoExecPlugin

    AutoExecPlugin.visible_output_task_types |= {TaskType.SERVER_APP}


def wrap_handler(
    side: Literal["fleet", "runtime"],
    name: str,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Wrap the SuperLink's handler of requests of nodes (fleet) or of the ServerApp (runtime)."""
    handlers = importlib.import_module(f"flwr.superlink.servicer.{side}.{side}_handlers")
    setattr(handlers, name, wrap(getattr(handlers, name)))


@contextlib.contextmanager
def own_thread() -> Iterator[None]:
    """Leave the threads in which the SuperLink answers requests to others while the block runs.

    They are anyio's, of which 40 work at once. The block's own thread is one more.
    """
    from anyio import from_thread, to_thread

    def add(count: int) -> None:
        to_thread.current_default_thread_limiter().total_tokens += count

    from_thread.run_sync(add, 1)
    try:
        yield
    finally:
        from_thread.run_sync(add, -1)


def stream_replies(most_bytes: int, seconds: float) -> None:
    """Have Flower's Grid hand out replies one by one, with each large array in a file.

    Flower's own ``HttpGrid.pull_messages`` pulls all replies that have arrived before it returns,
    and copies each array four times in memory. Here a reply is pulled when the caller asks for the
    next one, and an array of more than one piece is a private map of an unnamed file in TMPDIR.

    Flower confirms a reply before it inflates it, and raises where it cannot; the SuperLink does
    not hand out the other replies of that request again. Here a reply is inflated first, and one
    that cannot be inflated is reported as unavailable. So is one whose node has stopped sending it:
    Flower would wait more than an hour for it, and so for all others. A second call changes the
    bounds only.

    Args:
        most_bytes: The most bytes of one reply; a larger one is unavailable.
        seconds: The longest wait for one reply's objects, and `MAX_STALL` of it for objects that
            have not arrived.
    """
    from flwr.superlink.grid import http_grid

    def pull_messages(self: Any, message_ids: Iterable[str]) -> Iterator[Message]:
        run_id, client = self.run.run_id, self._runtime_client
        response = client.PullMessages(http_grid.PullAppMessagesRequest(message_ids=message_ids))
        pull = http_grid.make_pull_object_fn_protobuf(client.PullObject, self.node, run_id)
        trees = zip(response.messages_list, response.message_object_trees, strict=True)
        for proto, tree in trees:
            inflate = functools.partial(_inflated, tree, pull, most_bytes, seconds)
            yield _pulled(self, proto.metadata, inflate)

    http_grid.HttpGrid.pull_messages = pull_messages


def _pulled(grid: Any, metadata: Any, inflate: Callable[[], Any]) -> Message:
    """One reply, confirmed; or an error in its place.

    Raises:
        OSError, httpx.HTTPError: When the SuperLink cannot be reached, or the disk is full.
    """
    from flwr.app.error import Error
    from flwr.app.message.message import make_message
    from flwr.app.metadata import Metadata
    from flwr.common.constant import ErrorCode
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
    from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE

    run_id, node = grid.run.run_id, grid.node
    try:
        message = inflate()
        if not isinstance(message, Message):
            raise ValueError("no message")
        own = message.metadata  # the sender wrote it; the SuperLink checked the other one
        if (own.src_node_id, own.reply_to_message_id) != (
            metadata.src_node_id,
            metadata.reply_to_message_id,
        ):
            raise ValueError("the reply names another sender or order")
    except (OSError, httpx.HTTPError):
        raise
    except Exception as error:  # a stranger's bytes can raise anything
        about = Metadata(
            run_id=run_id,
            message_id="",
            src_node_id=node.node_id,
            dst_node_id=node.node_id,
            message_type=SYSTEM_MESSAGE_TYPE,
            group_id="",
            ttl=0,
            reply_to_message_id=metadata.reply_to_message_id,
            created_at=time.time(),
        )
        reason = f"the reply cannot be pulled ({type(error).__name__})"
        return make_message(about, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))
    grid._runtime_client.ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(
            node=node, run_id=run_id, message_object_id=metadata.message_id
        )
    )
    message.metadata.__dict__["_message_id"] = metadata.message_id
    return message


def _inflated(tree: Any, pull: Callable[[str], bytes], most_bytes: int, seconds: float) -> Any:
    """The object at the root of a tree; its arrays of several pieces are in files.

    A reply is small on the wire and large in memory if it repeats a piece. So what arrays hold is
    bounded, over the whole reply, and not only what is pulled.
    """
    from flwr.app.message.arraychunk import ArrayChunk
    from flwr.supercore.inflatable import inflatable_utils
    from flwr.supercore.inflatable.inflatable_object import get_object_body
    from flwr.supercore.inflatable.inflatable_object import (
        get_object_head_values_from_object_content as head,
    )

    contents: dict[str, bytes] = {}
    arrays: dict[str, Any] = {}
    maps: dict[bytes, mmap.mmap] = {}
    pulled, held, about_arrays = (_Room(most_bytes), _Room(most_bytes), _Room(MAX_BESIDE_ARRAYS))
    objects = _Room(MAX_OBJECTS)
    deadline, stalled = time.monotonic() + seconds, 0.0

    def get(object_id: str) -> bytes:
        nonlocal stalled
        began, tries = time.monotonic(), 0

        def counted(one: str) -> bytes:
            nonlocal tries
            tries += 1
            return pull(one)

        if time.monotonic() > deadline:  # Flower looks at its bound only where a part is missing
            raise ValueError("the parts of the reply did not arrive in time")
        content = inflatable_utils.pull_objects(
            [object_id],
            counted,
            max_time=min(MAX_STALL - stalled, deadline - began),
            max_tries_per_object=None,
            initial_backoff=0.1,
            backoff_cap=1.0,
        )[object_id]
        if tries > 1:  # it had not arrived
            stalled += time.monotonic() - began
        pulled.take(len(content))
        return content

    parts = [tree]
    while parts:  # no recursion: a function that names itself is a cycle and would keep the maps
        part = parts.pop()
        content = get(part.object_id)
        objects.take(1)
        kind = head(content)[0]
        if kind != ArrayChunk.__qualname__:
            about_arrays.take(len(content))
        about = json.loads(get_object_body(content, Array)) if kind == Array.__qualname__ else {}
        # by the pieces that it names: one small piece may stand for thousands
        if len(about.get("arraychunk_ids", ())) > 1:
            key = part.object_id.encode()  # a record takes nothing but bytes while it is made
            maps[key] = _in_file(content, about["arraychunk_ids"], get, held)
            arrays[part.object_id] = Array(
                about["dtype"], tuple(about["shape"]), about["stype"], key
            )
        else:
            contents[part.object_id] = content
            parts += part.children

    made: Any = inflatable_utils.inflate_object_from_contents(
        tree.object_id, contents, objects=arrays
    )
    if isinstance(made, Message) and made.has_content():
        for record in made.content.array_records.values():
            for array in record.values():
                array.data = maps.get(array.data, array.data)
    return made


class _Room:
    """What is left of a bound."""

    def __init__(self, most: int) -> None:
        self._left = self._most = most

    def take(self, count: int) -> None:
        """Take some. Raises ``ValueError`` when there is no more."""
        self._left -= count
        if self._left < 0:
            raise ValueError(f"a part of the reply is above {self._most}")


def _in_file(
    content: bytes, numbers: Iterable[int], get: Callable[[str], bytes], held: _Room
) -> mmap.mmap:
    """An array's data as a private map of a file without a name.

    Args:
        content: The array's object.
        numbers: The numbers of its pieces, in their order.
        get: Gives the content of an object.
        held: Room for the data of all arrays of the reply.

    Raises:
        ValueError: If there is no room, or a piece is empty.
    """
    from flwr.app.message.arraychunk import ArrayChunk
    from flwr.supercore.inflatable.inflatable_object import (
        get_object_body,
        get_object_children_ids_from_object_content,
    )

    ids = get_object_children_ids_from_object_content(content)
    places: dict[str, tuple[int, int]] = {}  # id of a piece -> where it begins and ends
    with tempfile.TemporaryFile() as file:
        for number in numbers:
            begin = file.tell()
            if ids[number] in places:  # zeros, for instance: a piece is pulled once
                first, last = places[ids[number]]
                file.flush()
                piece = os.pread(file.fileno(), last - first, first)
            else:
                piece = get_object_body(get(ids[number]), ArrayChunk)
            if not piece:
                raise ValueError("an array has an empty piece")
            held.take(len(piece))
            file.write(piece)
            places.setdefault(ids[number], (begin, file.tell()))
        file.flush()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def keep_objects_with(store: type) -> None:
    """Have the SuperLink keep the objects of messages with this class, made of its database."""
    from flwr.supercore.object_store import object_store_factory

    object_store_factory.SqlObjectStore = store


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
