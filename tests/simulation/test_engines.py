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
import psutil
import pytest
import ray
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from ray._private import parameter, services
from ray._private.node import Node
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


def _jobs(*seconds, ttl=60.0, size=1000, costs=()):
    identify()
    record = RecordDict({"adapter": ArrayRecord({"w": Array(np.zeros(1, dtype=np.float32))})})
    return [
        _Job(
            message=Message(record, node, MessageType.TRAIN, ttl=ttl),
            context=None,
            cost=costs[node - 1] if costs else 1.0,
            shared=None,
            shared_key=None,
            seconds=s,
            adapter_bytes=size,
        )
        for node, s in enumerate(seconds, start=1)
    ]


def test_messages_whose_time_is_not_known_share_calls_with_few_others():
    calls = _group(_jobs(*[0.0] * 40, *[1.0] * 4), workers=2)
    assert [len(c.jobs) for c in calls] == [UNTIMED_TOGETHER] * 5 + [2, 2]
    assert all((c.seconds == 0) == (len(c.jobs) == UNTIMED_TOGETHER) for c in calls)
    assert [len(c.jobs) for c in _group(_jobs(0.0, 0.0), workers=2)] == [1, 1]


def test_a_call_may_take_the_time_of_all_its_institutions_while_nobody_knows_how_long_they_take():
    (first,) = _group(_jobs(0.0, 0.0, 0.0, ttl=60.0), workers=1)
    assert first.limit == 180.0
    (later,) = _group(_jobs(10.0, 10.0, 10.0, ttl=60.0), workers=1)
    assert later.limit == 60.0


def test_first_calls_are_shared_out_by_what_institutions_cost():
    calls = _group(_jobs(*[0.0] * 6, costs=[9.0, 1.0, 8.0, 2.0, 3.0, 7.0]), workers=2)
    assert sorted(sum(j.cost for j in c.jobs) for c in calls) == [14.0, 16.0]
    assert [len(c.jobs) for c in calls] == [3, 3]
    assert sorted(len(c.jobs) for c in _group(_jobs(*[0.0] * 9), workers=2)) == [4, 5]


def test_calls_take_workers_about_equally_long():
    draw = np.random.default_rng(1)
    calls = _group(_jobs(*draw.uniform(0.5, 2.0, 39)), workers=2)
    assert sum(len(c.jobs) for c in calls) == 39
    assert len(calls) == 2
    assert abs(calls[0].seconds - calls[1].seconds) < 2.0  # at most one message apart


def test_what_a_call_took_is_shared_out_by_what_institutions_cost(ray_grid_of_costs):
    one_round(ray_grid_of_costs)
    took = [ray_grid_of_costs._seconds[node, MessageType.TRAIN] for node in (1, 2, 3)]
    assert took == pytest.approx([took[0], 2 * took[0], 3 * took[0]])


def test_a_call_holds_few_messages_and_leaves_time_to_notice_that_one_hangs():
    assert (
        max(len(c.jobs) for c in _group(_jobs(*[0.001] * 1000), workers=2)) <= MAX_MESSAGES_PER_CALL
    )
    heavy = _group(_jobs(*[0.001] * 8, size=MAX_ADAPTER_BYTES_PER_CALL // 2), workers=2)
    assert max(len(c.jobs) for c in heavy) == 2
    calls = _group(_jobs(*[10.0] * 12, ttl=60.0), workers=2)
    assert max(c.seconds for c in calls) <= 30.0 and len(calls) == 4


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


@pytest.fixture
def ray_grid_of_costs(ray_cores):
    workers = WorkerSpec(count=1, threads=1)
    with RayGrid(EMPTY, 3, {}, workers=workers, costs=[1.0, 2.0, 3.0]) as grid:
        yield grid


def test_ray_starts_nothing_that_a_simulation_has_no_use_for(ray_grid):
    """Private names of Ray are set aside for it; this is what they have to give."""
    worker_pids(ray_grid)  # a worker that starts is idle at first
    below = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    assert any("raylet" in command for command in below)
    for name in ("monitor.py", "dashboard.py", "ray::IDLE"):
        assert not any(name in command for command in below)
    assert isinstance(parameter.RayParams, type)
    assert Node.start_api_server.__qualname__ == "Node.start_api_server"
    assert services.get_node.__module__ == "ray._private.services"


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
        grid._start_worker = ray.remote(_Worker).options(num_cpus=99).remote
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
    print(place.startswith("127.0.0.1:"), oct(os.stat(os.path.dirname(where)).st_mode)[-3:])
print(os.path.exists(where))
"""


def test_ray_on_one_machine_obeys_this_user_s_run_only():
    done = subprocess.run(
        [sys.executable, "-c", ONLY_HERE], capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    assert done.stdout.split("\n")[:4] == ["True False", "False True", "True 700", "False"], done
