"""A ledger's file: damage, edits by hand, the older version, and who else may write to it."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from client import ledger_file
from client.ledger import Ledger
from fedlora import files
from fedlora.errors import InputError, Refusal
from fedlora.privacy.composition import Event

DELTA = 1e-4
STEP = Event(noise_multiplier=2.0, sample_rate=0.25, steps=1)
SIZE = Event(noise_multiplier=30.0, sample_rate=1.0, steps=1)
FINGERPRINT = "f" * 64
ANSWER = b"the update of round 2" * 20


def charge(ledger: Ledger, run: str, round: int, digest: str = "order"):
    return ledger.charge(
        run_id=run,
        round_number=round,
        order_digest=digest,
        event=STEP,
        planned=(),
        max_steps_of_run=100,
        extra_events=(SIZE,),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with all kinds of rounds in it, answered, open and closed, and a size."""
    path = tmp_path / "bank.db"
    Ledger.create(path, max_epsilon=9.0, delta=DELTA, accountant="rdp")
    with Ledger.open(path) as ledger:
        ledger.bind(FINGERPRINT, "record")
        for round in (1, 2):
            charge(ledger, "run", round)
            ledger.noised_size_of_run("run", 100.5)
            ledger.store_answer("run", round, "order", ANSWER)
        charge(ledger, "run", 3)
        charge(ledger, "second", 1)
        charge(ledger, "masked", 1)
        ledger.close_round("masked", 1, bytes(32), ("a", "b"))
    return path


def read(path: Path) -> object:
    """Everything that is read of a ledger in its use."""
    with Ledger.open(path) as ledger:
        ledger.bind(FINGERPRINT, "record")
        said = [ledger.show(), ledger.history(), ledger.history("run"), ledger.runs()]
        said += [charge(ledger, "run", 2), charge(ledger, "run", 3), charge(ledger, "second", 1)]
        said.append(ledger.noised_size_of_run("run", 7.0))
        try:
            charge(ledger, "run", 1)
        except Refusal as refusal:
            said.append(refusal.code)
        return said


def flip(path: Path, whole: bytes, bits: list[int]) -> dict[str, int]:
    """Flip each bit alone in a copy of the file; count how reading it ends."""
    before, ends = read(path), {}
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        for beside in ("-wal", "-shm"):
            path.with_name(path.name + beside).unlink(missing_ok=True)
        path.write_bytes(damaged)
        try:
            end = "as before" if read(path) == before else f"other values, bit {bit}"
        except Refusal as refusal:
            end = refusal.code if refusal.code.startswith("ledger-") else f"{refusal.code}, {bit}"
        except Exception as error:
            end = f"{type(error).__name__} at bit {bit}"
        ends[end] = ends.get(end, 0) + 1
    return ends


HARMLESS = {"as before"} | {
    f"ledger-{code}" for code in ("corrupt", "foreign", "newer", "unusable")
}


def test_a_flipped_bit_changes_nothing_or_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    used = [i for i, byte in enumerate(whole) if byte]
    chosen = random.Random(1)
    bits = [8 * chosen.choice(used) + chosen.randrange(8) for _ in range(400)]
    bits += [chosen.randrange(8 * len(whole)) for _ in range(200)]
    ends = flip(path, whole, bits)
    assert set(ends) <= HARMLESS, ends
    assert ends["ledger-corrupt"] > 100


@pytest.mark.slow
def test_every_flipped_bit_of_what_is_used_changes_nothing_or_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    chosen = random.Random(2)
    bits = [8 * i + bit for i, byte in enumerate(whole) if byte for bit in range(8)]
    bits += [8 * i + chosen.randrange(8) for i, byte in enumerate(whole) if not byte and i % 8 == 0]
    assert len(bits) > 20_000
    ends = flip(path, whole, bits)
    assert set(ends) <= HARMLESS, ends
    assert ends["ledger-corrupt"] > 20_000


