"""Simulation on Ray actors: each worker process keeps the base model for all its institutions.

Records lie once in Ray's object store, and so does the global adapter, which all messages of a
round share; base weights are mapped from files. The grid replaces a worker that dies or exceeds its
time limit. It retries an institution whose worker died once, then reports it as failed.
"""

import collections
import contextlib
import importlib
import logging
import math
import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context, Message, RecordDict
from ray.exceptions import RayError, RayTaskError

from fedlora import logs
from fedlora.config.config import from_flat
from fedlora.data import records
from fedlora.data.shards import Federation
from fedlora.errors import InputError
from fedlora.startup import ENVIRONMENT, LIBRARIES, paused_gc, trim_heap
from fedlora.wire import wire
from server.exchange import TIMEOUT, WORKER_DIED
from server.roster import UNTIMED_TOGETHER
from simulation.engines.grid import (
    RUN_ID,
    SimulationGrid,
    call_together,
    error_reply,
    fitting,
    identify,
)

log = logging.getLogger("fedlora.simulation")

LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by an address that other machines reach
MAX_ATTEMPTS = 2
STARTUP_SECONDS = 60.0  # added to the time limit of a worker's first call


@dataclass(kw_only=True)
class _Job:
    """One message to a node.

    Its key is that of the record that it shares with other messages; ``shared`` refers to that
    record in the object store.
    """

    message: Message
    context: Context
    key: str | None
    shared: Any
    attempts: int = 0


@dataclass(kw_only=True)
class _Call:
    """Messages that a worker gets at once. If the worker dies, each is retried by itself."""

    jobs: list[_Job]
    worker: Any = None
    deadline: float = 0.0


class _Worker:
    """The actor of a worker process: one ClientApp, which serves one institution after another.

    Args:
        app: The ClientApp as ``module:name``.
        log: A file for the institutions' own messages; empty for none.
        run_config: Flower's run config, sent once instead of with each call.
        federation: All records; None where the app reads none.
    """

    def __init__(
        self, app: str, log: str, run_config: Mapping[str, Any], federation: Federation | None
    ) -> None:
        identify()
        self._run_config = dict(run_config)
        if federation is not None:
            records.give(from_flat(run_config), federation)
        if log:
            logging.getLogger("fedlora").addHandler(logs.to_file(log))
        module, _, name = app.partition(":")
        with paused_gc():
            self._app = getattr(importlib.import_module(module), name)

    def pid(self) -> int:
        return os.getpid()

    def handle(
        self, work: Sequence[tuple[Message, Any, RecordDict, str | None]], *shared: Any
    ) -> list[tuple[Message, RecordDict | None]]:
        """Answer messages; ``shared`` has the record of each that another message has too."""
        calls: list[tuple[Message, Context]] = []
        for (message, node_config, state, key), record in zip(work, shared, strict=True):
            if key is not None:
                message.content[key] = record
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
        states = [context.state if len(context.state) else None for _, context in calls]
        return list(zip(replies, states, strict=True))


