"""Requests for messages wait at the SuperLink until there is one.

Flower's nodes and its server ask at intervals. A request costs the SuperLink some 10 ms of
processor, so dozens of nodes, or a server that asks many times for each reply, leave it little time
for messages. A node that asks while the server still sends the objects of its message waits for
them in steps of 1, 2, 4 s and so on.

Here a request that finds nothing waits, at most `SECONDS`, and ends when all objects of a message
for its sender have arrived. Its answer is empty all the same, and the sender asks again at once:
Flower hands a message out once, so a message that answered a request whose sender has died would be
lost. A message that lacks objects is not handed out, unless none has come for `STALL_SECONDS`.

All of this is in memory. After a restart of the SuperLink messages from before are handed out as
Flower does.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

SECONDS = 4.0
"""The longest wait of a request."""
MIN_SECONDS = 0.12
"""The shortest wait, by which a node knows that its request has waited (`deployment.supernode`)."""
MAX_WAITING = 400
"""The most requests that wait, each in a thread of its own (``pids_limit`` of the container).
Further ones are answered at once."""
STALL_SECONDS = 15.0
"""The time between two objects of a message. After it the message is handed out as Flower does."""

LOCKS = 1024
"""Receivers share so many locks, so that invented ones take no memory."""

Handler = Callable[..., Any]
Receiver = tuple[str, int]
"""``"node"`` or ``"run"``, for the server, and its id."""
Key = tuple[Receiver, str]
"""A message's receiver, and the order that the message is or answers."""


@dataclass(kw_only=True)
class Expected:
    """What a message waits for: ids of objects, until a time of `time.monotonic`."""

    missing: set[str]
    until: float


