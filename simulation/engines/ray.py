"""Simulation on Ray core actors: each worker process keeps the base model, adapters come and go.

What a round's messages share (the global adapter) is put into the object store once. Replies are
handed over as they arrive. A worker that dies, or that an institution keeps for too long, is
replaced; an institution whose worker died is retried once, then reported as failed for the round.
"""

import collections
import contextlib
import functools
import gc
import heapq
import importlib
import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context, Message, RecordDict
from ray._private import parameter, services
from ray._private.node import Node
from ray._private.state import GlobalState
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from fedlora import logs, startup, wire
from fedlora.errors import InputError
from fedlora.flower_internals import set_message_id
from simulation.engines.forkserver import ForkServer
from simulation.engines.grid import (
    RUN_ID,
    TIMEOUT,
    WORKER_DIED,
    SimulationGrid,
    call_together,
    error_reply,
    fitting,
    identify,
)

HELD = 8  # shared records of earlier pushes that a worker keeps
FIRST = 8  # messages of a call, as long as nobody knows how long they take
IN_FLIGHT = 2  # calls queued at a worker when they are short, so that it never waits for the driver
SHORT = 0.5  # seconds
ATTEMPTS = 2
START = 60.0  # seconds that a new worker may take beside its first call


@dataclass(kw_only=True)
class _Job:
    """One message.

    ``cost`` is its node's work next to that of others; ``seconds`` what it took last time, 0: not
    known.
    """

    message: Message
    context: Context
    cost: float
    shared: int | None  # number of the record that the message is to get back
    shared_key: str | None
    seconds: float
    adapter_bytes: int
    attempts: int = 0
    failed: bool = False


@dataclass(kw_only=True)
class _Call:
    """Messages that a worker gets at once; when it dies on several, each is tried by itself."""

    jobs: list[_Job]
    started: float = 0.0

    @property
    def again(self) -> bool:
        """Whether a worker died on it once: then it has the next one for itself.

        A worker's death can take the reply of the call before along, so of two calls that follow
        each other nobody could tell which one it was.
        """
        return any(job.failed for job in self.jobs)

    @property
    def seconds(self) -> float:
        """How long it may take, by what its nodes took last time."""
        return sum(job.seconds for job in self.jobs)

    @property
    def limit(self) -> float:
        """How long it is let run."""
        return min(job.message.metadata.ttl for job in self.jobs)


class _Worker:
    """Runs in a worker process: one ClientApp, called for whichever institution is next.

    Args:
        app: The ClientApp as ``module:name``.
        log: File for the institutions' own messages; empty for none.
        run_config: Flower's run config; it is here so that not every call has to bring it.
    """

    def __init__(self, app: str, log: str, run_config: Mapping[str, Any]) -> None:
        identify()
        self._run_config = dict(run_config)
        self._held: dict[int, Any] = {}
        if log:
            handler = logging.FileHandler(log, delay=True)
            handler.setFormatter(logs.OneLine("%(asctime)s %(levelname)s %(message)s"))
            logging.getLogger("fedlora").addHandler(handler)
        module, _, name = app.partition(":")
        with startup.importing():
            self._app = getattr(importlib.import_module(module), name)
        gc.freeze()

    def pid(self) -> int:
        return os.getpid()

    def hold(self, numbers: list[int], *records: Any) -> None:
        """Keep the records that the coming messages share; those of the push before may go on."""
        self._held = {n: r for n, r in self._held.items() if n >= numbers[0] - HELD}
        self._held.update(zip(numbers, records, strict=True))

    def handle(self, work: bytes) -> bytes:
        calls: list[tuple[Message, Context]] = []
        for message, node_config, state, key, shared in pickle.loads(work):
            if key is not None and shared is not None:
                message.content[key] = self._held[shared]
            context = Context(
                run_id=RUN_ID,
                node_id=message.metadata.dst_node_id,
                node_config=node_config,
                state=state,
                run_config=self._run_config,
            )
            calls.append((message, context))
        replies = call_together(self._app, calls)
        startup.let_go()
        return pickle.dumps(
            [
                (reply, context.state if len(context.state) else None)
                for reply, (_, context) in zip(replies, calls, strict=True)
            ]
        )


