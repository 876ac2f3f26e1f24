"""Simulation on Ray core actors: each worker process keeps the base model, adapters come and go.

What a round's messages share (the global adapter) is put into the object store once. Replies are
handed over as they arrive. A worker that dies, or that an institution keeps for too long, is
replaced; an institution whose worker died is retried once, then reported as failed for the round.
"""

import collections
import importlib
import logging
import os
import pickle
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context, Message, RecordDict
from ray.exceptions import RayActorError, RayTaskError

from experiments.engines.grid import (
    RUN_ID,
    TIMEOUT,
    WORKER_DIED,
    SimulationGrid,
    call,
    error_reply,
    identify,
    stamp,
)
from fedlora import wire
from fedlora.errors import InputError

WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # more arenas only hold on to freed memory
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "100",  # batches have many shapes; kept kernels are memory
}
HELD = 8  # shared records of earlier pushes that a worker keeps
IN_FLIGHT = 4  # calls queued at a worker when they are short, so that it never waits for the driver
SHORT = 0.02  # seconds
ATTEMPTS = 2


@dataclass(kw_only=True)
class _Job:
    message: Message
    context: Context
    shared: int | None  # number of the record that the message is to get back
    shared_key: str | None
    attempts: int = 0
    started: float = 0.0


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
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logging.getLogger("fedlora").addHandler(handler)
        module, _, name = app.partition(":")
        self._app = getattr(importlib.import_module(module), name)

    def pid(self) -> int:
        return os.getpid()

    def hold(self, numbers: list[int], *records: Any) -> None:
        """Keep the records that the coming messages share; those of the push before may go on."""
        self._held = {n: r for n, r in self._held.items() if n >= numbers[0] - HELD}
        self._held.update(zip(numbers, records, strict=True))

    def handle(self, work: bytes) -> bytes:
        message, node_config, state, key, shared = pickle.loads(work)
        if key is not None and shared is not None:
            message.content[key] = self._held[shared]
        context = Context(
            run_id=RUN_ID,
            node_id=message.metadata.dst_node_id,
            node_config=node_config,
            state=state,
            run_config=self._run_config,
        )
        reply = call(self._app, message, context)
        return pickle.dumps((reply, context.state if len(context.state) else None))


