"""Copies of a run's figures in MLflow and TensorBoard.

Trackers are off, and not imported, unless configured. They get figures of rounds.jsonl only.
"""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig
from fedlora.errors import InputError

log = logging.getLogger("fedlora.server")

EXPERIMENT = "fedlora"


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
                "pip install 'fedlora[tracking]', or leave it empty"
            )


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the whole federation in a line of rounds.jsonl."""
    found = {
        "seconds": record["seconds"],
        "updates": record["updates"],
        "aggregation_error": record["aggregation_error"],
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
        self._board: Any = None
        self._client: Any = None
        self._id = ""
        if config.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(Path(config.tracking.tensorboard) / run))
        if config.tracking.mlflow:
            from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

            try:
                self._client = MlflowClient(tracking_uri=config.tracking.mlflow)
                self._id = self._begin(config, run)
            except Exception as error:  # of its server, file or database
                raise InputError(
                    f"tracking.mlflow is {config.tracking.mlflow!r}, but nothing can be logged "
                    f"there ({type(error).__name__}: {error}); correct it or leave it empty"
                ) from None

    def _begin(self, config: RunConfig, run: str) -> str:
        known = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known else self._client.create_experiment(EXPERIMENT)
        found = self._client.search_runs([experiment], f"tags.fedlora_run = '{run}'")
        if found:
            return found[0].info.run_id
        begun = self._client.create_run(
            experiment, tags={"fedlora_run": run}, run_name=Path(config.run_dir).name
        )
        for key, value in config.flat().items():
            self._client.log_param(begun.info.run_id, key, value)
        return begun.info.run_id

    def round(self, record: Mapping[str, Any]) -> None:
        """Log one line of rounds.jsonl."""
        try:
            for name, value in figures(record).items():
                if self._board is not None:
                    self._board.add_scalar(name, value, record["round"])
                if self._client is not None:
                    self._client.log_metric(self._id, name, value, step=record["round"])
            if self._board is not None:
                self._board.flush()
        except Exception as error:
            log.warning("tracking stops after round %d: %s", record["round"], error)
            self._board = self._client = None

    def end(self) -> None:
        """Mark the run as complete."""
        try:
            if self._board is not None:
                self._board.close()
            if self._client is not None:
                self._client.set_terminated(self._id)
        except Exception as error:
            log.warning("tracking ended with an error: %s", error)
