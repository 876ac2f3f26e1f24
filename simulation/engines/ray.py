"""Simulation on Ray actors: each worker process keeps the base model for all its institutions.

The global adapter, which all messages of a round share, is put into the object store once. Replies
are returned as they arrive. The grid replaces a worker that dies or exceeds its time limit. It
retries an institution whose worker died once, then reports the institution as failed.
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
import signal
import tempfile
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
from ray.exceptions import RayError, RayTaskError

from fedlora import logs
from fedlora.errors import InputError
from fedlora.flower_internals import set_message_id
from fedlora.startup import ENVIRONMENT, LIBRARIES, paused_gc, trim_heap
from fedlora.wire import wire
from server.exchange import TIMEOUT, WORKER_DIED
from server.roster import UNTIMED_TOGETHER
from simulation.engines.forkserver import ForkServer
from simulation.engines.grid import (
    RUN_ID,
    SimulationGrid,
    call_together,
    error_reply,
    fitting,
    identify,
)

log = logging.getLogger("fedlora.simulation")

LOOPBACK = "127.0.0.1"
MAX_CACHED_RECORDS = 2  # shared records of earlier pushes that a worker keeps
MAX_QUEUED_CALLS = 2  # short calls queued at a worker, so that it never waits for the driver
SHORT_CALL_SECONDS = 0.5
MAX_ATTEMPTS = 2
STARTUP_SECONDS = 60.0  # added to the time limit of a new worker's first call


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """The worker processes of a grid.

    Args:
        count: Worker processes; 0 for as many as the cluster's cores allow.
        threads: Torch threads, and cores, of a worker.
        gpus: The share of a GPU that a worker takes.
        log: A file for the institutions' own messages; empty for none.
        forks: The fork server that makes the workers on this machine. None: workers start as new
            processes and import by themselves.
    """

    count: int
    threads: int
    gpus: float = 0.0
    log: str = ""
    forks: ForkServer | None = None


@dataclass(kw_only=True)
class _Job:
    """One message to a node."""

    message: Message
    context: Context
    cost: float  # the node's expected work, relative to other nodes
    shared: int | None  # number of the shared record that the worker puts back into the message
    shared_key: str | None
    seconds: float  # duration of the node's last message of this type; 0 if unknown
    adapter_bytes: int
    attempts: int = 0
    failed: bool = False


@dataclass(kw_only=True)
class _Call:
    """Messages that a worker gets at once. If the worker dies, each is retried by itself."""

    jobs: list[_Job]
    started: float = 0.0

    @property
    def is_retry(self) -> bool:
        """Whether a worker died on one of these messages. A retry has a worker to itself.

        A dying worker can lose the reply of the call before. With two calls at a worker, the
        grid could not tell which call ended it.
        """
        return any(job.failed for job in self.jobs)

    @property
    def seconds(self) -> float:
        """Expected duration: the sum of the nodes' last durations."""
        return sum(job.seconds for job in self.jobs)

    @property
    def limit(self) -> float:
        """Time limit in seconds: that of one message, or where durations are unknown of all."""
        limits = [job.message.metadata.ttl for job in self.jobs]
        return min(limits) if self.seconds else sum(limits)


