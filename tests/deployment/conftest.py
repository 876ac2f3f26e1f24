"""A rehearsal: what `fedlora deploy init` made, filled with records and ledgers, in the harness."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import tomli_w

from client.ledger import Ledger
from fedlora.config.config import from_flat
from fedlora.config.sections import INSTITUTIONS
from fedlora.files import write_atomic
from fedlora.runs.run_files import NODES, SIZES, read_records
from tests.deployment import harness, remote
from tests.samples import write_csv

NAMES = ("a", "b", "c")
BANKS = {"Alpha": "a", "Beta": "b", "Gamma": "c"}
LABELS = ["card", "fraud", "loan"]
MODEL = "/models/tiny"
USER = 10001
PLAIN = {
    "model.name": MODEL,
    "model.dtype": "fp32",
    "data.source": INSTITUTIONS,
    "data.institutions": len(NAMES),
    "data.labels": json.dumps(LABELS),
    "data.test-source": "/configs/test.csv",
    "training.local-steps": 2,
    "training.batch-size": 0.25,
    "training.max-length": 16,
    "federation.rounds": 2,
    "federation.server-optimizer": "adam",
    "federation.server-learning-rate": 0.01,
    "federation.server-head-learning-rate": 0.0,
    "federation.timeout": 120.0,
    "privacy.epsilon": float("inf"),
}
PRIVATE = {"privacy.epsilon": 4.0, "privacy.delta": 1e-4}
"""What differs from PLAIN under DP."""


class Rehearsal(harness.Federation):
    """A federation with the directory that it is mounted from, and what an operator does."""

    def __init__(
        self,
        directory: Path,
        scratch: Path,
        model: Path,
        *rogues: str,
        volumes: Mapping[str, list[str]],
        compose: Path = harness.COMPOSE,
    ) -> None:
        self.directory = directory
        here = Path(__file__).parent
        app = [f"{here}/misbehaving.py:/app/client/app.py:ro"]
        app.append(f"{harness.ROOT}/client/app.py:/honest/app.py:ro")
        super().__init__(
            directory / ".env",
            scratch,
            image_files={MODEL: model},
            volumes={**volumes, **{f"institution-{name}": app for name in rogues}},
            file=compose,
        )

    def deploy(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """`docker compose exec server fedlora deploy ...`."""
        return self.exec("server", "fedlora", "deploy", *arguments, **{"check": False, **options})

    def submit(self, name: str, *, wait: bool = True, **values: Any) -> dict[str, Any]:
        """Submit PLAIN with these values; gives what the command says at its end."""
        config = from_flat(PLAIN | values)
        file = self.directory / "server" / "configs" / f"{name}.toml"
        file.write_text(config.to_toml())
        more = ["--wait"] if wait else []
        done = self.deploy(
            "submit", f"/configs/{name}.toml", "--name", name, "--json", *more, timeout=600
        )
        assert done.stdout.startswith("{"), done.stdout + done.stderr
        (said,) = json.loads(done.stdout)["submissions"]
        assert (done.returncode == 0) == (said["state"] in ("completed", "running"))
        return said

    def results(self, name: str) -> Path:
        """A run's directory."""
        return self.directory / "results" / name

    def rounds(self, name: str) -> list[dict[str, Any]]:
        """Its lines of rounds.jsonl."""
        return read_records(self.results(name))

    def folder(self, institution: str) -> Path:
        """An institution's own directory."""
        return self.directory / "institutions" / institution

    def charges(self, institution: str) -> list[dict[str, Any]]:
        """The entries of an institution's ledger."""
        with Ledger.open(self.folder(institution) / "ledger" / "ledger.db") as ledger:
            return ledger.show()["entries"]

    def misbehave(self, institution: str, **rounds: str) -> None:
        """Say how an institution misbehaves (`misbehaving`): r1="nan" is for round 1."""
        how = {name.removeprefix("r"): word for name, word in rounds.items()}
        (self.folder(institution) / "state" / "misbehave.json").write_text(json.dumps(how))

    def until(self, what: Callable[[], Any], seconds: float = 300.0) -> None:
        """Wait for something to be so."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, "waited in vain\n" + self.log("server")[-3000:]
            time.sleep(0.2)

    def ended(self, run: str) -> dict[str, Any]:
        """What became of a run, once it has ended."""
        self.until(lambda: self.submission(run)["state"] != "running")
        return self.submission(run)

    def submission(self, run: str) -> dict[str, Any]:
        """What the server has written down of a run."""
        return json.loads((self.results(run) / "submission.json").read_text())

    def settings(self, institution: str, **values: Any) -> None:
        """Change an institution's own settings."""
        file = self.folder(institution) / "settings" / "institution.toml"
        known = tomllib.loads(file.read_text())
        new = {key.replace("_", "-"): value for key, value in values.items()}
        write_atomic(file, tomli_w.dumps(known | new).encode())  # another file, as editors do


