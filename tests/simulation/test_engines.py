"""The engines alone, with a ClientApp that does nothing (or, when asked, dies, hangs or raises)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from simulation.engines.inline import InlineGrid
from simulation.engines.ray import RayGrid, _Worker, started
from tests.simulation.empty_client import app
from tests.simulation.rounds_of_nothing import EMPTY, one_round, right
from tests.simulation.workers import worker_pids

ROOT = Path(__file__).parents[2]


def test_the_inline_engine_answers_for_every_institution():
    replies = one_round(InlineGrid(app, 5, {}))
    assert sorted(replies) == [1, 2, 3, 4, 5]
    assert all(right(r) for r in replies.values())


def test_the_inline_engine_reports_an_exception_as_flower_does():
    replies = one_round(InlineGrid(app, 3, {"fault": "raise:1"}))
    assert replies[2].error.code == 2
    assert "as asked" not in replies[2].error.reason
    assert right(replies[1]) and right(replies[3])


@pytest.fixture(scope="module")
def ray_cores():
    with started("", 8):
        yield


@pytest.fixture
def ray_grid(ray_cores):
    with RayGrid(EMPTY, 12, {}, threads=2) as grid:
        yield grid


def test_the_ray_engine_answers_for_every_institution_and_keeps_its_state(ray_grid):
    for _ in range(2):
        replies = one_round(ray_grid)
        assert sorted(replies) == list(range(1, 13))
        assert all(right(r) for r in replies.values())
    pids = {ray_grid._contexts[node].state["pid"]["pid"] for node in range(1, 13)}
    assert pids <= set(worker_pids(ray_grid))
    assert ray_grid.answered == ray_grid.pushed == 12


def test_a_worker_killed_between_rounds_is_replaced(ray_grid):
    victim = worker_pids(ray_grid)[0]
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.5)
    replies = one_round(ray_grid)
    assert all(right(r) for r in replies.values())
    assert victim not in worker_pids(ray_grid)


def test_workers_that_cannot_start_end_the_run_with_the_cause(ray_cores):
    with (
        RayGrid("no_such_module:app", 6, {}, threads=2) as grid,
        pytest.raises(ChildProcessError, match=r"^no worker can start: .*'no_such_module'$"),
    ):
        one_round(grid)


def test_a_worker_whose_place_is_lost_leaves_the_round_to_the_others(ray_cores):
    """As after the loss of a machine: nothing is left on which a replacement could start."""
    with RayGrid(EMPTY, 6, {}, threads=2) as grid:
        assert all(right(r) for r in one_round(grid).values())
        victim = worker_pids(grid)[0]
        grid._actor = ray.remote(_Worker).options(num_cpus=99)
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.5)
        for _ in range(2):
            assert all(right(r) for r in one_round(grid, ttl=20.0).values())
        assert len(grid._starting) == 1


ONLY_HERE = """
import os, subprocess, sys
from simulation.run import _ask_for_a_token
_ask_for_a_token()
from simulation.engines.ray import started
import ray
with started("", 1):
    place = ray.get_runtime_context().gcs_address
    where = ray._private.worker._global_node.get_temp_dir_path()
    others = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    code = (
        "from ray._raylet import GcsClient; "
        f"print(GcsClient(address={place!r}).internal_kv_keys(b'', namespace=None))"
    )
    for environment in (os.environ, others):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, timeout=60
        )
        print(done.returncode == 0, b"AuthenticationError" in done.stderr)
    print(place.startswith("127."), oct(os.stat(os.path.dirname(where)).st_mode)[-3:])
print(os.path.exists(where))
"""


def test_ray_on_one_machine_obeys_this_user_s_run_only():
    done = subprocess.run(
        [sys.executable, "-c", ONLY_HERE], capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    assert done.stdout.split("\n")[:4] == ["True False", "False True", "True 700", "False"], done
