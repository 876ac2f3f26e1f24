"""The work that fedlora and its rivals do side by side, and the command of each side.

Rivals get exactly the rows of fedlora's institutions, as CSV files, and every number that
determines the work: steps, batch, learning rate, rank, seed, and under DP the noise that
fedlora plans for each institution. Under DP batches are Poisson samples, of expected sizes that
differ a little: Opacus takes one over the number of batches as its rate, so fedlora's rate is set
such that both see equally many rows.
"""

import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config.config import RunConfig, load
from fedlora.data.rows import PartitionedRows, Table, partition_rows
from fedlora.models import model_files
from fedlora.models.lora import TARGETS
from fedlora.models.models import fast_bf16

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "work.toml"


@dataclass(frozen=True, kw_only=True)
class Work:
    """The amount of work, and whether it is under DP (epsilon 8 for each institution's records)."""

    institutions: int = 10
    rounds: int = 3
    steps: int = 5
    private: bool = False
    seed: int = 1

    def config(self) -> RunConfig:
        """The run of fedlora."""
        return load(CONFIG, self._values())

    def _values(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "data.institutions": self.institutions,
            "data.min-records": 1,  # of a partition by value the default is 8
            "federation.rounds": self.rounds,
            "training.local-steps": self.steps,
            "seed": self.seed,
            "adapter.head": "zero",  # as the rivals' heads
        }
        if self.private:
            values |= {
                "privacy.epsilon": 8.0,
                "training.batch-size": _rate(replace(self, private=False).config()),
                "federation.weighting": "public-size",  # exact counts may not leave
            }
        return values

    def fedlora(self, out: Path) -> list[str]:
        """The command that runs the work with fedlora; its output has the accuracy."""
        assigned = [f"{key}={value}" for key, value in self._values().items()]
        return [
            *(str(Path(sys.executable).with_name("fedlora")), "run", str(CONFIG)),
            *(word for each in assigned for word in ("--set", each)),
            *("--out", str(out), "--json"),
        ]

    def write(self, directory: Path) -> Path:
        """Write the rows and the numbers of a rival; return the file that names all of them."""
        config = self.config()
        dealt = _dealt(config)
        train, bounds = dealt.train
        shards: dict[str, str] = {}
        for index, name in enumerate(dealt.names):
            rows = np.arange(bounds[index], bounds[index + 1])
            shards[name] = _csv(directory / f"{name}.csv", train.take(rows))
        held_out = _csv(directory / "held-out.csv", dealt.held_out[0])
        training, adapter = config.training, config.adapter
        said = {
            "model": str(model_files.resolve(config.model.name).path),
            "classes": dealt.classes,
            "shards": shards,
            "held_out": held_out,
            "rounds": self.rounds,
            "steps": self.steps,
            "batch": training.batch_size,
            "learning_rate": training.learning_rate,
            "max_length": training.max_length,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "target_modules": TARGETS["bert"],
            "seed": config.seed,
            "bf16": fast_bf16("cpu"),
            "noise": _noise(config, np.diff(bounds).tolist()) if self.private else None,
            "max_grad_norm": config.privacy.max_grad_norm,
        }
        file = directory / "work.json"
        file.write_text(json.dumps(said, indent=1))
        return file


def _dealt(config: RunConfig) -> PartitionedRows:
    return partition_rows(
        config.data, unit=config.privacy.unit, seed=config.seed, task=config.model.task
    )


def _csv(path: Path, table: Table) -> str:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows(zip(table.texts, table.labels, strict=True))
    return str(path)


def _rate(config: RunConfig) -> float:
    """The sample rate with which a step of all institutions has as many rows as Opacus' step."""
    counts = np.diff(_dealt(config).train[1])
    batches = np.ceil(counts / config.training.batch_size)
    return round(float((counts / batches).sum() / counts.sum()), 4)


def _noise(config: RunConfig, counts: Sequence[int]) -> list[float]:
    """The noise multiplier that fedlora plans for each institution."""
    from fedlora.privacy.budget import plan_run

    plans = [plan_run(config, count, config.federation.rounds) for count in counts]
    return [each.noise_multiplier for each in plans]


def rival(name: str, python: Path, work: Path) -> list[str]:
    """The command of a rival, which is a file beside this one."""
    return [str(python), "-m", f"benchmarks.rival_{name}", str(work)]


def environment() -> Mapping[str, str]:
    """The environment of every side: no telemetry."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(HERE.parent),
    }