class RayGrid(SimulationGrid):
    """A Grid on Ray actors.

    Use it as a context manager inside `started`: leaving it ends the workers.

    Args:
        app: The ClientApp as ``module:name``; workers import it themselves.
        institutions: Number of virtual nodes.
        run_config: Flower's run config.
        workers: Worker processes; 0 for as many as the cluster's cores allow.
        threads: Torch threads, and cores, of a worker.
        gpus: Share of a GPU that a worker takes.
        log: File for the institutions' own messages; empty for none.
        forks: Makes the workers, on this machine; None: they import by themselves.
        costs: How much work an institution's messages are, above 0 in any unit; empty: equally
            much. What a call took is shared out by them.
    """

    def __init__(
        self,
        app: str,
        institutions: int,
        run_config: Mapping[str, Any],
        *,
        workers: int,
        threads: int,
        gpus: float = 0.0,
        log: str = "",
        forks: ForkServer | None = None,
        costs: Sequence[float] = (),
    ) -> None:
        super().__init__(institutions, run_config)
        self._forks = forks
        self._costs = dict(zip(self.get_node_ids(), costs, strict=True)) if costs else {}
        environment: dict[str, Any] = {"env_vars": startup.ENVIRONMENT}
        if forks is not None:
            environment["py_executable"] = forks.py_executable
        count = min(_places(threads, gpus), institutions)
        count = min(workers, count) if workers else count
        self._make = (
            ray.remote(_Worker)
            .options(
                num_cpus=threads,
                num_gpus=gpus,
                max_restarts=0,
                runtime_env=environment,
            )
            .remote
        )
        self._arguments = (app, log, dict(run_config))
        self._workers: list[Any] = [self._make(*self._arguments) for _ in range(count)]
        self._seconds: dict[tuple[int, str], float] = {}  # node, type -> what its last one took
        self._records = 0  # shared so far
        self._shared: dict[int, Any] = {}  # number -> reference in the object store
        self._queue: collections.deque[_Call] = collections.deque()
        self._running: dict[Any, tuple[int, _Call]] = {}  # reference -> worker, call
        self._load: list[collections.deque[Any]] = [collections.deque() for _ in range(count)]
        self._new = set(range(count))  # workers that have not answered yet

    def __enter__(self) -> "RayGrid":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return ray.get([worker.pid.remote() for worker in self._workers])

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; the record that they share goes into the object store once.

        Each worker takes it from there once, too.
        """
        numbers: dict[int, int] = {}  # id of a record -> its number
        fresh: dict[int, Any] = {}
        jobs: list[_Job] = []
        for message in messages:
            set_message_id(message)
            key = wire.share_key(message)
            shared = None
            if key is not None:
                record = message.content[key]
                if id(record) not in numbers:
                    numbers[id(record)] = self._records
                    fresh[self._records] = ray.put(record)
                    self._records += 1
                shared = numbers[id(record)]
            jobs.append(
                _Job(
                    message=message if key is None else _without(message, key),
                    context=self._contexts[message.metadata.dst_node_id],
                    cost=self._costs.get(message.metadata.dst_node_id, 1.0),
                    shared=shared,
                    shared_key=key,
                    seconds=self._seconds.get(_kind(message), 0.0),
                    adapter_bytes=wire.adapter_bytes(message.content),
                )
            )
        if fresh:
            oldest = min(fresh) - HELD
            self._shared = {n: r for n, r in self._shared.items() if n >= oldest} | fresh
            for worker in self._workers:
                worker.hold.remote(list(fresh), *fresh.values())
        self._queue.clear()  # of what nobody waits for any more
        self._queue.extend(_calls(jobs, len(self._workers)))
        self.pushed, self.answered = len(jobs), 0
        self._dispatch()
        return [job.message.metadata.message_id for job in jobs]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have arrived; waits up to a tenth of a second for the first.

        Raises:
            RuntimeError: When what workers are forked from has ended.
        """
        if self._forks is not None:
            self._forks.check()
        replies: list[Message] = []
        if self._running:
            ready, _ = ray.wait(
                list(self._running),
                num_returns=min(len(self._running), 64),
                timeout=0.0,
                fetch_local=False,
            )
            if not ready:
                ready, _ = ray.wait(
                    list(self._running), num_returns=1, timeout=0.1, fetch_local=False
                )
            for reference in ready:
                if reference in self._running:
                    replies += self._collect(reference)
            replies += self._end_overdue()
        self._dispatch()
        for reply in replies:
            set_message_id(reply)
        self.answered += len(replies)
        return replies

    def _dispatch(self) -> None:
        """Give idle workers work; where calls are short, queue one behind that which runs."""
        for depth in range(1, IN_FLIGHT + 1):
            for index, load in enumerate(self._load):
                if not self._queue or (depth > 1 and not 0 < self._queue[0].seconds <= SHORT):
                    return
                if len(load) >= depth:
                    continue
                if load and (self._queue[0].again or self._running[load[0]][1].again):
                    continue
                todo = self._queue.popleft()
                for job in todo.jobs:
                    job.attempts += 1
                reference = self._workers[index].handle.remote(
                    # plain pickle: Ray's own way of packing objects takes several times as long
                    pickle.dumps(
                        [
                            (
                                job.message,
                                job.context.node_config,
                                job.context.state,
                                job.shared_key,
                                job.shared,
                            )
                            for job in todo.jobs
                        ]
                    )
                )
                if not load:
                    todo.started = time.monotonic()
                load.append(reference)
                self._running[reference] = (index, todo)

    def _collect(self, reference: Any) -> list[Message]:
        """The replies of a finished call; none when its worker died and it is tried again."""
        index, done = self._running.pop(reference)
        replies: list[tuple[Message, RecordDict | None]]
        try:
            replies = pickle.loads(ray.get(reference))
        except (RayActorError, OutOfMemoryError):
            return self._replace(index, reference, done, WORKER_DIED)
        except RayTaskError:
            replies = [(error_reply(job.message, 2, "worker"), None) for job in done.jobs]
        self._new.discard(index)
        seconds, expected = time.monotonic() - done.started, done.seconds
        self._load[index].remove(reference)
        if self._load[index]:
            _, following = self._running[self._load[index][0]]
            following.started = time.monotonic()
        costs = sum(job.cost for job in done.jobs)
        for job, (_, state) in zip(done.jobs, replies, strict=True):
            share = job.seconds / expected if expected else job.cost / costs
            self._seconds[_kind(job.message)] = seconds * share
            if state is not None:
                job.context.state = state
        return [reply for reply, _ in replies]

    def _end_overdue(self) -> list[Message]:
        now = time.monotonic()
        replies: list[Message] = []
        for index, load in enumerate(self._load):
            if load and load[0] in self._running:
                _, late = self._running[load[0]]
                limit = late.limit + (START if index in self._new else 0.0)
                if late.started and now - late.started > limit:
                    for job in late.jobs:  # an institution that hangs would hang again
                        job.attempts += 1
                    del self._running[load[0]]
                    replies += self._replace(index, load[0], late, TIMEOUT)
        return replies

    def _replace(self, index: int, reference: Any, lost: _Call, code: int) -> list[Message]:
        """A fresh worker in place of a dead one.

        The call that ran is split into its messages, or its lone message is tried again or
        reported; a call behind it had not begun.
        """
        ray.kill(self._workers[index])
        self._workers[index] = self._make(*self._arguments)
        self._new.add(index)
        if self._shared:
            self._workers[index].hold.remote(list(self._shared), *self._shared.values())
        # A call behind the one that ran may be the first to report the death.
        calls = [lost if r == reference else self._running.pop(r)[1] for r in self._load[index]]
        self._load[index].clear()
        ran, *behind = calls
        for waiting in reversed(behind):
            waiting.started = 0.0
            for job in waiting.jobs:
                job.attempts -= 1
            self._queue.appendleft(waiting)
        if len(ran.jobs) == 1 and ran.jobs[0].attempts >= ATTEMPTS:
            return [error_reply(ran.jobs[0].message, code, "ended")]
        for job in reversed(ran.jobs):
            job.failed = True
            self._queue.appendleft(_Call(jobs=[job]))
        return []


