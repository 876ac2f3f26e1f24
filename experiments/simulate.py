"""One simulated run, from a resolved configuration to a complete run directory."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import RunConfig

if TYPE_CHECKING:
    from experiments.engines.grid import SimulationGrid
    from fedlora.shards import Federation

CLIENT_APP = "client.app:app"


@contextlib.contextmanager
def engine(kind: str, config: RunConfig, institutions: int) -> "Iterator[SimulationGrid]":
    """The Grid that a simulation runs on.

    Args:
        kind: ``ray`` or ``inline``.
        config: The run; only its engine keys and run directory are read here.
        institutions: Number of virtual nodes.
    """
    log = str(Path(config.run_dir) / "institutions.log")
    settings = config.engine
    if kind == "inline":
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
            address=settings.ray_address,
            log=log,
        ) as grid:
            yield grid


def prepare(config: RunConfig) -> "Federation":
    """Everything that can be known wrong before a model is loaded, and the tokenised records.

    Raises:
        InputError: Naming value, bound and remedy.
    """
    from client import institution
    from fedlora import accounting, models, trainable
    from fedlora.errors import InputError
    from fedlora.files import existing_parent
    from strategies import base

    models.resolve(config.model.name)
    records = trainable.records(config)
    if not config.privacy.enabled:
        return records
    institutions = len(records.names)
    units = (records.train(i).num_units for i in range(institutions))
    federation = config.federation
    cap = base.participations(federation.rounds, institutions, federation.institutions_per_round)
    for size in sorted({accounting.public_size(count) for count in units}):
        institution.budget(config, size, cap)
    try:
        existing_parent(Path(config.privacy.ledger or config.run_dir))
    except OSError as error:
        raise InputError(
            f"privacy.ledger needs a directory to write to, but {error}; give another"
        ) from None
    return records


def run(config: RunConfig, grid: "SimulationGrid") -> None:
    """Run the ServerApp on a grid, in this process."""
    from experiments.engines.grid import run_server
    from server.app import app

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
    # Torch's threads spin while they wait, and beside other work on the same cores a pass then
    # takes up to ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