class Arrivals:
    """Who waits, and which objects the messages still need. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        self._bells: dict[Receiver, threading.Event] = {}
        self._expected: dict[Key, Expected] = {}  # the oldest first
        self._messages: dict[Receiver, set[str]] = {}
        self._needed_by: dict[str, set[Key]] = {}  # object id -> messages

    def lock(self, receiver: Receiver) -> threading.Lock:
        """The lock between a look for incomplete messages and the pull that relies on it.

        Whoever announces a new message takes it too, and holds nothing else then.
        """
        return self._locks[hash(receiver) % LOCKS]

    def bell(self, receiver: Receiver) -> threading.Event:
        """An event that is set when a message is complete, or its receiver asks once more."""
        with self._lock:
            self._ring(receiver)
            self._bells[receiver] = threading.Event()
            return self._bells[receiver]

    def announce(self, receiver: Receiver, order: str, objects: Iterable[str]) -> None:
        """Note a message, or more objects that have yet to arrive for it."""
        with self._lock:
            self._end_late_ones()
            key = (receiver, order)
            expected = self._expected.setdefault(key, Expected(missing=set(), until=_later()))
            self._messages.setdefault(receiver, set()).add(order)
            for each in objects:
                expected.missing.add(each)
                self._needed_by.setdefault(each, set()).add(key)
            if not expected.missing:
                self._end(key)

    def arrive(self, object_id: str, *, ring: bool = True) -> None:
        """Note that an object has arrived; ``ring``: whether that may end a wait."""
        with self._lock:
            for key in self._needed_by.pop(object_id, ()):
                expected = self._expected.pop(key)
                expected.missing.discard(object_id)
                expected.until = _later()
                self._expected[key] = expected  # the youngest now
                if not expected.missing:
                    self._end(key, ring=ring)

    def incomplete(self, receiver: Receiver) -> set[str]:
        """The orders whose message to this receiver lacks objects."""
        with self._lock:
            self._end_late_ones()
            return set(self._messages.get(receiver, ()))

    def _end_late_ones(self) -> None:
        now = time.monotonic()
        while self._expected and now > next(iter(self._expected.values())).until:
            self._end(next(iter(self._expected)))

    def _end(self, key: Key, *, ring: bool = True) -> None:
        receiver, order = key
        for each in self._expected.pop(key).missing:
            self._needed_by[each].discard(key)
            if not self._needed_by[each]:
                del self._needed_by[each]
        self._messages[receiver].discard(order)
        if not self._messages[receiver]:
            del self._messages[receiver]
        if ring:
            self._ring(receiver)

    def _ring(self, receiver: Receiver) -> None:
        if bell := self._bells.pop(receiver, None):
            bell.set()


def _later() -> float:
    return time.monotonic() + STALL_SECONDS


class Waiting:
    """Flower's handlers, with a wait where there is no message.

    Args:
        own_thread: A context in which this thread does not count among those for requests.
    """

    def __init__(self, own_thread: Callable[[], AbstractContextManager[None]]) -> None:
        self._arrivals = Arrivals()
        self._places = threading.BoundedSemaphore(MAX_WAITING)
        self._own_thread = own_thread

    def order_pull(self, handler: Handler) -> Handler:
        """The handler of a node's request for a message."""

        def waiting(request: PullMessagesRequest, state: Any, store: Any) -> PullMessagesResponse:
            node = ("node", request.node.node_id)
            bell = self._arrivals.bell(node)  # before the look: nothing can arrive in between
            found = PullMessagesResponse()
            with self._arrivals.lock(node):
                if not self._arrivals.incomplete(node):
                    found = handler(request=request, state=state, store=store)
            if not found.messages_list:
                self._wait(bell)
            return found

        return waiting

    def reply_pull(self, handler: Handler) -> Handler:
        """The handler of the server's request for replies: those to the orders that it names."""

        def waiting(request: Any, state: Any, task: Any) -> PullAppMessagesResponse:
            run = ("run", task.run_id)
            bell = self._arrivals.bell(run)
            found = PullAppMessagesResponse()
            with self._arrivals.lock(run):
                ids = set(request.message_ids) - self._arrivals.incomplete(run)
                if ids:
                    found = handler(PullAppMessagesRequest(message_ids=ids), state, task)
            if not found.messages_list:
                self._wait(bell)
            return found

        return waiting

    def order_push(self, handler: Handler) -> Handler:
        """The handler of the server's messages."""
        return self._push(handler, lambda said: (("node", said.dst_node_id), said.message_id))

    def reply_push(self, handler: Handler) -> Handler:
        """The handler of a node's reply."""
        return self._push(handler, lambda said: (("run", said.run_id), said.reply_to_message_id))

    def object_push(self, handler: Handler) -> Handler:
        """The handler of an object of a message."""

        def arriving(request: Any, *arguments: Any, **more: Any) -> Any:
            answer = handler(request, *arguments, **more)
            if answer.stored:
                self._arrivals.arrive(request.object_id)
            return answer

        return arriving

    def _push(self, handler: Handler, key: Callable[[Any], Key]) -> Handler:
        """A handler of messages that announces them; ``key``: of a message's metadata.

        They are incomplete until all are stored: Flower could hand one out before the answer says
        which objects it lacks.
        """

        def announcing(request: Any, *arguments: Any, **more: Any) -> Any:
            stored = f"stored {uuid.uuid4()}"  # no object's id
            keys = [key(message.metadata) for message in request.messages_list]
            answer = None
            try:
                for receiver, order in keys:
                    with self._arrivals.lock(receiver):
                        self._arrivals.announce(receiver, order, [stored])
                answer = handler(request, *arguments, **more)
                wanted = set(answer.objects_to_push)
                trees = zip(keys, request.message_object_trees, strict=True)
                for (receiver, order), tree in trees:
                    needed = {part.object_id for part in iterate_object_tree(tree)} & wanted
                    if needed:
                        self._arrivals.announce(receiver, order, needed)
            finally:
                self._arrivals.arrive(stored, ring=answer is not None)
            return answer

        return announcing

    def _wait(self, bell: threading.Event) -> None:
        if self._places.acquire(blocking=False):
            try:
                with self._own_thread():
                    began = time.monotonic()
                    bell.wait(SECONDS)
                    time.sleep(max(0.0, began + MIN_SECONDS - time.monotonic()))
            finally:
                self._places.release()
