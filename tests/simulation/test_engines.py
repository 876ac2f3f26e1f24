"""The engines alone, with a ClientApp that does nothing (or, when asked, dies, hangs or raises)."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import ray
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from ray.exceptions import ObjectLostError

from server.exchange import exchange
from server.roster import UNTIMED_TOGETHER
from simulation.engines.grid import MAX_ADAPTER_BYTES_PER_CALL, MAX_MESSAGES_PER_CALL, identify
from simulation.engines.inline import InlineGrid
from simulation.engines.ray import RayGrid, WorkerSpec, _group, _Job, _Worker, started
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


def test_the_inline_engine_hands_over_together_what_is_trained(monkeypatch):
    sizes = []

    def together(calls):
        sizes.append(len(calls))
        return [app(message, context) for message, context in calls]

    monkeypatch.setattr(app, "together", together, raising=False)
    replies = one_round(InlineGrid(app, MAX_MESSAGES_PER_CALL + 3, {}))
    assert sizes == [MAX_MESSAGES_PER_CALL, 3]
    assert sorted(replies) == list(range(1, MAX_MESSAGES_PER_CALL + 4))
    assert all(right(r) for r in replies.values())


def test_silence_is_told_from_an_answer():
    class Silent(InlineGrid):
        def pull_messages(self, message_ids):
            return [r for r in super().pull_messages(message_ids) if r.metadata.src_node_id != 2]

    grid = Silent(app, 3, {})
    record = RecordDict({"adapter": ArrayRecord({"w": Array(np.zeros(1, dtype=np.float32))})})
    messages = [Message(record, node, MessageType.TRAIN) for node in grid.get_node_ids()]
    replies = dict(exchange(grid, messages, 0.5))
    assert replies[2] is None
    assert replies[1].has_content() and replies[3].has_content()


def _jobs(*costs, ttl=60.0, size=1000):
    identify()
    record = RecordDict({"adapter": ArrayRecord({"w": Array(np.zeros(1, dtype=np.float32))})})
    return [
        _Job(
            message=Message(record, node, MessageType.TRAIN, ttl=ttl),
            context=None,
            cost=cost,
            key=None,
            shared=None,
            adapter_bytes=size,
        )
        for node, cost in enumerate(costs, start=1)
    ]


def _sizes(calls):
    return sorted(len(call.jobs) for call in calls)


def test_calls_cost_about_the_same_and_hold_few_messages():
    calls = _group(_jobs(9.0, 1.0, 8.0, 2.0, 3.0, 7.0), workers=2)
    assert sorted(sum(j.cost for j in c.jobs) for c in calls) == [15.0, 15.0]
    assert _sizes(_group(_jobs(*[1.0] * 9), workers=2)) == [4, 5]
    assert _sizes(_group(_jobs(*[1.0] * 1000), workers=2))[-1] <= MAX_MESSAGES_PER_CALL
    heavy = _jobs(*[1.0] * 8, size=MAX_ADAPTER_BYTES_PER_CALL // 2)
    assert _sizes(_group(heavy, workers=2)) == [2, 2, 2, 2]
    assert _group([], workers=2) == []


def test_a_call_may_take_the_time_of_its_institutions_within_the_servers_patience():
    (few,) = _group(_jobs(1.0, 1.0, 1.0, ttl=60.0), workers=1)
    assert few.limit == 180.0
    (many,) = _group(_jobs(*[1.0] * 30, ttl=60.0), workers=1)
    assert many.limit == UNTIMED_TOGETHER * 60.0


def test_a_reply_is_let_go_once_it_is_handed_over():
    class AllAtOnce(InlineGrid):
        def pull_messages(self, message_ids):
            return [r for i in list(message_ids) for r in super(AllAtOnce, self).pull_messages([i])]

    grid = AllAtOnce(app, 5, {})
    record = RecordDict({"adapter": ArrayRecord({"w": Array(np.zeros(1, dtype=np.float32))})})
    messages = [Message(record, node, MessageType.TRAIN) for node in grid.get_node_ids()]
    alive = []
    for _, reply in exchange(grid, messages, 5.0):
        alive.append(weakref.ref(reply))
        del reply
        gc.collect()
        assert alive[-1]() is None
    assert len(alive) == 5


@pytest.fixture(scope="module")
def ray_cores():
    with started("", 4):  # two of them for one grid, two for the others
        yield


@pytest.fixture(scope="module")
def ray_grid(ray_cores):
    with RayGrid(EMPTY, 12, {}, workers=WorkerSpec(count=2, threads=1)) as grid:
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
    workers = WorkerSpec(count=2, threads=1)
    with (
        RayGrid("no_such_module:app", 6, {}, workers=workers) as grid,
        pytest.raises(ChildProcessError, match=r"^no worker can start: .*'no_such_module'$"),
    ):
        one_round(grid)


def test_a_worker_whose_place_is_lost_leaves_the_round_to_the_others(ray_cores):
    """As after the loss of a machine: nothing is left on which a replacement could start."""
    with RayGrid(EMPTY, 6, {}, workers=WorkerSpec(count=2, threads=1)) as grid:
        assert all(right(r) for r in one_round(grid).values())
        victim = worker_pids(grid)[0]
        grid._actor = ray.remote(_Worker).options(num_cpus=99)
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.5)
        for _ in range(2):
            assert all(right(r) for r in one_round(grid, ttl=20.0).values())
        assert len(grid._starting) == 1


def test_a_result_that_is_lost_with_its_machine_is_made_again(ray_cores, monkeypatch):
    """The call had ended; its reply lay on the machine that was lost before it was fetched."""
    with RayGrid(EMPTY, 6, {}, workers=WorkerSpec(count=2, threads=1)) as grid:
        assert all(right(r) for r in one_round(grid).values())
        get, lost = ray.get, []

        def fetch(reference, **options):
            if not lost:
                lost.append(reference)
                raise ObjectLostError(reference.hex(), None, "")
            return get(reference, **options)

        with monkeypatch.context() as patched:
            patched.setattr(ray, "get", fetch)
            assert all(right(r) for r in one_round(grid).values())
        assert lost


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
