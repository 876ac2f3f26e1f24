"""One simulated run, from a resolved configuration to a complete run directory.

A run that was prepared before starts fast because nothing waits for torch: records that are cached
open without it, and Ray comes up, and what its workers are forked from imports, while this process
does.
"""

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import RunConfig
from fedlora.startup import importing

if TYPE_CHECKING:
    from experiments.engines.forkserver import ForkServer
    from experiments.engines.grid import SimulationGrid
    from fedlora.shards import Federation

CLIENT_APP = "client.app:app"
FAULTS = 0.3
"""Seconds in which much that is wrong with the records shows; only then is Ray started."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a simulation needs before its institutions can be asked anything.

    Args:
        records: The tokenised records.
        forks: What workers are forked from; None where they have to import by themselves: on other
            machines, on GPUs, whose state does not survive a fork, and on systems that have not
            what it takes.
    """

    records: "Federation"
    forks: "ForkServer | None"


@contextlib.contextmanager
def ready(kind: str, config: RunConfig) -> Iterator[Ready]:
    """Read the records, while Ray and what workers are forked from come up.

    Args:
        kind: ``ray`` or ``inline``.
        config: The run.

    Raises:
        InputError: As `prepare`.
    """
    with contextlib.ExitStack() as stack:
        if kind == "inline":
            yield Ready(records=prepare(config), forks=None)
            return
        forks = stack.enter_context(_forks(config))
        reader = stack.enter_context(ThreadPoolExecutor(1))
        reading = reader.submit(prepare, config)
        wait([reading], timeout=FAULTS)
        if not (reading.done() and reading.exception()):
            settings = config.engine
            with importing():
                from experiments.engines import ray

            cores = max(settings.workers * settings.threads, os.cpu_count() or 1)
            stack.enter_context(ray.started(settings.ray_address, cores))
        records = reading.result()
        reader.submit(_import_server)  # `run` waits for it where it imports
        yield Ready(records=records, forks=forks)


def _forks(config: RunConfig) -> "contextlib.AbstractContextManager[ForkServer | None]":
    if config.engine.ray_address or config.engine.gpus:
        return contextlib.nullcontext()
    from client.trainer import ENVIRONMENT
    from experiments.engines.forkserver import ForkServer

    modules = [CLIENT_APP.partition(":")[0]]
    modules += ["client.dp_sgd"] if config.privacy.enabled else []
    try:
        return ForkServer(modules, ENVIRONMENT)
    except (AttributeError, OSError):  # no such sockets or descriptors, or a path too long
        return contextlib.nullcontext()


@contextlib.contextmanager
def engine(kind: str, config: RunConfig, ready: Ready) -> "Iterator[SimulationGrid]":
    """The Grid that a simulation runs on.

    Args:
        kind: ``ray`` or ``inline``.
        config: The run; only its engine keys and run directory are read here.
        ready: Of the same run.
    """
    log = str(Path(config.run_dir) / "institutions.log")
    settings, institutions = config.engine, len(ready.records.names)
    if kind == "inline":
        with importing():
            from client.app import app
            from experiments.engines.inline import InlineGrid

        with _logging_to(log):
            yield InlineGrid(app, institutions, config.flat())
    else:
        from experiments.engines.ray import RayGrid

        with RayGrid(
            CLIENT_APP,
            institutions,
            config.flat(),
            workers=settings.workers,
            threads=settings.threads,
            gpus=settings.gpus,
            log=log,
            forks=ready.forks,
        ) as grid:
            yield grid


def _import_server() -> None:
    with importing():
        for name in ("server.app", "client.institution"):
            importlib.import_module(name)


def prepare(config: RunConfig) -> "Federation":
    """The tokenised records; what is wrong with the data or the base model's files shows here.

    Raises:
        InputError: Naming value, bound and remedy.
    """
    from fedlora import records
    from fedlora.errors import InputError
    from fedlora.files import existing_parent

    if config.deployed:
        raise InputError(
            "data.source is 'institutions', which is a deployment's; to simulate, name the records"
        )
    with importing():  # a tokenizer brings torch
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
    from client import institution
    from fedlora import accounting, records
    from strategies import base

    federation = records.load(config)
    institutions, rounds = len(federation.names), config.federation
    units = (federation.train(i).num_units for i in range(institutions))
    cap = base.participations(rounds.rounds, institutions, rounds.institutions_per_round)
    for size in sorted({accounting.public_size(count) for count in units}):
        institution.budget(config, size, cap)


def run(config: RunConfig, grid: "SimulationGrid") -> None:
    """Run the ServerApp on a grid, in this process.

    Raises:
        InputError: Before anything is written, naming value, bound and remedy.
    """
    from experiments.engines.grid import run_server
    from server.app import app

    if config.privacy.enabled:
        check_budgets(config)
    run_server(app, grid, config.flat())


@contextlib.contextmanager
def _logging_to(path: str) -> Iterator[None]:
    handler = logging.FileHandler(path, delay=True)
    logger: Any = logging.getLogger("fedlora.client")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def quiet_libraries() -> None:
    """Settings that libraries read when they are imported."""
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it warns of optional kernels at import
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else bitsandbytes imports a compiler
    # Torch's threads spin while they wait, and beside other work on the same cores a pass then
    # takes up to ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