def edit(path: Path, statement: str) -> None:
    """Change a ledger by hand."""
    with contextlib.closing(sqlite3.connect(path)) as hand, hand:
        hand.execute(statement)


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE ledger SET fingerprint = NULL, unit = NULL",
        f"UPDATE ledger SET fingerprint = '{'e' * 64}'",
        "UPDATE ledger SET unit = 'customer'",
        "UPDATE ledger SET accountant = 'prv'",
        "UPDATE answers SET answer = x'00'",
        "UPDATE answers SET answer = x'00', sha256 = 'x'",
        "UPDATE answers SET digest = 'another order'",
        "DELETE FROM answers",
        "INSERT INTO answers SELECT run, 1, digest, answer, sha256 FROM answers",
        "UPDATE charges SET key = NULL WHERE id = 3",
        "UPDATE charges SET key = randomblob(32) WHERE id = 3",
        "UPDATE charges SET key = zeroblob(32) WHERE id = 1",
        "UPDATE sizes SET size = 1.0",
        "DELETE FROM sizes",
        "DELETE FROM closed",
        "UPDATE closed SET survivors = '[\"a\"]'",
        "UPDATE closed SET round = 2",
        "CREATE TRIGGER undo AFTER INSERT ON charges BEGIN DELETE FROM charges; END",
        "DROP INDEX charges_of_run",
        "ALTER TABLE charges ADD COLUMN more TEXT",
        "INSERT INTO ledger SELECT * FROM ledger",
    ],
)
def test_no_part_of_a_ledger_can_be_edited_unseen(path: Path, tampering: str) -> None:
    edit(path, tampering)
    with pytest.raises(Refusal, match="ledger-corrupt"):
        Ledger.open(path)


def test_an_edit_while_a_ledger_is_open_is_not_sealed_by_the_next_charge(path: Path) -> None:
    with Ledger.open(path) as ledger:
        edit(path, "UPDATE ledger SET fingerprint = NULL, unit = NULL")
        for use in (
            lambda: ledger.bind("e" * 64, "record"),
            lambda: charge(ledger, "third", 1),
            lambda: ledger.store_answer("run", 3, "order", ANSWER),
        ):
            with pytest.raises(Refusal, match="ledger-corrupt"):
                use()
    edit(path, "DELETE FROM ledger")
    with pytest.raises(Refusal, match="ledger-corrupt"):
        Ledger.open(path)


def test_what_is_read_and_not_changed_writes_nothing(path: Path) -> None:
    before = path.read_bytes()
    read(path)
    assert path.read_bytes() == before


# What fedlora wrote in older versions, copied from there.
VERSION_1 = """
CREATE TABLE ledger (
    max_epsilon REAL NOT NULL, delta REAL NOT NULL, accountant TEXT NOT NULL,
    fingerprint TEXT, unit TEXT,      -- fixed by the first use
    entries INTEGER NOT NULL, head TEXT NOT NULL  -- of charges: number, last chain value
) STRICT;
CREATE TABLE charges (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, digest TEXT NOT NULL,
    noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL, steps INTEGER NOT NULL,
    extra TEXT NOT NULL,  -- one-off releases: [[noise_multiplier, sample_rate, steps], ...]
    at TEXT NOT NULL, chain TEXT NOT NULL,
    key BLOB                          -- of the round's randomness; NULL once the answer is stored
) STRICT;
CREATE INDEX charges_of_run ON charges (run, round);
CREATE TABLE answers (
    run TEXT NOT NULL, round INTEGER NOT NULL, digest TEXT NOT NULL, answer BLOB NOT NULL,
    PRIMARY KEY (run, round)
) STRICT;
CREATE TABLE sizes (run TEXT PRIMARY KEY, size REAL NOT NULL) STRICT;
"""


