"""The privacy ledger: charged before, never refunded, whatever dies and whoever races."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sqlite3
import stat
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from client.ledger import Ledger
from fedlora.errors import InputError, Refusal
from fedlora.privacy.composition import Event, epsilon
from fedlora.privacy.streams import RandomSource

DELTA = 1e-5
STEP = Event(noise_multiplier=2.0, sample_rate=0.25, steps=1)
# Forking keeps the warm accountant; the children touch nothing but the ledger.
forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def steps(n: int) -> Event:
    return Event(noise_multiplier=2.0, sample_rate=0.25, steps=n)


def limit_for(n: int) -> float:
    """A limit that n steps fit and n + 1 do not."""
    return (epsilon([steps(n)], DELTA) + epsilon([steps(n + 1)], DELTA)) / 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return new(tmp_path / "bank.db", limit_for(5))


def new(path: Path, limit: float) -> Path:
    Ledger.create(path, max_epsilon=limit, delta=DELTA)
    with Ledger.open(path) as ledger:
        ledger.bind("f" * 64, "record")
    return path


def charge(ledger: Ledger, round: int = 1, digest: str = "order", **changes):
    arguments = {
        "run_id": "run",
        "round_number": round,
        "order_digest": digest,
        "event": STEP,
        "max_steps_of_run": 100,
    }
    return ledger.charge(**(arguments | changes))


def refused(call, *arguments, **named) -> str:
    with pytest.raises(Refusal) as refusal:
        call(*arguments, **named)
    return refusal.value.code


def test_a_new_ledger_is_its_owners_alone_and_has_spent_nothing(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Ledger.open(path) as ledger:
        assert (ledger.spent(), ledger.history(), ledger.runs()) == (0.0, (), ())
    assert [entry.name for entry in path.parent.iterdir()] == ["bank.db"]


def test_a_ledger_is_never_overwritten(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists; a ledger is never overwritten"):
        Ledger.create(path, max_epsilon=100, delta=DELTA)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"max_epsilon": 0}, "max-epsilon is 0"),
        ({"max_epsilon": float("inf")}, "max-epsilon is inf"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"delta": 1e-31}, "delta is 1e-31"),
        ({"accountant": "gdp"}, "accountant is 'gdp'"),
    ],
)
def test_a_limit_out_of_bounds_makes_no_file(tmp_path: Path, value, named) -> None:
    with pytest.raises(InputError, match=named):
        Ledger.create(tmp_path / "x.db", **({"max_epsilon": 10, "delta": DELTA} | value))
    assert list(tmp_path.iterdir()) == []


def test_spending_is_on_the_disk_when_charge_returns_and_stays(path: Path) -> None:
    with Ledger.open(path) as ledger:
        charge(ledger, 1)
        with Ledger.open(path) as other:
            assert other.history() == (STEP,)
        charge(ledger, 2)
    with Ledger.open(path) as ledger:
        assert ledger.history() == (steps(2),)
        assert ledger.spent() == epsilon([steps(2)], DELTA)


def test_the_round_that_does_not_fit_is_refused_and_costs_nothing(path: Path) -> None:
    with Ledger.open(path) as ledger:
        for round in range(1, 6):
            charge(ledger, round)
        assert refused(charge, ledger, 6) == "budget-exhausted"
        assert refused(charge, ledger, 1, run_id="another run") == "budget-exhausted"
        assert ledger.history() == (steps(5),)
        assert ledger.spent() <= ledger.max_epsilon


def test_runs_with_other_noise_and_rates_compose_in_one_budget(tmp_path: Path) -> None:
    first = Event(noise_multiplier=1.5, sample_rate=0.1, steps=30)
    second = Event(noise_multiplier=3.0, sample_rate=0.5, steps=20)
    path = new(tmp_path / "x.db", epsilon([first, second], DELTA) * 1.001)
    with Ledger.open(path) as ledger:
        charge(ledger, run_id="a", event=first)
        charge(ledger, run_id="b", event=second)
        assert ledger.spent() == epsilon([first, second], DELTA)
        assert (ledger.history("a"), ledger.runs()) == ((first,), ("a", "b"))
        assert refused(charge, ledger, run_id="c", event=second) == "budget-exhausted"


def test_a_run_cannot_change_its_noise_rate_or_steps(path: Path) -> None:
    with Ledger.open(path) as ledger:
        charge(ledger)
        for field, value in (("noise_multiplier", 3.0), ("sample_rate", 0.1), ("steps", 2)):
            changed = dataclasses.replace(STEP, **{field: value})
            assert refused(charge, ledger, 2, event=changed) == "run-changed"
        assert ledger.history() == (STEP,)


def test_a_run_gets_no_more_steps_than_its_noise_was_planned_for(path: Path) -> None:
    with Ledger.open(path) as ledger:
        for round in (1, 2):
            charge(ledger, round, max_steps_of_run=2)
        assert refused(charge, ledger, 3, max_steps_of_run=2) == "participation-cap"
        charge(ledger, 3, max_steps_of_run=2, run_id="another run")


def test_an_answered_round_gets_its_stored_answer_without_spending(path: Path) -> None:
    with Ledger.open(path) as ledger:
        assert charge(ledger).answer is None
        ledger.store_answer("run", 1, "order", b"update")
    with Ledger.open(path) as ledger:
        again = charge(ledger)
        assert (again.answer, again.key) == (b"update", b"")
        assert ledger.history() == (STEP,)


def test_an_answered_round_answers_no_other_order(path: Path) -> None:
    with Ledger.open(path) as ledger:
        charge(ledger)
        ledger.store_answer("run", 1, "order", b"update")
        assert refused(charge, ledger, digest="other order") == "round-already-answered"
        assert ledger.store_answer("run", 1, "order", b"new") == b"update"  # a slower process
        other = ("run", 1, "other order", b"new")
        assert refused(ledger.store_answer, *other) == "round-already-answered"


def test_a_closed_round_is_answered_for_one_order_and_one_set_of_survivors(path: Path) -> None:
    survivors, digest = ("a", "b", "c"), bytes(range(32))
    with Ledger.open(path) as ledger:
        assert refused(ledger.close_round, "run", 1, digest, survivors) == "round-not-charged"
        key = charge(ledger).key
        ledger.close_round("run", 1, digest, survivors)
    assert key not in path.read_bytes()
    with Ledger.open(path) as ledger:
        ledger.close_round("run", 1, digest, survivors)  # the same again
        for other in ((digest, survivors[:2]), (bytes(32), survivors)):
            assert refused(ledger.close_round, "run", 1, *other) == "round-already-answered"
        assert refused(charge, ledger) == "round-already-answered"
        assert refused(charge, ledger, digest="other order") == "round-already-answered"
        assert ledger.history() == (STEP,)
        charge(ledger, 2)
        ledger.store_answer("run", 2, "order", b"update")
        assert refused(ledger.close_round, "run", 2, digest, survivors) == "round-not-charged"


def test_under_secure_aggregation_a_round_is_charged_once(path: Path) -> None:
    """Two names on one ledger would bring the same records into a sum twice."""
    share = dataclasses.replace(STEP, shares=3)
    with Ledger.open(path) as ledger:
        first = charge(ledger, digest="one name", event=share)
        assert refused(charge, ledger, digest="other name", event=share) == "round-already-answered"
        assert charge(ledger, digest="one name", event=share) == first
        assert ledger.history() == (share,)
        charge(ledger, digest="one name", run_id="local")
        charge(ledger, digest="other name", run_id="local")  # each has noise of its own
        assert ledger.history("local") == (dataclasses.replace(STEP, steps=2 * STEP.steps),)


def test_an_interrupted_order_runs_again_under_its_key_and_another_order_does_not(path) -> None:
    with Ledger.open(path) as ledger:
        first = charge(ledger)
        assert charge(ledger) == first
        assert ledger.history() == (STEP,)
        other = charge(ledger, digest="other order")
        assert refused(charge, ledger, event=steps(2)) == "run-changed"
        assert first.key != other.key
        assert ledger.history() == (steps(2),)


def test_a_rounds_key_is_gone_from_the_disk_once_it_is_answered(path: Path) -> None:
    with Ledger.open(path) as ledger:
        key = charge(ledger).key
    assert key in path.read_bytes()
    with Ledger.open(path) as ledger:
        ledger.store_answer("run", 1, "order", b"update")
    assert key not in path.read_bytes()


SHARE = dataclasses.replace(STEP, shares=3)


def on_disk(path: Path) -> bytes:
    """A ledger's file and its journal."""
    return b"".join(file.read_bytes() for file in path.parent.glob("bank.db*") if file.exists())