class _Worker:
    """The actor of a worker process: one ClientApp, which serves one institution after another.

    Args:
        app: The ClientApp as ``module:name``.
        log: A file for the institutions' own messages; empty for none.
        run_config: Flower's run config, sent once instead of with each call.
    """

    def __init__(self, app: str, log: str, run_config: Mapping[str, Any]) -> None:
        identify()
        self._run_config = dict(run_config)
        self._records: dict[int, Any] = {}
        if log:
            logging.getLogger("fedlora").addHandler(logs.to_file(log))
        module, _, name = app.partition(":")
        with paused_gc():
            self._app = getattr(importlib.import_module(module), name)
        gc.freeze()

    def pid(self) -> int:
        return os.getpid()

    def store_shared(self, numbers: list[int], *records: Any) -> None:
        """Keep shared records for the next messages, and drop old ones."""
        self._records = {
            n: r for n, r in self._records.items() if n >= numbers[0] - MAX_CACHED_RECORDS
        }
        self._records.update(zip(numbers, records, strict=True))

    def handle(self, work: bytes) -> bytes:
        calls: list[tuple[Message, Context]] = []
        for message, node_config, state, key, shared in pickle.loads(work):
            if key is not None and shared is not None:
                message.content[key] = self._records[shared]
            context = Context(
                run_id=RUN_ID,
                node_id=message.metadata.dst_node_id,
                node_config=node_config,
                state=state,
                run_config=self._run_config,
            )
            calls.append((message, context))
        replies = call_together(self._app, calls)
        trim_heap()
        return pickle.dumps(
            [
                (reply, context.state if len(context.state) else None)
                for reply, (_, context) in zip(replies, calls, strict=True)
            ]
        )


