"""Ray, started once for the tests of a file, and workers that begin with everything imported."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.config.config import RunConfig
from simulation import run

FORK_SERVER = """
import contextlib, sys
import client.app, client.dp_sgd
from simulation.engines.forkserver import ForkServer
with contextlib.closing(ForkServer()) as forks:
    print(forks.py_executable, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    """A fork server in a process of its own: this process has imported Ray, as no owner may."""
    command = [sys.executable, "-c", FORK_SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        py_executable = process.stdout.readline().strip()
        assert py_executable
        yield SimpleNamespace(py_executable=py_executable, check=lambda: None)


@pytest.fixture(scope="module")
def ray_cores() -> Iterator[None]:
    """Ray with three cores, for all runs of a file: a run joins the Ray that its process has."""
    from simulation.engines.ray import started

    with started("", 3):
        yield


@pytest.fixture
def simulate_on_ray(forks, ray_cores) -> Callable[..., dict[str, Any]]:
    """Runs a configuration on Ray and gives the result.json that it wrote.

    Workers are forks, as in a user's run; with ``forked=False`` they are new processes, as on a
    cluster.
    """

    def go(config: RunConfig, *, forked: bool = True) -> dict[str, Any]:
        with (
            run.load("ray", config),
            run.open_engine("ray", config, forks if forked else None) as grid,
        ):
            run.run_rounds(config, grid)
        return json.loads((Path(config.run_dir) / "result.json").read_text())

    return go
