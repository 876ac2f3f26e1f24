"""One simulated run, from a resolved configuration to a complete run directory.

This process imports and loads once for all workers on this machine, which are forks of it.
"""

import contextlib
import importlib
import json
import logging
import operator
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora import logs
from fedlora.config import RunConfig, check_threads
from fedlora.errors import InputError
from fedlora.startup import importing, uncollected
from fedlora.terminal import Terminal

if TYPE_CHECKING:
    from fedlora.shards import Federation
    from simulation.engines.forkserver import ForkServer
    from simulation.engines.grid import SimulationGrid

CLIENT_APP = "client.app:app"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a simulation needs before its institutions can be asked anything.

    Args:
        records: The tokenised records.
        forks: What workers are forked from; None where they have to start by themselves: on other
            machines, on GPUs, whose state does not survive a fork, with several threads, which do
            not either, on systems that have not what it takes, and in later runs of a process, on
            other records or another model than its first one.
    """

    records: "Federation"
    forks: "ForkServer | None"


def simulate(config: RunConfig, kind: str, console: Terminal) -> dict[str, Any]:
    """Run a federation from its records to a complete run directory, and show progress.

    Args:
        config: The run; its run directory is absolute and free, or holds the run to resume.
        kind: ``ray`` or ``inline``.
        console: Where progress is shown.

    Returns:
        The content of ``result.json``.

    Raises:
        InputError: Before anything is written, naming value, bound and remedy.
    """
    from simulation.progress import progress

    with console.status("reading records"):
        records = prepare(config)
    console.write_line(
        f"{len(records.names)} institutions, {records.counts['rows']:,} rows; "
        f"results in {config.run_dir}"
    )
    with contextlib.ExitStack() as stack:
        with console.status("loading the base model, starting workers"):
            loaded = stack.enter_context(load(kind, config))
            grid = stack.enter_context(open_engine(kind, config, loaded))
        with progress(config, grid, console):
            run_rounds(config, grid)
    return json.loads((Path(config.run_dir) / "result.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def load(kind: str, config: RunConfig) -> Iterator[Loaded]:
    """Read the records, check the budgets, load the base model, then start Ray.

    Args:
        kind: ``ray`` or ``inline``.
        config: The run.

    Raises:
        InputError: As `prepare` and `check_budgets`, if the base model cannot be loaded, and if
            nobody answers at the cluster's address.
    """
    if kind == "ray":
        _reach(config.engine.ray_address)
    if not config.engine.ray_address:  # a cluster's machines have processors of their own
        check_threads("engine.threads", config.engine.threads)
    records = prepare(config)
    with importing():  # and loading: a collection in between would look at all that was imported
        if config.privacy.enabled:
            check_budgets(config)  # forks have the plans that it makes
        import torch

        from fedlora import trainable

        for name in _modules(config):
            importlib.import_module(name)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # others would be gone in a fork, which would wait for them
        try:
            work = trainable.load(config, records.labels)
        finally:
            torch.set_num_threads(threads)
    if kind == "inline":
        yield Loaded(records=records, forks=None)
        return
    forks, settings = _forks(config, (records, work)), config.engine
    with importing():
        from simulation.engines import ray

    cores = max(settings.workers * settings.threads, os.cpu_count() or 1)
    with ray.started(settings.ray_address, cores):
        yield Loaded(records=records, forks=forks)


def _reach(address: str) -> None:
    """Refuse a cluster's address where nobody answers; Ray would try for over a minute.

    Raises:
        InputError: Naming it.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # none, or a name that Ray looks up by itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"engine.ray-address is {address}, where nobody answers ({error}); start Ray there "
            "(ray start --head) or give another address"
        ) from None


def _modules(config: RunConfig) -> list[str]:
    """What institutions and server import."""
    private = ["client.dp_sgd"] if config.privacy.enabled else []
    return [CLIENT_APP.partition(":")[0], *private, "server.app"]


_first: "tuple[ForkServer, tuple[object, object]] | None" = None
"""Of this process's first run on Ray, with the records and the model that its forks have: later
runs find Ray imported, which no fork may have."""


