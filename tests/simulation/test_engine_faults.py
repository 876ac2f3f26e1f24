"""What the Ray engine does when an institution, a worker or a machine misbehaves."""

import tempfile
from pathlib import Path

import pytest
import ray

from server.exchange import TIMEOUT, WORKER_DIED
from simulation.engines.ray import RayGrid, started
from tests.simulation.rounds_of_nothing import EMPTY, one_round, right
from tests.simulation.workers import worker_pids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code"), [("die:4", WORKER_DIED), ("hang:4", TIMEOUT), ("raise:4", 2)]
)
def test_one_bad_institution_never_spoils_a_round(fault, code):
    with (
        started("", 2),
        RayGrid(EMPTY, 8, {"fault": fault}, threads=1) as grid,
    ):
        for _ in range(2):
            replies = one_round(grid, ttl=5.0)
            assert replies[5].has_error() and replies[5].error.code == code
            assert all(right(r) for node, r in replies.items() if node != 5)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code"), [("die:4@2", WORKER_DIED), ("hang:4@2", TIMEOUT)])
def test_one_bad_institution_never_spoils_those_that_share_its_call(fault, code):
    with (
        started("", 2),
        RayGrid(EMPTY, 8, {"fault": fault}, threads=1) as grid,
    ):
        assert all(right(r) for r in one_round(grid, ttl=10.0).values())
        replies = one_round(grid, ttl=10.0)  # now four institutions a call
        assert replies[5].has_error() and replies[5].error.code == code
        assert all(right(r) for node, r in replies.items() if node != 5)


def test_a_ray_that_does_not_start_leaves_no_directory(tmp_path, monkeypatch):
    made, real = [], tempfile.TemporaryDirectory

    def here(**kwargs):
        return real(**(kwargs | {"dir": tmp_path}))

    def failing(**kwargs):
        made.append(Path(kwargs["_temp_dir"]).parent)
        assert made[0].parent == tmp_path and made[0].is_dir()
        raise OSError("no room")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", here)
    monkeypatch.setattr(ray, "init", failing)
    with pytest.raises(OSError, match="no room"), started("", 1):
        pass
    assert made and not made[0].exists()


@pytest.mark.slow
def test_a_cluster_of_two_nodes_serves_one_run():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        with (
            started(cluster.address, 2),
            RayGrid(EMPTY, 6, {}, threads=1) as grid,
        ):
            assert all(right(r) for r in one_round(grid).values())
            assert len(set(worker_pids(grid))) == 2
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_lost_machine_costs_no_institution():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        lost = cluster.add_node(num_cpus=1)
        with (
            started(cluster.address, 2),
            RayGrid(EMPTY, 6, {}, threads=1) as grid,
        ):
            assert all(right(r) for r in one_round(grid).values())
            cluster.remove_node(lost, allow_graceful=False)
            for _ in range(2):
                assert all(right(r) for r in one_round(grid, ttl=60.0).values())
            cluster.add_node(num_cpus=1)  # and with a new machine there are two workers again
            assert len(set(worker_pids(grid))) == 2
    finally:
        cluster.shutdown()
