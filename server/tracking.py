"""Copies of a run's figures in MLflow and TensorBoard, and of its files in MLflow.

Trackers are off, and not imported, unless configured. Figures are those of rounds.jsonl; files are
the adapter, ``privacy.json`` and the report.
"""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.config.config import RunConfig
from fedlora.errors import InputError
from fedlora.runs.run_files import PRIVACY

log = logging.getLogger("fedlora.server")

EXPERIMENT = "fedlora"
IDENTITY, PARENT = "fedlora_run", "mlflow.parentRunId"
"""Tags of a run in MLflow: fedlora's identity of the run, and MLflow's own for nested runs."""
SWEEP = "FEDLORA_MLFLOW_PARENT"
"""In the environment of a sweep's cells: the id of the sweep's run in MLflow."""


def check(config: RunConfig) -> None:
    """Refuse a configuration whose tracker is not installed.

    Raises:
        InputError: Naming the key and the package to install.
    """
    for name in ("mlflow", "tensorboard"):
        value = getattr(config.tracking, name)
        if value and importlib.util.find_spec(name) is None:
            raise InputError(
                f"tracking.{name} is {value!r}, but {name} is not installed; run: "
                f"pip install {name}, or leave it empty"
            )


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the whole federation in a line of rounds.jsonl."""
    found = {
        "seconds": record["seconds"],
        "updates": record["updates"],
        "epsilon_max": record["epsilon_max"],
        "bytes": sum(i["sent"] + i["received"] for i in record["institutions"].values()),
        **record["metrics"],
    }
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float)}


class Tracking:
    """The trackers that a run has configured, if any.

    A tracker that fails during the run is dropped with a warning, since it holds copies only.

    Args:
        config: The run.
        run: The run's identity, so that a resumed run continues in the same place.
    """

    def __init__(self, config: RunConfig, run: str) -> None:
        self._directory, self._model = Path(config.run_dir), config.tracking.mlflow_model
        self._board: Any = None
        self._client: Any = None
        self._id = ""
        if config.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            place = Path(config.tracking.tensorboard, f"{_name(config)}-{run[:8]}")
            self._board = SummaryWriter(str(place))
        if config.tracking.mlflow:
            try:
                self._client = _client(config)
                tags = {PARENT: os.environ[SWEEP]} if SWEEP in os.environ else {}
                self._id = _begin(self._client, run, _name(config), tags, config.flat())
            except Exception as error:  # of its server, file or database
                raise _unreachable(config, error) from None

    def round(self, record: Mapping[str, Any]) -> None:
        """Log one line of rounds.jsonl."""
        number, found = record["round"], figures(record)
        if self._board is not None:
            try:
                for name, value in found.items():
                    self._board.add_scalar(name, value, number)
                self._board.flush()
            except Exception as error:
                log.warning("TensorBoard gets nothing from round %d on: %s", number, error)
                self._board = None
        if self._client is not None:
            try:
                for name, value in found.items():
                    self._client.log_metric(self._id, name, value, step=number)
            except Exception as error:
                log.warning("MLflow gets nothing from round %d on: %s", number, error)
                self._client = None

    def end(self) -> None:
        """Log the run's adapter and ``privacy.json``, and mark the run as complete.

        With ``tracking.mlflow-model`` the adapter becomes a version of that registered model.
        """
        try:
            if self._board is not None:
                self._board.close()
            if self._client is not None:
                self._client.log_artifacts(self._id, str(self._directory / "adapter"), "adapter")
                self._client.log_artifact(self._id, str(self._directory / PRIVACY))
                if self._model:
                    _register(self._client, self._model, self._id)
                self._client.set_terminated(self._id)
        except Exception as error:
            log.warning("tracking ended with an error: %s", error)


def add_report(config: RunConfig, run: str, report: Path) -> None:
    """Log the page of a complete run in MLflow, if the run was tracked there.

    A failure is a warning, since the tracker holds copies only.
    """
    if not config.tracking.mlflow or not report.is_file():
        return
    try:
        client = _client(config)
        client.log_artifact(_begin(client, run, _name(config)), str(report))
    except Exception as error:
        log.warning("tracking: %s was not logged: %s", report.name, error)


def begin_sweep(config: RunConfig, out: Path) -> str:
    """Begin a sweep's run in MLflow, or find it again; runs of cells are nested under it.

    Args:
        config: Any cell's configuration.
        out: The sweep's directory, which gives it name and identity.

    Returns:
        The run's id in MLflow, for the cells' environment as `SWEEP`; empty without MLflow.

    Raises:
        InputError: If MLflow is not installed or cannot be reached.
    """
    if not config.tracking.mlflow:
        return ""
    check(config)
    try:
        identity = hashlib.sha256(str(out.absolute()).encode()).hexdigest()
        return _begin(_client(config), identity, out.name)
    except Exception as error:
        raise _unreachable(config, error) from None


def end_sweep(config: RunConfig, parent: str, results: Path) -> None:
    """Log a sweep's table in MLflow and mark the sweep's run as complete.

    A failure is a warning, since the tracker holds copies only.
    """
    try:
        client = _client(config)
        client.log_artifact(parent, str(results))
        client.set_terminated(parent)
    except Exception as error:
        log.warning("tracking of the sweep ended with an error: %s", error)


def _name(config: RunConfig) -> str:
    return Path(config.run_dir).name


def _unreachable(config: RunConfig, error: Exception) -> InputError:
    return InputError(
        f"tracking.mlflow is {config.tracking.mlflow!r}, but nothing can be logged there "
        f"({type(error).__name__}: {error}); correct it or leave it empty"
    )


def _client(config: RunConfig) -> Any:
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

    return MlflowClient(tracking_uri=config.tracking.mlflow)


def _register(client: Any, model: str, run: str) -> None:
    """Make the adapter of a run in MLflow the newest version of a registered model."""
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    source = f"{client.get_run(run).info.artifact_uri}/adapter"
    client.create_model_version(model, source=source, run_id=run)


def _begin(
    client: Any,
    run: str,
    name: str,
    tags: Mapping[str, str] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> str:
    """The id of a run in MLflow; a new one is made with these tags and parameters."""
    known = client.get_experiment_by_name(EXPERIMENT)
    experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT)
    found = client.search_runs([experiment], f"tags.{IDENTITY} = '{run}'")
    if found:
        return found[0].info.run_id
    begun = client.create_run(experiment, tags={IDENTITY: run, **(tags or {})}, run_name=name)
    for key, value in (parameters or {}).items():
        client.log_param(begun.info.run_id, key, value)
    return begun.info.run_id