def _kind(message: Message) -> tuple[int, str]:
    """What takes about the same time again: a node's messages of one type."""
    return message.metadata.dst_node_id, message.metadata.message_type


def _calls(jobs: list[_Job], workers: int) -> list[_Call]:
    """Jobs in calls that take workers about equally long, the longest first.

    Nobody knows what first messages take, so few of them share a call. Others may together take
    half the time that one message is given, so that a hanging one is still noticed in time.
    """
    fresh = [job for job in jobs if not job.seconds]
    few = math.ceil(len(fresh) / workers) or 1
    few = min(few, FIRST, fitting(job.adapter_bytes for job in fresh))
    calls = _shared_out(fresh, math.ceil(len(fresh) / few), few, lambda job: job.cost)
    known = [job for job in jobs if job.seconds]
    if known:
        shortest = min(job.message.metadata.ttl for job in known) / 2
        most = fitting(job.adapter_bytes for job in known)
        needed = max(len(known) / most, sum(job.seconds for job in known) / shortest)
        count = min(len(known), workers * math.ceil(max(1, needed / workers)))
        shares = _shared_out(known, count, most, lambda job: job.seconds)
        calls += sorted(shares, key=lambda c: -c.seconds)
    return calls


def _shared_out(
    jobs: list[_Job], count: int, most: int, size: Callable[[_Job], float]
) -> list[_Call]:
    """Jobs in up to `count` calls of about equal size, with `most` in each at the most."""
    shares = [_Call(jobs=[]) for _ in range(count)]
    heap = [(0.0, number) for number in range(count)]
    for job in sorted(jobs, key=size, reverse=True):
        total, number = heapq.heappop(heap)
        shares[number].jobs.append(job)
        if len(shares[number].jobs) < most:
            heapq.heappush(heap, (total + size(job), number))
    return [share for share in shares if share.jobs]