@contextlib.contextmanager
def idle_connection(path: Path) -> Generator[sqlite3.Connection]:
    """Another program that has the ledger open."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as idle:
        idle.execute("SELECT count(*) FROM charges").fetchone()
        yield idle


@pytest.mark.parametrize(
    ("event", "wipe"),
    [
        (STEP, lambda ledger: ledger.store_answer("run", 1, "order", b"update")),
        (SHARE, lambda ledger: ledger.close_round("run", 1, bytes(32), ("a", "b"))),
        (SHARE, lambda ledger: charge(ledger, 2, event=SHARE)),
        (SHARE, lambda ledger: ledger.end_run("run")),
    ],
    ids=["answered", "closed", "next round", "ended"],
)
def test_a_wiped_key_is_gone_while_another_program_has_the_ledger_open(
    path: Path, event: Event, wipe
) -> None:
    with idle_connection(path), Ledger.open(path) as ledger:
        key = charge(ledger, event=event).key
        assert key in on_disk(path)
        wipe(ledger)
        assert key not in on_disk(path)


def test_a_ledger_belongs_to_the_first_records_and_unit_it_is_bound_to(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.bind("f" * 64, "record")
        assert refused(ledger.bind, "e" * 64, "record") == "ledger-foreign"
        assert refused(ledger.bind, "f" * 64, "customer") == "ledger-foreign"


def test_a_ledger_that_was_never_bound_pays_for_nothing(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "x.db", max_epsilon=10, delta=DELTA)
    with Ledger.open(tmp_path / "x.db") as ledger:
        assert refused(charge, ledger) == "ledger-foreign"


def test_a_missing_ledger_is_refused_and_not_made(tmp_path: Path) -> None:
    assert refused(Ledger.open, tmp_path / "none.db") == "ledger-missing"
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to hold a header" * 50)
    assert refused(Ledger.open, tmp_path / "text.db") == "ledger-corrupt"
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE t (x)")
    other.close()
    assert refused(Ledger.open, tmp_path / "other.db") == "ledger-foreign"
    (tmp_path / "empty.db").touch()
    assert refused(Ledger.open, tmp_path / "empty.db") == "ledger-foreign"


def play_round(path: Path, out: Path, die_at: str) -> None:
    """One order at an institution: charge, train, store, reply. Dies at the named point."""

    def point(name: str) -> None:
        if name == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with Ledger.open(path) as ledger:
        point("before the charge")
        paid = charge(ledger)
        point("after the charge")
        update = paid.answer
        if update is None:
            update = RandomSource(paid.key).normal(8).tobytes()  # the noisy release
            (out / "trained").write_bytes(update)
            point("after training")
            ledger.store_answer("run", 1, "order", update)
            point("after storing the answer")
        (out / "reply").write_bytes(update)
        point("after the reply")


def play_in_child(path: Path, out: Path, die_at: str) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=play_round, args=(path, out, die_at))
    child.start()
    child.join(30)
    return child.exitcode


@forks
@pytest.mark.parametrize(
    "point",
    [
        "before the charge",
        "after the charge",
        "after training",
        "after storing the answer",
        "after the reply",
    ],
)
def test_a_kill_at_any_point_leaves_the_ledger_at_or_above_true_spending(path, tmp_path, point):
    epsilon([steps(5)], DELTA)  # warm, so that the children need not start the accountant
    assert play_in_child(path, tmp_path, point) == -signal.SIGKILL
    trained = tmp_path / "trained"
    with Ledger.open(path) as ledger:
        spent = sum(event.steps for event in ledger.history())
    assert spent == (0 if point == "before the charge" else 1)
    assert spent >= trained.exists()
    first = trained.read_bytes() if trained.exists() else None
    # The same order again is the same release, paid once.
    assert play_in_child(path, tmp_path, "") == 0
    reply = (tmp_path / "reply").read_bytes()
    assert first in (None, reply)
    with Ledger.open(path) as ledger:
        assert ledger.history() == (STEP,)
        assert charge(ledger).answer == reply


@forks
def test_kills_at_random_moments_never_lose_a_charge_that_was_reported(tmp_path: Path) -> None:
    path = new(tmp_path / "busy.db", limit_for(160))

    def spend(log: Path) -> None:
        with Ledger.open(path) as ledger, log.open("ab", buffering=0) as written:
            for round in range(50):
                charge(ledger, round, run_id=f"{os.getpid()}")
                written.write(b".")

    log, reported = tmp_path / "log", 0
    log.touch()
    for delay in (0.0, 0.003, 0.01):
        child = multiprocessing.get_context("fork").Process(target=spend, args=(log,))
        child.start()
        while log.stat().st_size == reported and child.is_alive():
            pass
        time.sleep(delay)
        child.kill()
        child.join()
        assert log.stat().st_size > reported
        reported = log.stat().st_size
    with Ledger.open(path) as ledger:
        assert sum(event.steps for event in ledger.history()) >= reported


@forks
def test_two_processes_racing_on_one_ledger_spend_its_budget_and_no_more(tmp_path: Path) -> None:
    path = new(tmp_path / "race.db", limit_for(30))
    for count in range(1, 32):
        epsilon([steps(count)], DELTA)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()

    def spend(name: str) -> None:
        with Ledger.open(path) as ledger:
            barrier.wait(30)
            paid = 0
            try:
                for round in range(100):
                    charge(ledger, round, run_id=name)
                    paid += 1
            except Refusal as refusal:
                results.put((paid, refusal.code))

    racers = [context.Process(target=spend, args=(name,)) for name in ("a", "b")]
    for racer in racers:
        racer.start()
    outcomes = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join(30)
    assert [code for _, code in outcomes] == ["budget-exhausted"] * 2
    assert sum(paid for paid, _ in outcomes) == 30
    with Ledger.open(path) as ledger:
        assert ledger.history() == (steps(30),)
