"""The compose rehearsal under secure aggregation, and what is killed in it at each step."""

import json
import time
from pathlib import Path

import pytest

from client import secure_store
from tests.deployment.conftest import NAMES, PRIVATE, rehearsal

pytestmark = pytest.mark.slow

SECURE = {
    **PRIVATE,
    "privacy.trust": "secure-aggregation",
    "privacy.honest": 2,
    "privacy.colluding": 1,
    "training.local-steps": 1,
    "federation.weighting": "public-size",
    "federation.server-optimizer": "none",
    "federation.server-learning-rate": 1.0,
    "federation.timeout": 60.0,
}
STEPS = ("keys", "shares", "train", "list", "unmask")
SERVICES = ("institution-c", "server", "superlink")


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_encoder, complaints):
    scratch = tmp_path_factory.mktemp("secure")
    with rehearsal(scratch, tiny_encoder, complaints) as made:
        for name in NAMES:
            made.settings(name, secure_aggregation=True, max_seconds=55.0)
            (made.directory / "server" / "institutions" / f"{name}.size").write_text("128\n")
        made.up()
        yield made


@pytest.fixture
def federation(shared):
    """Everything up, before and after."""
    yield shared
    shared.up()


def _store(federation, institution) -> Path:
    return federation.folder(institution) / "state" / secure_store.FILE


def _reached(federation, run, institution, step) -> bool:
    """Whether an institution has done a step: of the setup, or of the second round."""
    if not _store(federation, institution).exists() or not federation.results(run).exists():
        return False
    with secure_store.opened(_store(federation, institution)) as db:
        row = db.execute("SELECT run, sealed FROM runs ORDER BY rowid DESC LIMIT 1").fetchone()
        if row is None or row[0] in federation.known:
            return False
        current = secure_store.latest_round(db, row[0])
    if step in ("keys", "shares"):
        return step == "keys" or row[1] is not None
    if current is None or current.round < 2:
        return False
    return {
        "train": current.masked is not None,
        "list": current.list is not None,
        "unmask": current.round > 2 or _closed(federation, institution, row[0]) >= 2,
    }[step]


def _closed(federation, institution, run) -> int:
    return sum(e["answered"] for e in federation.charges(institution) if e["run"] == run)


def _known(federation) -> set[str]:
    """The runs that institutions have set up so far."""
    if not _store(federation, "a").exists():
        return set()
    with secure_store.opened(_store(federation, "a")) as db:
        return {row[0] for row in db.execute("SELECT run FROM runs")}


def _never_low(federation, run) -> None:
    """Each institution is charged, once, for each round with its vector in the sum, or for more."""
    said = json.loads((federation.results(run) / "privacy.json").read_text())
    for name in NAMES:
        new = [e for e in federation.charges(name) if e["run"] not in federation.known]
        rounds = [entry["round"] for entry in new]
        assert len(rounds) == len(set(rounds))  # a round that runs again costs nothing
        answered = [
            record["round"]
            for record in federation.rounds(run)
            if not record["skipped"] and name in record["institutions"]
            and name not in record["aggregation"]["rejected"]
        ]  # fmt: skip
        assert set(answered) <= set(rounds)
        assert said["institutions"][name]["steps"] >= len(answered)


def test_the_rehearsal_runs_the_full_protocol_with_the_peers_that_init_pinned(federation):
    federation.known = _known(federation)
    check = ("fedlora", "deploy", "check", "/etc/fedlora/institution.toml", "--json")
    prints: list[dict[str, str]] = []
    for name in NAMES:
        found = json.loads(federation.exec(f"institution-{name}", *check).stdout)["checks"]
        assert all(one["outcome"] == "ok" for one in found if one["name"] != "versions")
        prints.append({c["name"]: c["details"] for c in found if c["name"].startswith("key of")})
    assert prints[0] == prints[1] == prints[2] and len(set(prints[0].values())) == 3
    assert federation.submit("whole", **SECURE)["state"] == "completed"
    assert [record["updates"] for record in federation.rounds("whole")] == [3, 3]
    _never_low(federation, "whole")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("service", SERVICES)
def test_a_run_outlives_what_is_killed_at_each_step(federation, service, step):
    run = f"{service}-{step}"
    federation.known = _known(federation)
    federation.submit(run, wait=False, **SECURE, **{"federation.rounds": 3})
    federation.until(lambda: _reached(federation, run, "c", step))
    federation.kill(service)
    time.sleep(2)
    federation.start(service)
    assert federation.ended(run)["state"] == "completed"
    records = federation.rounds(run)
    assert [record["round"] for record in records] == [1, 2, 3]
    assert sum(not record["skipped"] for record in records) >= 2
    _never_low(federation, run)