class RayGrid(SimulationGrid):
    """A Grid on Ray actors.

    Use it as a context manager inside `started`: the exit ends the workers.

    Args:
        app: The ClientApp as ``module:name``; workers import it themselves.
        institutions: Number of virtual nodes.
        run_config: Flower's run config.
        workers: The worker processes.
        costs: The expected work of each institution's messages, above 0 in any unit; empty for
            equal costs. The duration of a call is attributed to its messages in proportion.
    """

    def __init__(
        self,
        app: str,
        institutions: int,
        run_config: Mapping[str, Any],
        *,
        workers: WorkerSpec,
        costs: Sequence[float] = (),
    ) -> None:
        super().__init__(institutions, run_config)
        self._forks = workers.forks
        self._costs = dict(zip(self.get_node_ids(), costs, strict=True)) if costs else {}
        environment: dict[str, Any] = {"env_vars": ENVIRONMENT | LIBRARIES}
        if workers.forks is not None:
            environment["py_executable"] = workers.forks.py_executable
        count = min(_max_workers(workers.threads, workers.gpus), institutions)
        count = min(workers.count, count) if workers.count else count
        self._start_worker = (
            ray.remote(_Worker)
            .options(
                num_cpus=workers.threads,
                num_gpus=workers.gpus,
                max_restarts=0,
                runtime_env=environment,
            )
            .remote
        )
        self._arguments = (app, workers.log, dict(run_config))
        self._workers: list[Any] = [self._start_worker(*self._arguments) for _ in range(count)]
        self._seconds: dict[tuple[int, str], float] = {}  # node, type -> duration of the last one
        self._record_count = 0  # shared records so far
        self._shared: dict[int, Any] = {}  # number -> reference in the object store
        self._queue: collections.deque[_Call] = collections.deque()
        self._running: dict[Any, tuple[int, _Call]] = {}  # reference -> worker, call
        self._at_worker: list[collections.deque[Any]] = [collections.deque() for _ in range(count)]
        self._failed_starts: set[int] | None = set()  # None once a worker has started
        self._new = set(range(count))  # workers without a reply so far
        self._starting = {w.pid.remote(): i for i, w in enumerate(self._workers)}  # no answer yet

    def __enter__(self) -> "RayGrid":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages. Their shared record goes into the object store, and to a worker, once."""
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
                    numbers[id(record)] = self._record_count
                    fresh[self._record_count] = ray.put(record)
                    self._record_count += 1
                shared = numbers[id(record)]
            jobs.append(
                _Job(
                    message=message if key is None else _without(message, key),
                    context=self._contexts[message.metadata.dst_node_id],
                    cost=self._costs.get(message.metadata.dst_node_id, 1.0),
                    shared=shared,
                    shared_key=key,
                    seconds=self._seconds.get(_timing_key(message), 0.0),
                    adapter_bytes=wire.adapter_bytes(message.content),
                )
            )
        if fresh:
            oldest = min(fresh) - MAX_CACHED_RECORDS
            self._shared = {n: r for n, r in self._shared.items() if n >= oldest} | fresh
            for index in self._started():
                self._workers[index].store_shared.remote(list(fresh), *fresh.values())
        self._queue.clear()  # no caller waits for the messages of an earlier push
        self._queue.extend(_group(jobs, len(self._workers)))
        self._begin_exchange([job.message for job in jobs])
        self._dispatch()
        return [job.message.metadata.message_id for job in jobs]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived; wait up to 0.1 s for the first.

        Raises:
            ChildProcessError: If the fork server of the workers has ended, or no worker can start.
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
        self._admit()
        self._dispatch()
        for reply in replies:
            set_message_id(reply)
        self.answered += len(replies)
        return replies

    def _started(self) -> list[int]:
        """The numbers of the workers that have answered."""
        starting = self._starting.values()
        return [index for index in range(len(self._workers)) if index not in starting]

    def _admit(self) -> None:
        """Count in the workers that have started, or cannot start; wait for one if none works."""
        if not self._starting:
            return
        ready, _ = ray.wait(
            list(self._starting),
            num_returns=len(self._starting) if self._running else 1,
            timeout=0.0 if self._running else 0.1,
        )
        for reference in ready:
            index = self._starting.pop(reference)
            self._count_start(index, reference)
            if self._shared:
                self._workers[index].store_shared.remote(list(self._shared), *self._shared.values())

    def _count_start(self, index: int, reference: Any) -> None:
        """Log why a worker could not start. Raises a ChildProcessError where none ever could."""
        try:
            ray.get(reference)
            self._failed_starts = None
        except RayError as error:
            log.warning("a worker could not start: %s", _cause(error))
            if self._failed_starts is None:
                return
            self._failed_starts.add(index)
            if len(self._failed_starts) == len(self._workers):
                raise ChildProcessError(f"no worker can start: {_cause(error)}") from error

    def _dispatch(self) -> None:
        """Send calls to idle workers, and queue short calls behind a running one."""
        started = self._started()
        for depth in range(1, MAX_QUEUED_CALLS + 1):
            for index in started:
                calls = self._at_worker[index]
                if not self._queue or (
                    depth > 1 and not 0 < self._queue[0].seconds <= SHORT_CALL_SECONDS
                ):
                    return
                if len(calls) >= depth:
                    continue
                if calls and (self._queue[0].is_retry or self._running[calls[0]][1].is_retry):
                    continue
                todo = self._queue.popleft()
                for job in todo.jobs:
                    job.attempts += 1
                reference = self._workers[index].handle.remote(
                    # plain pickle, because Ray's serialisation takes several times as long
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
                if not calls:
                    todo.started = time.monotonic()
                calls.append(reference)
                self._running[reference] = (index, todo)

    def _collect(self, reference: Any) -> list[Message]:
        """Return the replies of a finished call; none if its worker or its result is lost.

        Such a call is retried. An institution that had answered gives its stored answer again.
        """
        index, done = self._running.pop(reference)
        replies: list[tuple[Message, RecordDict | None]]
        try:
            replies = pickle.loads(ray.get(reference))
        except RayTaskError:
            replies = [(error_reply(job.message, 2, "worker"), None) for job in done.jobs]
        except RayError as error:
            log.warning("a worker ended: %s", _cause(error))
            return self._replace(index, reference, done, WORKER_DIED)
        self._new.discard(index)
        seconds, expected = time.monotonic() - done.started, done.seconds
        self._at_worker[index].remove(reference)
        if self._at_worker[index]:
            _, following = self._running[self._at_worker[index][0]]
            following.started = time.monotonic()
        costs = sum(job.cost for job in done.jobs)
        for job, (_, state) in zip(done.jobs, replies, strict=True):
            share = job.seconds / expected if expected else job.cost / costs
            self._seconds[_timing_key(job.message)] = seconds * share
            if state is not None:
                job.context.state = state
        return [reply for reply, _ in replies]

    def _end_overdue(self) -> list[Message]:
        """Replace workers whose call exceeds its time limit; return the error replies."""
        now = time.monotonic()
        replies: list[Message] = []
        for index, calls in enumerate(self._at_worker):
            if calls and calls[0] in self._running:
                _, late = self._running[calls[0]]
                limit = late.limit + (STARTUP_SECONDS if index in self._new else 0.0)
                if late.started and now - late.started > limit:
                    for job in late.jobs:  # a hanging institution would hang again
                        job.attempts += 1
                    del self._running[calls[0]]
                    replies += self._replace(index, calls[0], late, TIMEOUT)
        return replies

    def _replace(self, index: int, reference: Any, lost: _Call, code: int) -> list[Message]:
        """Start a new worker in place of a dead one.

        Where its machine was lost there may be no place for it until another machine joins. It gets
        work once it answers.

        The running call is split into its messages. A single message is retried, or reported after
        `MAX_ATTEMPTS`. A queued call had not begun and is queued again.
        """
        ray.kill(self._workers[index])
        self._workers[index] = self._start_worker(*self._arguments)
        self._new.add(index)
        self._starting[self._workers[index].pid.remote()] = index
        # A queued call may report the death before the running call does.
        calls = [
            lost if r == reference else self._running.pop(r)[1] for r in self._at_worker[index]
        ]
        self._at_worker[index].clear()
        ran, *behind = calls
        for waiting in reversed(behind):
            waiting.started = 0.0
            for job in waiting.jobs:
                job.attempts -= 1
            self._queue.appendleft(waiting)
        if len(ran.jobs) == 1 and ran.jobs[0].attempts >= MAX_ATTEMPTS:
            return [error_reply(ran.jobs[0].message, code, "ended")]
        for job in reversed(ran.jobs):
            job.failed = True
            self._queue.appendleft(_Call(jobs=[job]))
        return []


def _cause(error: RayError) -> str:
    """The last line of an error of Ray, which says what happened; those before it say where."""
    return str(error).strip().rpartition("\n")[2].strip()


def _timing_key(message: Message) -> tuple[int, str]:
    """Return the node and type of a message. Messages with equal keys take about equally long."""
    return message.metadata.dst_node_id, message.metadata.message_type


def _group(jobs: list[_Job], workers: int) -> list[_Call]:
    """Group jobs into calls of about equal duration, the longest first.

    Few untimed messages share a call, because their duration is unknown. The timed messages of a
    call take at most half the time limit of one message, so that a hanging one is noticed in time.
    """
    untimed = [job for job in jobs if not job.seconds]
    most = math.ceil(len(untimed) / workers) or 1
    most = min(most, UNTIMED_TOGETHER, fitting(job.adapter_bytes for job in untimed))
    calls = _balance(untimed, math.ceil(len(untimed) / most), most, lambda job: job.cost)
    timed = [job for job in jobs if job.seconds]
    if timed:
        shortest = min(job.message.metadata.ttl for job in timed) / 2
        most = fitting(job.adapter_bytes for job in timed)
        needed = max(len(timed) / most, sum(job.seconds for job in timed) / shortest)
        count = min(len(timed), workers * math.ceil(max(1, needed / workers)))
        shares = _balance(timed, count, most, lambda job: job.seconds)
        calls += sorted(shares, key=lambda c: -c.seconds)
    return calls


def _balance(jobs: list[_Job], count: int, most: int, size: Callable[[_Job], float]) -> list[_Call]:
    """Distribute jobs over up to ``count`` calls of about equal size and at most ``most`` jobs."""
    shares = [_Call(jobs=[]) for _ in range(count)]
    heap = [(0.0, number) for number in range(count)]
    for job in sorted(jobs, key=size, reverse=True):
        total, number = heapq.heappop(heap)
        shares[number].jobs.append(job)
        if len(shares[number].jobs) < most:
            heapq.heappush(heap, (total + size(job), number))
    return [share for share in shares if share.jobs]


def _max_workers(threads: int, gpus: float) -> int:
    """Return the number of workers that fit into the cluster.

    Raises:
        InputError: If not even one fits.
    """
    nodes: list[Mapping[str, float]] = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    count = sum(_fitting(node, threads, gpus) for node in nodes)
    if count < 1:
        said = ", ".join(f"{n.get('CPU', 0):g} cores and {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise InputError(
            f"engine.threads is {threads} and engine.gpus {gpus:g}, but there is no machine with "
            f"as many, only {said}; lower them"
        )
    return count


def _fitting(node: Mapping[str, float], threads: int, gpus: float) -> int:
    """The number of workers that fit on one machine."""
    count, cards = int(node.get("CPU", 0)) // threads, node.get("GPU", 0.0)
    if gpus:  # a share below 1 stays on one card
        count = min(count, int(cards * int(1 / gpus)) if gpus <= 1 else int(cards // gpus))
    return count


def _without(message: Message, key: str) -> Message:
    """Return the message without one record, under the same id."""
    content = RecordDict({k: v for k, v in message.content.items() if k != key})
    make: Any = Message  # the published signatures omit metadata
    return make(content, metadata=message.metadata)


@contextlib.contextmanager
def started(address: str, cores: int) -> Iterator[None]:
    """Run Ray until the block ends: join a cluster, or start Ray on this machine.

    The main thread must enter the block: Ray's processes end with the thread that started them.

    Args:
        address: The cluster to join; empty to start Ray on this machine.
        cores: Cores for workers on this machine.
    """
    if ray.is_initialized():  # the caller that started Ray ends it
        yield
        return
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # the grid starts its own
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        if address:
            stack.callback(ray.shutdown)
            root = str(Path(__file__).resolve().parents[2])
            ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": root}}, **quiet)
        else:
            # Ray lets everybody write to its directory, which has the sockets of its processes.
            # Its place is short because the path of a socket is.
            made = tempfile.TemporaryDirectory(
                prefix="fedlora-ray-", dir="/tmp", ignore_cleanup_errors=True
            )
            directory = stack.enter_context(made)
            stack.callback(ray.shutdown)  # also of a Ray that started in part
            with _locally():
                ray.init(
                    num_cpus=cores,
                    include_dashboard=False,
                    object_store_memory=512 * 2**20,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=f"{directory}/ray",
                    **quiet,
                )
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init replaced it
        yield


@contextlib.contextmanager
def _locally() -> Iterator[None]:
    """Have Ray start on the loopback, without log monitor, autoscaler monitor and web server.

    Ray would listen on every address of the machine, and replaces the loopback's by the machine's.
    Each of the three services is a Python process that costs memory, and a second at the end. Ray
    also polls for its own node once per second; here it polls every 20 ms. ``ray.init`` has no
    argument for any of this, so four private names are replaced while Ray starts.
    """
    params, serve, get = parameter.RayParams, Node.start_api_server, services.get_node
    resolve = services.resolve_ip_for_localhost
    without: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}

    def get_node(gcs_address: str, node_id: str) -> Any:
        nodes = GlobalState()
        nodes._initialize_global_state(services._get_gcs_client_options(gcs_address))
        for _ in range(100):
            if any(node["NodeID"] == node_id for node in nodes.node_table()):
                break
            time.sleep(0.02)
        return get(gcs_address, node_id)

    parameter.RayParams = functools.partial(params, **without)
    Node.start_api_server = lambda *_, **__: None
    services.get_node = get_node
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        parameter.RayParams, Node.start_api_server, services.get_node = params, serve, get
        services.resolve_ip_for_localhost = resolve
