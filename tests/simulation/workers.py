"""The processes of a grid's workers, for tests that look at them or kill them."""

import ray


def worker_pids(grid):
    return ray.get([worker.pid.remote() for worker in grid.workers])
