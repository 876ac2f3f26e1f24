"""Seconds from `fedlora run` to the first training step, after an earlier equal run.

Usage: python -m benchmarks.start [--config experiments/configs/demo.toml] [--turns 3]

A first run fills the caches and is not counted. The command is the usual one; the institutions'
app is `benchmarks.timed_client`, which also records the time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timed_client import FIRST_STEP_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import sys
from cli.main import app
from simulation import run
run.CLIENT_APP = "benchmarks.timed_client:app"
app()
"""


def seconds(config: str, out: Path) -> float:
    """The seconds of one run of one round."""
    moment = out.with_suffix(".moment")
    command = [sys.executable, "-c", RUN, "run", config]
    command += ["--set", "federation.rounds=1", "--set", "home.method=none"]
    started = time.time()
    subprocess.run(
        [*command, "--out", str(out), "--quiet"],
        env={**os.environ, FIRST_STEP_VARIABLE: str(moment), "PYTHONPATH": str(ROOT)},
        check=True,
    )
    return float(moment.read_text()) - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="experiments/configs/demo.toml")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        _, *found = [
            seconds(arguments.config, Path(name) / f"run-{turn}")
            for turn in range(arguments.turns + 1)
        ]
    print(
        json.dumps(
            {
                "config": arguments.config,
                "seconds": round(statistics.median(found), 2),
                "all": [round(value, 2) for value in found],
            }
        )
    )


if __name__ == "__main__":
    main()
