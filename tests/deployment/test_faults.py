"""What breaks in a federation, and what then happens. One federation, many runs."""

import time

import pytest

from tests.deployment.conftest import PRIVATE, rehearsal

pytestmark = pytest.mark.slow

MANY_ROUNDS = {"federation.rounds": 60}
"""For runs that are stopped once what they wait for has happened, however fast rounds are."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_encoder, complaints):
    scratch = tmp_path_factory.mktemp("faults")
    with rehearsal(scratch, tiny_encoder, complaints, "a", "b", "c") as made:
        for name in ("a", "b", "c"):
            made.settings(name, max_seconds=75.0)  # a busy machine starts a trainer in time
        made.up()
        yield made


@pytest.fixture
def federation(shared):
    """Everything up and well behaved, before and after."""
    yield shared
    for name in ("a", "b", "c"):
        shared.misbehave(name)
    shared.up()


def _updates(federation, run):
    return [record["updates"] for record in federation.rounds(run)]


def _rejected(federation, run):
    return [record["aggregation"]["rejected"] for record in federation.rounds(run)]


def test_a_client_app_that_raises_dies_or_hangs_fails_its_round_by_name_and_works_in_the_next(
    federation,
):
    federation.misbehave("c", r1="raise the chargeback of Mrs Example", r3="hang", r5="die")
    values = {"federation.rounds": 6, "federation.timeout": 120.0}
    assert federation.submit("app", **values)["state"] == "completed"
    raised, *_, hung, after, died, last = _rejected(federation, "app")
    assert raised == {"c": "failed"}
    assert hung == {"c": "timed-out"}
    assert died == {"c": "client-crashed"}
    assert after == last == {}
    assert _updates(federation, "app") == [2, 3, 2, 3, 2, 3]
    assert not any("Mrs Example" in federation.log(name) for name in federation.names)


def test_an_institution_killed_in_mid_round_misses_it_and_its_ledger_holds_the_charge(federation):
    before = len(federation.charges("c"))
    federation.misbehave("c", r1="slow")
    federation.submit("killed", wait=False, **PRIVATE, **MANY_ROUNDS)
    federation.until(lambda: len(federation.charges("c")) > before)
    federation.kill("institution-c")
    federation.start("institution-c")

    def back():
        """Rounds in which c answered."""
        return [
            record["round"]
            for record in federation.rounds("killed")
            if "c" in {*record["institutions"]} - {*record["aggregation"]["rejected"]}
        ]

    # the SuperLink holds its place for a minute before it lets it in again, under the same name
    federation.until(lambda: len(back()) >= 2)
    federation.deploy("stop", "killed")
    records, rounds = federation.rounds("killed"), back()
    assert list(records[0]["aggregation"]["rejected"]) == ["c"] and records[0]["updates"] == 2
    assert rounds == list(range(rounds[0], len(records) + 1))
    out = [record["aggregation"]["rejected"] for record in records]
    assert all(set(lost) <= {"c"} for lost in out)
    assert all(r["updates"] == r["asked"] - len(lost) for r, lost in zip(records, out, strict=True))
    charged = [entry["round"] for entry in federation.charges("c")[before:]]
    # the round that was stopped may be charged too
    assert charged in ([1, *rounds], [1, *rounds, len(records) + 1])


def test_a_link_that_is_cut_for_thirty_seconds_is_waited_for_and_nothing_counts_twice(federation):
    before = {name: len(federation.charges(name)) for name in ("a", "c")}
    federation.misbehave("c", r2="slow")
    federation.submit("cut", wait=False, **PRIVATE, **{"federation.rounds": 3})
    federation.until(lambda: len(federation.charges("c")) == before["c"] + 2)
    federation.cut("institution-c")
    time.sleep(30)
    assert len(federation.rounds("cut")) == 1
    federation.restore("institution-c")
    assert federation.ended("cut")["state"] == "completed"
    assert _updates(federation, "cut") == [3, 3, 3]
    assert federation.rounds("cut")[1]["seconds"] >= 30
    for name, count in before.items():
        assert [entry["round"] for entry in federation.charges(name)[count:]] == [1, 2, 3]


def test_one_joins_late_and_one_leaves_for_good(federation):
    federation.stop("institution-c")
    federation.submit("changing", wait=False, **MANY_ROUNDS, **{"data.institutions": 2})
    federation.until(lambda: len(federation.rounds("changing")) == 1)
    federation.start("institution-c")
    asked = lambda: federation.rounds("changing")[-1]["institutions"]  # noqa: E731
    federation.until(lambda: "c" in asked())
    federation.stop("institution-b")
    federation.until(lambda: "b" not in asked())
    federation.deploy("stop", "changing")
    records = federation.rounds("changing")
    assert set(records[0]["institutions"]) == {"a", "b"}
    assert set(records[-1]["institutions"]) == {"a", "c"} and records[-1]["updates"] == 2


@pytest.mark.parametrize("service", ["superlink", "gateway", "server"])
def test_a_run_outlives_what_is_killed_and_restarted(federation, service):
    run = f"without-{service}"
    federation.submit(run, wait=False, **{"federation.rounds": 4})
    federation.until(lambda: len(federation.rounds(run)) == 1)
    federation.kill(service)
    time.sleep(3)
    federation.start(service)
    assert federation.ended(run)["state"] == "completed"
    records = federation.rounds(run)
    assert [record["round"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["updates"] == 3
    assert (federation.results(run) / "adapter" / "adapter_model.safetensors").exists()


def test_a_full_disk_and_a_ledger_that_cannot_be_written_are_refused_with_a_reason(federation):
    run, inside = "disk", ("institution-c", "sh", "-c")
    fill = "cp -a /ledger /tmp/kept && mount -t tmpfs -o size=256k,mode=777 tmpfs /ledger"
    fill += " && cp -a /tmp/kept/. /ledger/ && dd if=/dev/zero of=/ledger/full bs=4k; true"
    federation.submit(run, wait=False, **PRIVATE, **MANY_ROUNDS)

    def reason():
        """Why c had no part in a whole round from now on."""
        begun = len(federation.rounds(run)) + 2
        federation.until(lambda: len(federation.rounds(run)) >= begun)
        return federation.rounds(run)[begun - 1]["aggregation"]["rejected"].get("c", "")

    federation.until(lambda: federation.rounds(run))
    federation.exec(*inside, fill, root=True)
    full = reason()
    federation.exec(*inside, "umount -l /ledger && mount -o remount,bind,ro /ledger", root=True)
    read_only = reason()
    federation.exec(*inside, "mount -o remount,bind,rw /ledger", root=True)
    again = reason()
    federation.deploy("stop", run)
    assert full.startswith("ledger-") and read_only.startswith("ledger-") and not again
    assert all(record["updates"] >= 2 for record in federation.rounds(run))


def _lose_all_institutions(federation, run, *, rounds, timeout):
    """Submits a run; after its first round every institution is killed."""
    values = {"federation.rounds": rounds, "federation.timeout": timeout}
    federation.submit(run, wait=False, **values)
    federation.until(lambda: len(federation.rounds(run)) == 1)
    for name in ("a", "b", "c"):
        federation.kill(f"institution-{name}")


def _start_all_institutions(federation):
    for name in ("a", "b", "c"):
        federation.start(f"institution-{name}")


def test_without_any_institution_the_run_ends_with_its_checkpoint_and_can_be_resumed(federation):
    _lose_all_institutions(federation, "alone", rounds=4, timeout=20.0)
    assert federation.ended("alone")["state"] == "failed"
    assert "0 institutions are online" in federation.submission("alone")["details"]
    assert sorted((federation.results("alone") / "checkpoints").iterdir())
    _start_all_institutions(federation)
    federation.up()
    again = {"federation.rounds": 4, "federation.timeout": 20.0}
    assert federation.submit("alone", **again)["state"] == "completed"
    records = federation.rounds("alone")
    assert [record["round"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["updates"] == 3


def test_a_run_waits_for_institutions_that_are_all_away_for_a_while(federation):
    _lose_all_institutions(federation, "outage", rounds=6, timeout=240.0)
    federation.until(lambda: "waiting for up to 240 s" in federation.log("server"))
    _start_all_institutions(federation)
    assert federation.ended("outage")["state"] == "completed"
    assert federation.rounds("outage")[-1]["updates"] == 3
