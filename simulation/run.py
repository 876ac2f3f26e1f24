"""One simulated run, from a resolved configuration to a complete run directory."""

import contextlib
import logging
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora import logs, processors
from fedlora.config.config import RunConfig
from fedlora.config.sections import check_gpu, check_threads
from fedlora.errors import InputError, Refusal
from fedlora.extras import require
from fedlora.runs.run_files import CONFIG, LEDGERS, alone, is_complete, read_run_file
from fedlora.startup import paused_gc
from fedlora.terminal import Terminal

if TYPE_CHECKING:
    from fedlora.data.shards import Federation
    from simulation.engines.grid import SimulationGrid


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

    run_dir = Path(config.run_dir)
    resumed = (run_dir / CONFIG).exists()
    check_engine(kind)
    with console.status("reading records"):
        records = prepare(config)
        with paused_gc():
            from fedlora.data.findings import lost
            from server import population
        found = population.check(config, records)
    console.write_line(f"{len(records.names)} institutions, {records.counts['rows']:,} rows")
    for reason, count in lost(records.counts).items():
        console.write_line(f"  {count:,} left out: {reason}")
    for finding in found:
        accepted = " (accepted)" if finding.voids else ""
        console.write_line(f"warning: {finding.name}{accepted}: {finding.text}")
    with contextlib.ExitStack() as stack:
        with console.status("loading the base model, starting workers"):
            stack.enter_context(load(kind, config))
            grid = stack.enter_context(open_engine(kind, config))
        with progress(config, grid, console):
            try:
                run_rounds(config, grid, resumed=resumed)
            except ChildProcessError as error:  # Ray has no worker left
                from server.roster import RunFailed

                raise RunFailed(str(error)) from error
    return read_run_file(run_dir)


def check_engine(kind: str) -> None:
    """Refuse the Ray engine where Ray is not installed. Raises `InputError`."""
    if kind == "ray":
        require("ray", "simulation", "--engine ray (the other engine is inline)")


@contextlib.contextmanager
def load(kind: str, config: RunConfig) -> Iterator[None]:
    """Read the records, check the budgets, load the base model and start Ray.

    Args:
        kind: ``ray``, which `check_engine` has accepted, or ``inline``.
        config: The run.

    Raises:
        InputError: As `prepare` and `privacy.budget.plan_run`; also if the base model cannot be
            loaded, there is no GPU for `engine.gpus`, or no cluster answers at its address.
    """
    settings = config.engine
    cluster = os.environ.get("RAY_ADDRESS", "") if kind == "ray" else ""
    if kind == "ray":
        _reach(cluster)
    if not cluster:  # machines of a cluster have other processors
        check_threads("engine.threads", settings.threads)
        if settings.gpus:
            check_gpu(f"engine.gpus is {settings.gpus:g}", "0")
    records = prepare(config)
    with paused_gc():  # a collection would scan all imported objects
        from fedlora.data import findings
        from fedlora.models import trainable

        if config.privacy.enabled:  # an impossible budget is refused
            cap = config.federation.participations(len(records.names))
            findings.plans_of(config, records.units, cap)
        trainable.load(config, records.labels)
    if kind == "inline":
        yield
        return
    with paused_gc():
        from simulation.engines import ray

    with ray.started(cluster, processors.count()):
        yield


def _reach(address: str) -> None:
    """Refuse the address of a cluster that does not answer. Ray would try for over a minute.

    Raises:
        InputError: Naming the address.
    """
    if not address:
        _ask_for_a_token()
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # a name that Ray resolves by itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    except (OSError, UnicodeError, OverflowError) as error:
        raise InputError(
            f"RAY_ADDRESS is {address}, where no Ray cluster answers ({error}); start Ray "
            "there (ray start --head) or give another address"
        ) from None


def _ask_for_a_token() -> None:
    """Have this machine's Ray obey only processes that know a token of this one and its children.

    Otherwise any user of the machine could have Ray run code with the records at hand. Ray reads
    the environment when it is imported; where a program imported it before, its settings hold.
    """
    if "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextlib.contextmanager
def open_engine(kind: str, config: RunConfig) -> "Iterator[SimulationGrid]":
    """Open the Grid of a simulation.

    Args:
        kind: ``ray`` or ``inline``.
        config: The run; this function reads its engine keys and its run directory.
    """
    from fedlora.data import records
    from fedlora.privacy.budget import rate_of

    log = str(Path(config.run_dir) / "institutions.log")
    federation = records.load(config)
    institutions = len(federation.names)
    if kind == "inline":
        with paused_gc():
            from client.app import app
            from simulation.engines.inline import InlineGrid

        with _logging_to(log):
            yield InlineGrid(app, institutions, config.shared())
        return
    from simulation.engines.ray import RayGrid

    shards = (federation.train(index) for index in range(institutions))
    with RayGrid(
        "client.app:app",
        institutions,
        config.shared(),
        threads=config.engine.threads,
        gpus=config.engine.gpus,
        log=log,
        costs=[rate_of(config, shard) * float(shard.lengths.sum()) for shard in shards],
        federation=federation,
    ) as grid:
        yield grid


def prepare(config: RunConfig) -> "Federation":
    """Return the tokenised records; check the data and the base model's files on the way.

    Raises:
        InputError: Naming value, bound and remedy.
    """
    from fedlora.config import plugins
    from fedlora.data import records

    if config.deployed:
        raise InputError(
            "data.source is 'institutions', which is for deployments; to simulate, name the records"
        )
    for key, name in config.plug_ins:
        plugins.load(key, name)
    with paused_gc():  # a tokenizer imports torch
        return records.load(config)


def run_rounds(config: RunConfig, grid: "SimulationGrid", *, resumed: bool | None = None) -> None:
    """Run the ServerApp on a grid, in this process; no other process runs in its directory then.

    Args:
        config: The run.
        grid: Its institutions.
        resumed: Whether the directory held the run when it was asked for; None: either is right.

    Raises:
        InputError: Before anything is written, naming value, bound and remedy; also if another
            process began or completed a run in the directory meanwhile.
    """
    from server.app import app
    from simulation.engines.grid import run_server

    run_dir = Path(config.run_dir)
    with _reserved(run_dir):
        if resumed is False and (run_dir / CONFIG).exists():
            raise InputError(
                f"another process began a run in {run_dir} meanwhile; give another --out"
            )
        if resumed and is_complete(run_dir):
            raise InputError(f"another process completed the run in {run_dir} meanwhile")
        run_server(app, grid, config.flat())


@contextlib.contextmanager
def _reserved(run_dir: Path) -> Iterator[None]:
    """Make a run's directory and keep other processes out of it.

    Of a run that ends before it begins, new ledgers go, which a corrected run would meet, and of a
    refused one the new directory. They have no charges: a run writes its configuration first.
    """
    new = not run_dir.exists()
    with contextlib.suppress(OSError):  # the server says what is wrong with the place
        run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with alone(run_dir):
            new_ledgers = not (run_dir / LEDGERS).exists()
            try:
                yield
            except BaseException:
                if new_ledgers and not (run_dir / CONFIG).exists():
                    shutil.rmtree(run_dir / LEDGERS, ignore_errors=True)
                raise
    except (InputError, Refusal):
        if new and run_dir.exists() and not (run_dir / CONFIG).exists():
            shutil.rmtree(run_dir)
        raise


@contextlib.contextmanager
def _logging_to(path: str) -> Iterator[None]:
    handler = logs.to_file(path)
    logger: Any = logging.getLogger("fedlora.client")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