VERSION_2 = VERSION_1.replace(
    "head TEXT NOT NULL  -- of charges: number, last chain value",
    "head TEXT NOT NULL,  -- of charges: number, last chain value\n    seal TEXT NOT NULL",
).replace(
    "answer BLOB NOT NULL,\n",
    "answer BLOB NOT NULL,\n    sha256 TEXT NOT NULL,             -- of the answer\n",
)
SEALED_2 = (
    "SELECT max_epsilon, delta, accountant, fingerprint, unit, entries, head FROM ledger",
    "SELECT id, hex(key) FROM charges WHERE key IS NOT NULL ORDER BY id",
    "SELECT run, round, digest, sha256 FROM answers ORDER BY run, round",
    "SELECT run, size FROM sizes ORDER BY run",
)


def link(previous: str, *values: object) -> str:
    return hashlib.sha256(json.dumps([previous, *values]).encode()).hexdigest()


@pytest.fixture(params=[1, 2])
def old(path: Path, request) -> Path:
    """A ledger of an older version with the same content as ``path``."""
    old, version = path.with_name("old.db"), request.param
    schema = VERSION_1 if version == 1 else VERSION_2
    with contextlib.closing(sqlite3.connect(old, isolation_level=None)) as db:
        db.executescript(f"PRAGMA journal_mode=WAL; {schema} PRAGMA user_version={version};")
        db.execute(f"PRAGMA application_id={0x66646C64}")
        db.execute("ATTACH ? AS new", (str(path),))
        db.execute("BEGIN")
        head = link("", "fedlora ledger", 1, 9.0, DELTA, "rdp")
        rows = db.execute("SELECT * FROM new.charges ORDER BY id").fetchall()
        for *values, shares, _, key in rows:
            assert shares == 0
            head = link(head, *values)
            db.execute(f"INSERT INTO charges VALUES ({'?, ' * 10}?)", (*values, head, key))
        bound = (9.0, DELTA, "rdp", FINGERPRINT, "record", len(rows), head)
        db.execute("INSERT INTO sizes SELECT * FROM new.sizes")
        if version == 1:
            db.execute("INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?, ?)", bound)
            db.execute("INSERT INTO answers SELECT run, round, digest, answer FROM new.answers")
        else:
            db.execute("INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?, ?, '')", bound)
            db.execute("INSERT INTO answers SELECT * FROM new.answers")
            state = [db.execute(query).fetchall() for query in SEALED_2]
            db.execute("UPDATE ledger SET seal = ?", (link("fedlora ledger state", 2, *state),))
        db.execute("COMMIT")
    old.chmod(0o600)
    return old