def _forks(config: RunConfig, loaded: tuple[object, object]) -> "ForkServer | None":
    global _first
    if config.engine.ray_address or config.engine.gpus or config.engine.threads > 1:
        return None
    if _first is not None:
        server, of_first = _first
        return server if server.alive and all(map(operator.is_, of_first, loaded)) else None
    if "ray" in sys.modules:
        return None
    from simulation.engines.forkserver import ForkServer

    try:
        _first = ForkServer(), loaded
    except (AttributeError, OSError):  # no such sockets or descriptors, or a path too long
        return None
    return _first[0]


@contextlib.contextmanager
def open_engine(kind: str, config: RunConfig, loaded: Loaded) -> "Iterator[SimulationGrid]":
    """The Grid that a simulation runs on.

    Args:
        kind: ``ray`` or ``inline``.
        config: The run; only its engine keys and run directory are read here.
        loaded: Of the same run.
    """
    log = str(Path(config.run_dir) / "institutions.log")
    settings, institutions = config.engine, len(loaded.records.names)
    if kind == "inline":
        with importing():
            from client.app import app
            from simulation.engines.inline import InlineGrid

        with _logging_to(log):
            yield InlineGrid(app, institutions, config.shared())
    else:
        from simulation.engines.ray import RayGrid

        with RayGrid(
            CLIENT_APP,
            institutions,
            config.shared(),
            workers=settings.workers,
            threads=settings.threads,
            gpus=settings.gpus,
            log=log,
            forks=loaded.forks,
            costs=_costs(config, loaded.records),
        ) as grid:
            yield grid


def _costs(config: RunConfig, records: "Federation") -> list[float]:
    """Expected tokens of each institution's training step."""
    from fedlora import accounting

    training = config.training
    costs: list[float] = []
    for index in range(len(records.names)):
        shard = records.train(index)
        private = config.privacy.enabled
        size = accounting.public_size(shard.num_units) if private else len(shard)
        rate = accounting.sample_rate(training.sample_rate, training.batch_size, size)
        costs.append(rate * float(shard.lengths.sum()))
    return costs


def prepare(config: RunConfig) -> "Federation":
    """The tokenised records; what is wrong with the data or the base model's files shows here.

    Raises:
        InputError: Naming value, bound and remedy.
    """
    from fedlora import records
    from fedlora.files import existing_parent

    if config.deployed:
        raise InputError(
            "data.source is 'institutions', which is a deployment's; to simulate, name the records"
        )
    with uncollected():  # a tokenizer brings torch; what is cached needs none
        federation = records.load(config)
    if config.privacy.enabled:
        try:
            existing_parent(Path(config.privacy.ledger or config.run_dir))
        except OSError as error:
            raise InputError(
                f"privacy.ledger needs a directory to write to, but {error}; give another"
            ) from None
    return federation


def check_budgets(config: RunConfig) -> None:
    """Plan the noise of every size class, so that a budget that fits nobody is known by now.

    Raises:
        InputError: Naming value, bound and remedy.
    """
    from fedlora import accounting, records
    from fedlora.budget import plan_run
    from strategies import base

    federation = records.load(config)
    institutions, rounds = len(federation.names), config.federation
    units = (federation.train(i).num_units for i in range(institutions))
    cap = base.participations(rounds.rounds, institutions, rounds.institutions_per_round)
    for size in sorted({accounting.public_size(count) for count in units}):
        plan_run(config, size, cap)


def run_rounds(config: RunConfig, grid: "SimulationGrid") -> None:
    """Run the ServerApp on a grid, in this process.

    Raises:
        InputError: Before anything is written, naming value, bound and remedy.
    """
    from server.app import app
    from simulation.engines.grid import run_server

    run_server(app, grid, config.flat())


@contextlib.contextmanager
def _logging_to(path: str) -> Iterator[None]:
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logs.OneLine("%(asctime)s %(levelname)s %(message)s"))
    logger: Any = logging.getLogger("fedlora.client")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
