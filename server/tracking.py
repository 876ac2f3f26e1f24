"""Copies of a run's figures in MLflow and TensorBoard, as built-in ``tracking.callbacks``.

Each is made for a run and called with each line of rounds.jsonl. What they log is in that line: the
server and its institutions send them nothing else. A tracker that fails is dropped with a warning,
since it holds copies only.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.config.config import RunConfig
from fedlora.errors import InputError

log = logging.getLogger("fedlora.server")

EXPERIMENT, IDENTITY = "fedlora", "fedlora_run"
"""The experiment in MLflow, and the tag with a run's directory, by which a resumed run is found."""


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


class _Tracker:
    """A tracker that is dropped when it fails."""

    name = ""

    def __init__(self, config: RunConfig) -> None:
        self._failed = False
        try:
            self._begin(config)
        except ImportError as error:
            raise InputError(
                f"tracking.callbacks names {self.name}, which cannot be imported ({error}); run: "
                "pip install 'fedlora[tracking]', or leave it out"
            ) from None

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self._failed:
            return
        try:
            self._log(figures(record), record["round"])
        except Exception as error:
            log.warning("%s gets nothing from round %d on: %s", self.name, record["round"], error)
            self._failed = True

    def _begin(self, config: RunConfig) -> None:
        raise NotImplementedError

    def _log(self, found: Mapping[str, float], number: int) -> None:
        raise NotImplementedError


class tensorboard(_Tracker):  # noqa: N801  (a configuration names it)
    """Event files in ``RUN_DIR/tensorboard``."""

    name = "TensorBoard"

    def _begin(self, config: RunConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(Path(config.run_dir, "tensorboard")))

    def _log(self, found: Mapping[str, float], number: int) -> None:
        for name, value in found.items():
            self._board.add_scalar(name, value, number)
        self._board.flush()


class mlflow(_Tracker):  # noqa: N801
    """A run in the MLflow of ``MLFLOW_TRACKING_URI``."""

    name = "MLflow"

    def _begin(self, config: RunConfig) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        self._client: Any = MlflowClient()
        known = self._client.get_experiment_by_name(EXPERIMENT)
        place = known.experiment_id if known else self._client.create_experiment(EXPERIMENT)
        found = self._client.search_runs([place], f"tags.{IDENTITY} = '{config.run_dir}'")
        begun = (
            found[0]
            if found
            else self._client.create_run(
                place, tags={IDENTITY: config.run_dir}, run_name=Path(config.run_dir).name
            )
        )
        self._run = begun.info.run_id
        for key, value in ({} if found else config.public()).items():
            self._client.log_param(self._run, key, value)

    def _log(self, found: Mapping[str, float], number: int) -> None:
        for name, value in found.items():
            self._client.log_metric(self._run, name, value, step=number)
