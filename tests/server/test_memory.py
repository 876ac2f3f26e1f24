"""The memory that a server takes for a round does not grow with the number of updates."""

import gc
import json
import os
import subprocess
import sys
import weakref

import torch

from fedlora.gradients.lora_layers import parameters
from fedlora.models import trainable

MOST_ADAPTERS = 7.0
"""The global adapter, its 64-bit sum (two), and the reply that is being read: its objects, its
arrays, its tensors, and what joins an array's pieces."""


def test_ten_updates_take_at_most_seven_adapters_of_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.memory_of_a_round", tmp_path, "10", "streams"],
        capture_output=True,
        text=True,
        timeout=240,
        # malloc then returns what is freed, as it does with larger adapters.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["megabytes"] > 20
    assert said["adapters"] < MOST_ADAPTERS, said


def test_a_server_that_does_not_predict_drops_the_weights(tiny_config, tmp_path):
    work = trainable.load(tiny_config(), ("card", "fraud", "loan"))
    weight = weakref.ref(next(iter(parameters(work.model).values())))
    start = work.start
    without = trainable.without_weights(work)
    del work
    gc.collect()
    assert weight() is None
    start.save(tmp_path, without.model)
    assert torch.equal(start[next(iter(start))], type(start).open(tmp_path)[next(iter(start))])