class RayGrid(SimulationGrid):
    """A Grid on Ray actors.

    Use it as a context manager: leaving it ends the workers, and Ray when it started it.

    Args:
        app: The ClientApp as ``module:name``; workers import it themselves.
        institutions: Number of virtual nodes.
        run_config: Flower's run config.
        workers: Worker processes; 0 for as many as the cluster's cores allow.
        threads: Torch threads, and cores, of a worker.
        gpus: Share of a GPU that a worker takes.
        address: A cluster to join; empty to start Ray on this machine.
        log: File for the institutions' own messages; empty for none.
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
        address: str = "",
        log: str = "",
    ) -> None:
        super().__init__(institutions, run_config)
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _start_ray(address, max(workers * threads, os.cpu_count() or 1))
        count = min(_places(threads, gpus), institutions)
        count = min(workers, count) if workers else count
        self._make = (
            ray.remote(_Worker)
            .options(
                num_cpus=threads,
                num_gpus=gpus,
                max_restarts=0,
                runtime_env={"env_vars": WORKER_ENVIRONMENT},
            )
            .remote
        )
        self._arguments = (app, log, dict(run_config))
        self._workers: list[Any] = [self._make(*self._arguments) for _ in range(count)]
        self._depth = 1  # calls at a worker at a time
        self._seconds: dict[int, float] = {}  # node -> how long its last call took
        self._records = 0  # shared so far
        self._shared: dict[int, Any] = {}  # number -> reference in the object store
        self._queue: collections.deque[_Job] = collections.deque()
        self._running: dict[Any, tuple[int, _Job]] = {}  # reference -> worker, job
        self._load: list[collections.deque[Any]] = [collections.deque() for _ in range(count)]

    def __enter__(self) -> "RayGrid":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            ray.kill(worker)
        if self._owns_ray:
            ray.shutdown()

    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return ray.get([worker.pid.remote() for worker in self._workers])

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; the record that they share goes into the object store once.

        Each worker takes it from there once, too.
        """
        numbers: dict[int, int] = {}  # id of a record -> its number
        fresh: dict[int, Any] = {}
        ids: list[str] = []
        for message in messages:
            ids.append(stamp(message))
            key = wire.share_key(message)
            shared = None
            if key is not None:
                record = message.content[key]
                if id(record) not in numbers:
                    numbers[id(record)] = self._records
                    fresh[self._records] = ray.put(record)
                    self._records += 1
                shared = numbers[id(record)]
                message = _without(message, key)
            context = self._contexts[message.metadata.dst_node_id]
            self._queue.append(
                _Job(message=message, context=context, shared=shared, shared_key=key)
            )
        if fresh:
            oldest = min(fresh) - HELD
            self._shared = {n: r for n, r in self._shared.items() if n >= oldest} | fresh
            for worker in self._workers:
                worker.hold.remote(list(fresh), *fresh.values())
        # the longest first, so that none of them begins when all others are done
        self._queue = collections.deque(
            sorted(self._queue, key=lambda j: -self._seconds.get(j.message.metadata.dst_node_id, 0))
        )
        self.pushed, self.answered = len(ids), 0
        self._dispatch()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have arrived; waits up to a tenth of a second for the first."""
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
            stamp(reply)
        self.answered += len(replies)
        return replies

    def _dispatch(self) -> None:
        """Give idle workers work; where calls are short, queue some behind those that run."""
        for depth in range(1, self._depth + 1):
            for index, load in enumerate(self._load):
                # near the end of a round nobody queues behind another
                if not self._queue or (depth > 1 and len(self._queue) < len(self._load)):
                    return
                if len(load) >= depth:
                    continue
                job = self._queue.popleft()
                job.attempts += 1
                context = job.context
                reference = self._workers[index].handle.remote(
                    # plain pickle: Ray's own way of packing objects takes several times as long
                    pickle.dumps(
                        (
                            job.message,
                            context.node_config,
                            context.state,
                            job.shared_key,
                            job.shared,
                        )
                    )
                )
                if not load:
                    job.started = time.monotonic()
                load.append(reference)
                self._running[reference] = (index, job)

    def _collect(self, reference: Any) -> list[Message]:
        """The reply of a finished call; none when its worker died and the call is tried again."""
        index, job = self._running.pop(reference)
        try:
            reply, state = pickle.loads(ray.get(reference))
        except RayActorError:
            return self._replace(index, [(reference, job)], WORKER_DIED)
        except RayTaskError:
            reply, state = error_reply(job.message, 2, "worker"), None
        seconds = time.monotonic() - job.started
        self._seconds[job.message.metadata.dst_node_id] = seconds
        self._depth = IN_FLIGHT if seconds < SHORT else 1
        self._load[index].remove(reference)
        if self._load[index]:
            _, following = self._running[self._load[index][0]]
            following.started = time.monotonic()
        if state is not None:
            job.context.state = state
        return [reply]

    def _end_overdue(self) -> list[Message]:
        now = time.monotonic()
        replies: list[Message] = []
        for index, load in enumerate(self._load):
            if load and load[0] in self._running:
                _, job = self._running[load[0]]
                if job.started and now - job.started > job.message.metadata.ttl:
                    job.attempts = ATTEMPTS  # an institution that hangs would hang again
                    reference = load[0]
                    del self._running[reference]
                    replies += self._replace(index, [(reference, job)], TIMEOUT)
        return replies

    def _replace(self, index: int, lost: list[tuple[Any, _Job]], code: int) -> list[Message]:
        """A fresh worker in place of a dead one; its calls are tried again or reported."""
        ray.kill(self._workers[index])
        self._workers[index] = self._make(*self._arguments)
        if self._shared:
            self._workers[index].hold.remote(list(self._shared), *self._shared.values())
        guilty = lost[0][1] if not self._load[index] or lost[0][0] == self._load[index][0] else None
        for reference in self._load[index]:
            if reference in self._running:
                lost.append((reference, self._running.pop(reference)[1]))
        if guilty is None:  # a call behind the one that was running reported the death first
            guilty = next(job for reference, job in lost if reference == self._load[index][0])
        self._load[index].clear()
        replies: list[Message] = []
        for _, job in reversed(lost):
            job.started = 0.0
            if job is not guilty:
                job.attempts -= 1  # it had not begun
            if job.attempts >= ATTEMPTS:
                replies.append(error_reply(job.message, code, "ended"))
            else:
                self._queue.appendleft(job)
        return replies


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


def _start_ray(address: str, cores: int) -> None:
    """Join a cluster, or start Ray here without what a simulation has no use for."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    root = str(Path(__file__).resolve().parents[2])
    if address:
        ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": root}}, **quiet)
    else:
        ray.init(num_cpus=cores, include_dashboard=False, object_store_memory=512 * 2**20, **quiet)
