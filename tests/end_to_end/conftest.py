"""Ray, started once for the tests of a file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import RunConfig
from simulation import run


@pytest.fixture(scope="module")
def ray_cores() -> Iterator[None]:
    """Ray with three cores, for all runs of a file: a run joins the Ray that its process has."""
    from simulation.engines.ray import started

    with started("", 3):
        yield


@pytest.fixture
def simulate_on_ray(ray_cores) -> Callable[..., dict[str, Any]]:
    """Runs a configuration on Ray and gives the result.json that it wrote."""

    def go(config: RunConfig) -> dict[str, Any]:
        with run.load("ray", config), run.open_engine("ray", config) as grid:
            run.run_rounds(config, grid)
        return json.loads((Path(config.run_dir) / "result.json").read_text())

    return go