def version(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def test_an_older_ledger_is_upgraded_and_keeps_all_it_says(path: Path, old: Path) -> None:
    assert version(old) < version(path) == 3
    assert read(old) == read(path)
    assert version(old) == 3
    edit(old, "UPDATE ledger SET fingerprint = NULL, unit = NULL")
    with pytest.raises(Refusal, match="ledger-corrupt"):
        Ledger.open(old)


def test_who_only_looks_sees_an_older_ledger_upgraded_and_leaves_the_file(
    path: Path, old: Path
) -> None:
    whole = old.read_bytes()
    with Ledger.look(old) as seen, Ledger.open(path) as ledger:
        assert seen.show() == ledger.show()
        with pytest.raises(Refusal, match="ledger-unusable"):
            charge(seen, "run", 9)
    assert old.read_bytes() == whole
    edit(old, "UPDATE charges SET steps = 2 WHERE id = 2")
    with pytest.raises(Refusal, match="ledger-corrupt"):
        Ledger.look(old)


def test_who_only_looks_charges_nothing_and_sees_what_others_charge(path: Path) -> None:
    with Ledger.open(path) as ledger, Ledger.look(path) as seen:
        charge(ledger, "third", 1)
        assert seen.show() == ledger.show()
        with pytest.raises(Refusal, match="ledger-unusable"):
            charge(seen, "third", 2)
    edit(path, "UPDATE ledger SET unit = 'customer'")
    with pytest.raises(Refusal, match="ledger-corrupt"):
        Ledger.look(path)


@pytest.mark.parametrize("current", [True, False])
def test_a_ledger_on_storage_that_only_reads_can_be_looked_at(
    path: Path, old: Path, current: bool, monkeypatch
) -> None:
    read_only = path if current else old
    with Ledger.look(path) as seen:
        expected = seen.show()
    monkeypatch.setattr(ledger_file.os, "access", lambda *_: False)
    read_only.chmod(0o400)
    with Ledger.look(read_only) as seen:
        assert seen.show() == expected
        assert {file.name for file in path.parent.iterdir()} == {"bank.db", "old.db"}


@pytest.mark.parametrize("shared", [False, True])
def test_a_ledger_of_a_newer_version_is_named_and_left_as_it_is(path: Path, shared: bool) -> None:
    edit(path, "PRAGMA user_version=4")
    whole = path.read_bytes()
    for opened in (Ledger.look, lambda path: Ledger.open(path, shared=shared)):
        with pytest.raises(Refusal, match=r"ledger-newer: .*form 4.*up to 3.*install that version"):
            opened(path)
    assert path.read_bytes() == whole


def test_an_old_sqlite_is_named_before_a_ledger_is_made_or_opened(path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ledger_file.sqlite3, "sqlite_version_info", (3, 34, 1))
    monkeypatch.setattr(ledger_file.sqlite3, "sqlite_version", "3.34.1")
    for opened in (Ledger.open, Ledger.look):
        with pytest.raises(Refusal, match=r"SQLite is 3\.34\.1, .* 3\.37 or newer"):
            opened(path)
    new = path.with_name("new.db")
    with pytest.raises(InputError, match="SQLite is 3"):
        Ledger.create(new, max_epsilon=1.0, delta=DELTA)
    assert not new.exists()


@pytest.mark.parametrize("called", [1, 2])
def test_a_ledger_that_is_called_older_than_it_is_is_not_upgraded(path: Path, called: int) -> None:
    """An older version is checked less: its limits, records and keys could be changed."""
    for statement in (
        "UPDATE ledger SET fingerprint = NULL, unit = NULL",
        "UPDATE charges SET key = zeroblob(32)",
        "DELETE FROM answers",
        "DROP TABLE closed",
        f"PRAGMA user_version={called}",
    ):
        edit(path, statement)
    with pytest.raises(Refusal, match=f"is not defined as in a ledger of version {called}"):
        Ledger.open(path)
    assert version(path) == called


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE charges SET steps = 2 WHERE id = 2",
        "DELETE FROM charges WHERE id = 4",
        "UPDATE ledger SET max_epsilon = 100.0",
        "DROP TABLE sizes",
        "DELETE FROM ledger",
    ],
)
def test_an_altered_older_ledger_is_not_upgraded(old: Path, tampering: str) -> None:
    before = version(old)
    edit(old, tampering)
    with pytest.raises(Refusal, match="ledger-corrupt"):
        Ledger.open(old)
    assert version(old) == before


@pytest.mark.parametrize("old", [2], indirect=True)
@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE ledger SET fingerprint = NULL, unit = NULL",
        "UPDATE charges SET key = NULL",
        "UPDATE answers SET answer = x'00'",
        "UPDATE sizes SET size = 1.0",
    ],
)
def test_the_seal_of_an_older_ledger_is_checked(old: Path, tampering: str) -> None:
    edit(old, tampering)
    with pytest.raises(Refusal, match="ledger-corrupt"):
        Ledger.open(old)
    assert version(old) == 2