class RayGrid(SimulationGrid):
    """A Grid on Ray actors, as many as fit into the cluster.

    Use it as a context manager inside `started`: the exit ends the workers.

    Args:
        app: The ClientApp as ``module:name``; workers import it themselves.
        institutions: Number of virtual nodes.
        run_config: Flower's run config.
        threads: Torch threads, and cores, of a worker.
        gpus: The share of a GPU that a worker takes.
        log: A file for the institutions' own messages; empty for none.
        costs: The expected work of each institution's messages, in any unit; empty: equal.
        federation: All records, which the workers share; None where the app reads none.
    """

    def __init__(
        self,
        app: str,
        institutions: int,
        run_config: Mapping[str, Any],
        *,
        threads: int,
        gpus: float = 0.0,
        log: str = "",
        costs: Sequence[float] = (),
        federation: Federation | None = None,
    ) -> None:
        super().__init__(institutions, run_config)
        self._costs = dict(zip(self.get_node_ids(), costs, strict=bool(costs)))
        self._count = min(_max_workers(threads, gpus), institutions)
        self._actor: Any = ray.remote(_Worker).options(
            num_cpus=threads,
            num_gpus=gpus,
            max_restarts=0,
            runtime_env={"env_vars": ENVIRONMENT | LIBRARIES},
        )
        given = None if federation is None else ray.put(federation)
        self._arguments = (app, log, dict(run_config), given)
        self._queue: collections.deque[_Call] = collections.deque()
        self._running: dict[Any, _Call] = {}  # by the reference to the replies
        self._idle: list[Any] = []
        self._new: set[Any] = set()  # workers without a reply so far
        self._starting: dict[Any, Any] = {}  # by the reference to their pid
        self._failed_starts = 0
        self._started = False  # whether a worker ever has
        for _ in range(self._count):
            self._start_worker()

    @property
    def workers(self) -> list[Any]:
        """The actors of all workers, also of those that start."""
        busy = [call.worker for call in self._running.values()]
        return [*self._idle, *busy, *self._starting.values()]

    def __enter__(self) -> "RayGrid":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            ray.kill(worker)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages. Their shared record goes into the object store once."""
        pushed = self._begin(messages)
        most = fitting(pushed.values())
        stored: dict[int, Any] = {}  # by the id of the record
        jobs: list[_Job] = []
        for message in pushed.values():
            key, shared = wire.share_key(message), None
            context = self._contexts[message.metadata.dst_node_id]
            if key is not None:
                record = message.content[key]
                shared = stored.get(id(record)) or ray.put(record)
                stored[id(record)] = shared
                message = _without(message, key)
            jobs.append(_Job(message=message, context=context, key=key, shared=shared))
        jobs.sort(key=lambda job: -self._costs.get(job.context.node_id, 1.0))
        count = min(len(jobs), self._count * math.ceil(len(jobs) / (most * self._count)))
        # each call gets one job of each size; no caller waits for the messages of an earlier push
        self._queue = collections.deque(_Call(jobs=jobs[i::count]) for i in range(count))
        self._dispatch()
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived; wait up to 0.1 s for the first.

        Raises:
            ChildProcessError: If no worker can start.
        """
        replies: list[Message] = []
        if waiting := [*self._running, *self._starting]:
            for reference in ray.wait(waiting, num_returns=1, timeout=0.1)[0]:
                if reference in self._starting:
                    self._admit(reference)
                else:
                    replies += self._collect(reference)
        now = time.monotonic()
        for reference in [r for r, call in self._running.items() if call.deadline < now]:
            replies += self._replace(reference, TIMEOUT)
        self._dispatch()
        return self._end(replies)

    def _start_worker(self) -> None:
        worker = self._actor.remote(*self._arguments)
        self._new.add(worker)
        self._starting[worker.pid.remote()] = worker

    def _admit(self, reference: Any) -> None:
        """Count in a worker that has started. Raises a ChildProcessError where none ever could."""
        worker = self._starting.pop(reference)
        try:
            ray.get(reference)
        except RayError as error:
            log.warning("a worker could not start: %s", _cause(error))
            self._failed_starts += 1
            if not self._started and self._failed_starts == self._count:
                raise ChildProcessError(f"no worker can start: {_cause(error)}") from error
        else:
            self._started = True
            self._idle.append(worker)

    def _dispatch(self) -> None:
        """Send calls to idle workers."""
        while self._queue and self._idle:
            call, worker = self._queue.popleft(), self._idle.pop()
            for job in call.jobs:
                job.attempts += 1
            work = [(j.message, j.context.node_config, j.context.state, j.key) for j in call.jobs]
            # all messages' time, but no more than the server has patience for
            each = min(job.message.metadata.ttl for job in call.jobs)
            seconds = min(len(call.jobs), UNTIMED_TOGETHER) * each
            call.worker = worker
            call.deadline = time.monotonic() + seconds + STARTUP_SECONDS * (worker in self._new)
            self._running[worker.handle.remote(work, *(job.shared for job in call.jobs))] = call

    def _collect(self, reference: Any) -> list[Message]:
        """Return the replies of a finished call; none if its worker or its result is lost.

        Such a call is retried. An institution that had answered gives its stored answer again.
        """
        call = self._running[reference]
        try:
            replies = ray.get(reference)
        except RayTaskError:
            replies = [(error_reply(job.message, 2, "worker"), None) for job in call.jobs]
        except RayError as error:
            log.warning("a worker ended: %s", _cause(error))
            return self._replace(reference, WORKER_DIED)
        del self._running[reference]
        self._new.discard(call.worker)
        self._idle.append(call.worker)
        for job, (_, state) in zip(call.jobs, replies, strict=True):
            if state is not None:
                job.context.state = state
        return [reply for reply, _ in replies]

    def _replace(self, reference: Any, code: int) -> list[Message]:
        """Start a new worker in place of a dead or late one, and retry its messages one by one.

        Where its machine was lost there may be no place for the new worker until another machine
        joins. It gets work once it answers.

        Returns:
            An error in place of a message's last attempt, if it was alone in its call.
        """
        call = self._running.pop(reference)
        ray.kill(call.worker)
        self._new.discard(call.worker)
        self._start_worker()
        last = MAX_ATTEMPTS if code == WORKER_DIED else 1  # one that hangs would hang again
        if len(call.jobs) == 1 and call.jobs[0].attempts >= last:
            return [error_reply(call.jobs[0].message, code, "ended")]
        self._queue.extendleft(_Call(jobs=[job]) for job in reversed(call.jobs))
        return []


def _cause(error: RayError) -> str:
    """The last line of an error of Ray, which says what happened; those before it say where."""
    return str(error).strip().rpartition("\n")[2].strip()


def _max_workers(threads: int, gpus: float) -> int:
    """Return the number of workers that fit into the cluster.

    Raises:
        InputError: If not even one fits.
    """
    count, said = 0, list[str]()
    for node in ray.nodes():
        if node["Alive"]:
            cores, cards = int(node["Resources"].get("CPU", 0)), node["Resources"].get("GPU", 0.0)
            said.append(f"{cores} cores and {cards:g} GPUs")
            fits = cores // threads
            if gpus:  # a share below 1 stays on one card
                fits = min(fits, int(cards * int(1 / gpus) if gpus <= 1 else cards // gpus))
            count += fits
    if count < 1:
        raise InputError(
            f"engine.threads is {threads} and engine.gpus {gpus:g}, but there is no machine with "
            f"as many, only {', '.join(said)}; lower them"
        )
    return count


def _without(message: Message, key: str) -> Message:
    """Return the message without one record, under the same id."""
    content = RecordDict({k: v for k, v in message.content.items() if k != key})
    make: Any = Message  # the published signatures omit metadata
    return make(content, metadata=message.metadata)


@contextlib.contextmanager
def started(address: str, cores: int) -> Iterator[None]:
    """Run Ray until the block ends: join a cluster, or start Ray on this machine's loopback.

    The main thread must enter the block: Ray's processes end with the thread that started them.

    Args:
        address: The cluster to join; empty to start Ray on this machine.
        cores: Cores for workers on this machine.
    """
    if ray.is_initialized():  # the caller that started Ray ends it
        yield
        return
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
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
