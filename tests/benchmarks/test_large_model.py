"""The large model's benchmark runs as a whole on a tiny model."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import large_model


@pytest.mark.slow
def test_every_case_is_measured_on_a_tiny_model():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.large_model", "--small"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["case"] for line in lines] == list(large_model.CASES)
    assert all(line["mib"] > 100 and line["bytes"] > 10_000 for line in lines)