def split(complaints: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of the server's own to measure on, and all institutions' rows."""
    with complaints.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["bank"] in BANKS]
    table = [{**row, "bank": BANKS[row["bank"]]} for row in rows]
    test, train = table[:45], table[45:]
    known = {row["text"] for row in test}
    return test, [row for row in train if row["text"] not in known]


def prepare(directory: Path, complaints: Path, names: tuple[str, ...] = NAMES) -> None:
    """What operator and institutions do before `docker compose up`."""
    command = [sys.executable, "-m", "cli.main", "deploy", "init", str(directory)]
    subprocess.run([*command, "--institutions", ",".join(names)], check=True, cwd=harness.ROOT)
    test, train = split(complaints)
    write_csv(directory / "server" / "configs" / "test.csv", test)
    for name in names:
        folder = directory / "institutions" / name
        write_csv(folder / "data" / "records.csv", [row for row in train if row["bank"] == name])
        file = folder / "settings" / "institution.toml"
        own = {"labels": LABELS, "models": [MODEL], "without-dp": True}
        own |= {"max-run-epsilon": 5.0, "max-delta": 1e-4}
        file.write_text(tomli_w.dumps(tomllib.loads(file.read_text()) | own))
        Ledger.create(
            folder / "ledger" / "ledger.db", max_epsilon=50.0, delta=1e-4, accountant="prv"
        )
    if os.geteuid() == 0:
        for path in (directory / "institutions", directory / "server"):
            for file in (path, *path.rglob("*")):
                os.chown(file, USER, USER)


def as_in_an_image(model: Path, scratch: Path) -> Path:
    """A copy of a model's directory that every user can read."""
    image = scratch / "model"
    shutil.copytree(model, image)
    for path in (image, *image.iterdir()):
        path.chmod(path.stat().st_mode | 0o555)
    return image


@contextlib.contextmanager
def rehearsal(
    scratch: Path,
    model: Path,
    complaints: Path,
    *rogues: str,
    volumes: Mapping[str, list[str]] = MappingProxyType({}),
) -> Iterator[Rehearsal]:
    """A federation of three institutions, not started; ``rogues`` misbehave when they are told."""
    if reason := harness.unavailable():
        pytest.skip(reason)
    prepare(scratch / "deployment", complaints)
    image = as_in_an_image(model, scratch)
    with Rehearsal(scratch / "deployment", scratch, image, *rogues, volumes=volumes) as made:
        yield made


@pytest.fixture
def rows(complaints, tmp_path):
    """Held-out rows, and each bank's own records, as files."""
    with complaints.open(newline="") as file:
        table = list(csv.DictReader(file))
    test, train = table[:60], table[60:]
    known = {row["text"] for row in test}
    train = [row for row in train if row["text"] not in known]
    write_csv(tmp_path / "test.csv", test)
    write_csv(tmp_path / "all.csv", train)
    for bank in remote.BANKS:
        write_csv(tmp_path / bank / "own.csv", [row for row in train if row["bank"] == bank])
    return tmp_path


@pytest.fixture
def institutions(rows, tiny_encoder):
    """Registers every bank and writes its settings; keyword values are added to those of one."""

    def make(bank="", ledgers=True, **changes):
        files = []
        for name in remote.BANKS:
            values = {
                "name": f'"{name}"',
                "source": '"own.csv"',
                "ledger": '"ledger.db"',
                "state": '"state"',
                "models": f'["{tiny_encoder}"]',
                "labels": remote.LABELS,
                "strategies": '["fedavg", "svd"]',
                "without-dp": "true",
                "max-delta": "1e-4",
                **({k.replace("_", "-"): v for k, v in changes.items()} if name == bank else {}),
            }
            file = rows / name / "institution.toml"
            file.write_text("".join(f"{k} = {v}\n" for k, v in values.items()))
            file.chmod(0o600)
            if ledgers:
                Ledger.create(
                    rows / name / "ledger.db", max_epsilon=9.0, delta=1e-4, accountant="prv"
                )
            files.append(file)
        (rows / NODES).write_text(json.dumps(dict(enumerate(remote.BANKS, 1))))
        (rows / SIZES).write_text(json.dumps(dict.fromkeys(remote.BANKS, 128)))
        return files

    return make


@pytest.fixture
def deployed(tiny_config, rows):
    """A deployment's configuration."""

    def make(**values):
        return tiny_config(
            **{
                "data.source": "institutions",
                "data.institutions": 4,
                "data.labels": remote.LABELS,
                "data.test-source": str(rows / "test.csv"),
                "privacy.noise": "secure",
                **values,
            }
        )

    return make
