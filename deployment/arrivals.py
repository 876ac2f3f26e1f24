"""Requests for messages wait at the SuperLink until there is one.

Flower's nodes and its server ask at intervals. A request costs the SuperLink some 20 ms of
processor, so dozens of nodes, or a server that asks many times for each reply, leave it little time
for messages. A node that asks while the server still sends the objects of its message waits for
them in steps of 1, 2, 4 s and so on.

Here a request that finds nothing waits, and ends when all objects of a message for its sender have
arrived. Its answer is empty all the same, and the sender asks again at once: Flower hands a message
out once, so a message that answered a request whose sender has died would be lost. A message is
handed out once all its objects have arrived.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

SECONDS = 4.0
"""The longest wait of a request."""
MAX_WAITING = 500
"""The most requests that wait; each has a thread. Further ones are answered at once."""
SENDING_SECONDS = 60.0
"""The time for all objects of a message. After it the message is handed out as Flower does."""

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
        self._bells: dict[Receiver, threading.Event] = {}
        self._expected: dict[Key, Expected] = {}  # the oldest first
        self._messages: dict[Receiver, set[str]] = {}
        self._needed_by: dict[str, set[Key]] = {}  # object id -> messages

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
            key, until = (receiver, order), time.monotonic() + SENDING_SECONDS
            expected = self._expected.setdefault(key, Expected(missing=set(), until=until))
            self._messages.setdefault(receiver, set()).add(order)
            for each in objects:
                expected.missing.add(each)
                self._needed_by.setdefault(each, set()).add(key)
            if not expected.missing:
                self._end(key)

    def arrive(self, object_id: str) -> None:
        """Note that an object has arrived."""
        with self._lock:
            for key in self._needed_by.pop(object_id, ()):
                self._expected[key].missing.discard(object_id)
                if not self._expected[key].missing:
                    self._end(key)

    def incomplete(self, receiver: Receiver) -> set[str]:
        """The orders whose message to this receiver lacks objects."""
        with self._lock:
            self._end_late_ones()
            return set(self._messages.get(receiver, ()))

    def _end_late_ones(self) -> None:
        now = time.monotonic()
        while self._expected and now > next(iter(self._expected.values())).until:
            self._end(next(iter(self._expected)))

    def _end(self, key: Key) -> None:
        receiver, order = key
        for each in self._expected.pop(key).missing:
            self._needed_by[each].discard(key)
            if not self._needed_by[each]:
                del self._needed_by[each]
        self._messages[receiver].discard(order)
        if not self._messages[receiver]:
            del self._messages[receiver]
        self._ring(receiver)

    def _ring(self, receiver: Receiver) -> None:
        if bell := self._bells.pop(receiver, None):
            bell.set()


class Waiting:
    """Flower's handlers, with a wait where there is no message.

    Args:
        more_threads: Called at the first request, in its thread, with `MAX_WAITING`.
    """

    def __init__(self, more_threads: Callable[[int], None]) -> None:
        self._arrivals = Arrivals()
        self._places = threading.BoundedSemaphore(MAX_WAITING)
        self._more_threads = more_threads
        self._enough_threads = False

    def order_pull(self, handler: Handler) -> Handler:
        """The handler of a node's request for a message."""

        def waiting(request: PullMessagesRequest, state: Any, store: Any) -> PullMessagesResponse:
            node = ("node", request.node.node_id)
            bell = self._arrivals.bell(node)  # before the look: nothing can arrive in between
            found = PullMessagesResponse()
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
            ids = set(request.message_ids) - self._arrivals.incomplete(run)
            found = PullAppMessagesResponse()
            if ids:
                found = handler(PullAppMessagesRequest(message_ids=ids), state, task)
            if not found.messages_list:
                self._wait(bell)
            return found

        return waiting

    def order_push(self, handler: Handler) -> Handler:
        """The handler of the server's messages."""

        def announcing(request: Any, state: Any, task: Any) -> Any:
            with self._announced(request, "node") as answered:
                answered.append(handler(request, state, task))
            return answered[0]

        return announcing

    def reply_push(self, handler: Handler) -> Handler:
        """The handler of a node's reply."""

        def announcing(request: Any, state: Any) -> Any:
            with self._announced(request, "run") as answered:
                answered.append(handler(request=request, state=state))
            return answered[0]

        return announcing

    def object_push(self, handler: Handler) -> Handler:
        """The handler of an object of a message."""

        def arriving(request: Any, *arguments: Any, **more: Any) -> Any:
            answer = handler(request, *arguments, **more)
            if answer.stored:
                self._arrivals.arrive(request.object_id)
            return answer

        return arriving

    @contextlib.contextmanager
    def _announced(self, request: Any, kind: str) -> Iterator[list[Any]]:
        """Announce a request's messages; the block appends the answer to the list.

        They are incomplete until all are stored: Flower could hand one out before the answer says
        which objects it lacks.
        """
        stored = f"stored {uuid.uuid4()}"  # no object's id
        messages: list[Key] = []
        for message in request.messages_list:
            said = message.metadata
            if kind == "node":
                messages.append((("node", said.dst_node_id), said.message_id))
            else:
                messages.append((("run", said.run_id), said.reply_to_message_id))
        answered: list[Any] = []
        try:
            for receiver, order in messages:
                self._arrivals.announce(receiver, order, [stored])
            yield answered
            wanted = set(answered[0].objects_to_push)
            trees = zip(messages, request.message_object_trees, strict=True)
            for (receiver, order), tree in trees:
                needed = {part.object_id for part in iterate_object_tree(tree)} & wanted
                if needed:
                    self._arrivals.announce(receiver, order, needed)
        finally:
            self._arrivals.arrive(stored)

    def _wait(self, bell: threading.Event) -> None:
        if not self._enough_threads:
            self._enough_threads = True
            self._more_threads(MAX_WAITING)
        if self._places.acquire(blocking=False):
            try:
                bell.wait(SECONDS)
            finally:
                self._places.release()