def test_shares_of_noise_are_part_of_the_chain_and_of_both_totals(path: Path) -> None:
    shared = Event(noise_multiplier=4.0, sample_rate=0.25, steps=1, shares=4)
    with Ledger.open(path) as ledger:
        before = ledger.show()
        assert before["epsilon_alone"] == before["epsilon"]
        for number in (1, 2):
            ledger.charge(
                run_id="secure",
                round_number=number,
                order_digest="order",
                event=shared,
                planned=(),
                max_steps_of_run=2,
            )
        with pytest.raises(Refusal, match="run-changed"):
            ledger.charge(
                run_id="secure",
                round_number=2,
                order_digest="other",
                event=replace(shared, shares=3),
                planned=(),
                max_steps_of_run=3,
            )
        shown, history = ledger.show(), ledger.history("secure")
    assert history == (replace(shared, steps=2),)
    assert [entry["shares"] for entry in shown["entries"]][-3:] == [0, 4, 4]
    assert before["epsilon"] < shown["epsilon"] < shown["epsilon_alone"]
    edit(path, "UPDATE charges SET shares = 0 WHERE run = 'secure'")
    with pytest.raises(Refusal, match="ledger-corrupt"):
        Ledger.open(path)


def open_and_die(path: Path, statement: int, monkeypatch) -> int | None:
    """Open a ledger in a child that is killed before its n-th statement; its exit code."""
    connect, left = sqlite3.connect, [statement]

    def count(_: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def traced(*arguments, **named):
        db = connect(*arguments, **named)
        db.set_trace_callback(count)
        return db

    def child() -> None:
        monkeypatch.setattr(ledger_file.sqlite3, "connect", traced)
        Ledger.open(path).close()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_upgrade_that_is_killed_at_any_statement_is_done_or_not_begun(
    path: Path, old: Path, monkeypatch
) -> None:
    expected, whole, from_version = read(path), old.read_bytes(), version(old)
    versions, statement = [], 1
    while True:
        for beside in ("", "-wal", "-shm"):
            old.with_name(old.name + beside).unlink(missing_ok=True)
        old.write_bytes(whole)
        old.chmod(0o600)
        ended = open_and_die(old, statement, monkeypatch)
        versions.append(version(old))
        assert read(old) == expected
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        statement += 1
    assert statement > 15
    assert versions == sorted(versions)  # once it is done it stays done
    assert set(versions) == {from_version, 3}


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_ledger_in_a_directory_that_others_may_write_is_not_used(path: Path, mode: int) -> None:
    path.parent.chmod(mode)
    try:
        with pytest.raises(Refusal, match=rf"ledger-exposed: .*mode {mode:o}.*chmod go-w"):
            Ledger.open(path)
        with pytest.raises(InputError, match="chmod go-w"):
            Ledger.create(path.with_name("other.db"), max_epsilon=1.0, delta=DELTA)
    finally:
        path.parent.chmod(0o700)
    assert [file.name for file in path.parent.iterdir()] == ["bank.db"]
    read(path)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_ledger_that_others_may_write_is_not_used(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(Refusal, match=rf"ledger-exposed: .*bank\.db .*mode {mode:o}.*chmod go-w"):
        Ledger.open(path)


def test_a_link_to_a_ledger_is_as_safe_as_the_directory_it_leads_to(path: Path) -> None:
    (path.parent / "links").mkdir(mode=0o700)
    link = path.parent / "links" / "bank.db"
    link.symlink_to(path)
    assert files.exposed(link) == ""
    path.parent.chmod(0o777)
    assert f"{path.parent} may be written by others" in files.exposed(link)
    path.parent.chmod(0o700)


def test_a_file_of_another_user_is_named_with_its_remedy(path: Path, monkeypatch) -> None:
    if os.geteuid() == 0:
        os.chown(path, 4321, -1)
        os.chown(path.parent, 5555, -1)
        monkeypatch.setattr(os, "geteuid", lambda: 5555)
        owner, me = 4321, 5555
    else:
        owner, me = os.geteuid(), 5555
        monkeypatch.setattr(os, "geteuid", lambda: me)
    with pytest.raises(Refusal, match=f"belongs to user {owner}, not to user {me} .*chown {me}"):
        Ledger.open(path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)  # root acts for others
    assert files.exposed(path) == ""