def _places(threads: int, gpus: float) -> int:
    """How many workers the cluster has room for.

    Raises:
        InputError: If there is none for even one.
    """
    cluster = ray.cluster_resources()
    cores, cards = int(cluster.get("CPU", 0)), cluster.get("GPU", 0.0)
    places = cores // threads
    if gpus:  # a share below 1 stays on one card
        places = min(places, int(cards * int(1 / gpus)) if gpus <= 1 else int(cards // gpus))
    if places < 1:
        raise InputError(
            f"engine.threads is {threads} and engine.gpus {gpus:g}, but there are {cores} cores "
            f"and {cards:g} GPUs; lower them"
        )
    return places


def _without(message: Message, key: str) -> Message:
    """The same message without one record. Its id stays."""
    content = RecordDict({k: v for k, v in message.content.items() if k != key})
    make: Any = Message  # its published signatures leave metadata out
    return make(content, metadata=message.metadata)


@contextlib.contextmanager
def started(address: str, cores: int) -> Iterator[None]:
    """Ray until the block ends, joined or started here without what a simulation has no use for.

    It must be entered by the main thread: what Ray starts ends with the thread that started it.

    Args:
        address: A cluster to join; empty to start Ray on this machine.
        cores: Places for workers on this machine.
    """
    if ray.is_initialized():  # whoever started it ends it
        yield
        return
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # ours are started otherwise
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        root = str(Path(__file__).resolve().parents[2])
        ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": root}}, **quiet)
    else:
        with _lean():
            ray.init(
                num_cpus=cores, include_dashboard=False, object_store_memory=512 * 2**20, **quiet
            )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _lean() -> Iterator[None]:
    """Have Ray start without those that watch logs and autoscaling, and without a web server.

    Each is a Python process, and to end them takes a second. Nor does Ray then look for its node
    once a second only. ``ray.init`` has no arguments for any of it.
    """
    params, serve, get = parameter.RayParams, Node.start_api_server, services.get_node
    without: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}

    def get_soon(gcs_address: str, node_id: str) -> Any:
        nodes = GlobalState()
        nodes._initialize_global_state(services._get_gcs_client_options(gcs_address))
        for _ in range(100):
            if any(node["NodeID"] == node_id for node in nodes.node_table()):
                break
            time.sleep(0.02)
        return get(gcs_address, node_id)

    parameter.RayParams = functools.partial(params, **without)
    Node.start_api_server = lambda *_, **__: None
    services.get_node = get_soon
    try:
        yield
    finally:
        parameter.RayParams, Node.start_api_server, services.get_node = params, serve, get
