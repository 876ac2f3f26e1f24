"""The file behind a privacy ledger: its tables, their hash chain, what SQLite's errors mean."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import tempfile
from collections.abc import Generator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fedlora.accounting import Event, History, compose
from fedlora.errors import InputError, Refusal
from fedlora.files import sync

_APPLICATION = 0x66646C64  # "fdld": what `file` and PRAGMA application_id show
_VERSION = 1
BUSY_SECONDS = 30.0

_SCHEMA = """
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
COLUMNS = "id, run, round, digest, noise_multiplier, sample_rate, steps, extra, at"


def write(path: Path, *, max_epsilon: float, delta: float, accountant: str) -> None:
    """Write an empty ledger, readable by its owner only. It appears whole or not at all.

    Raises:
        InputError: If the file exists or cannot be written.
    """
    limits = (float(max_epsilon), float(delta), accountant)
    try:
        with tempfile.TemporaryDirectory(prefix=".ledger-", dir=path.parent) as scratch:
            draft = Path(scratch) / "ledger.db"
            draft.touch(mode=0o600)
            with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
                # Nobody sees the draft: it is synced once, as a whole, not statement by statement.
                db.executescript(f"PRAGMA synchronous=OFF; PRAGMA journal_mode=WAL; {_SCHEMA}")
                db.execute(
                    "INSERT INTO ledger VALUES (?, ?, ?, NULL, NULL, 0, ?)",
                    (*limits, _genesis(*limits)),
                )
                db.execute(f"PRAGMA application_id={_APPLICATION}")
                db.execute(f"PRAGMA user_version={_VERSION}")
            sync(draft)
            path.hardlink_to(draft)  # unlike a rename, it fails where a file is
        sync(path.parent)
    except FileExistsError:
        raise InputError(
            f"{path} exists; a ledger is never overwritten, because what it records stays spent"
        ) from None
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"the ledger {path} cannot be written: {error}") from error


def connect(path: Path) -> sqlite3.Connection:
    """Open a ledger's file after checking all of it.

    Raises:
        Refusal: ``ledger-missing``, ``-corrupt``, ``-foreign``, ``-locked`` or ``-unusable``.
    """
    if not path.is_file():
        raise Refusal(
            "ledger-missing",
            f"there is no ledger at {path}; mend the path, or for records on which nothing was "
            "spent yet make one with `fedlora ledger init`",
        )
    with refusing(path):
        uri = f"{path.absolute().as_uri()}?mode=rw"
        db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA secure_delete=ON")  # a wiped key is overwritten
            application, version = (
                db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version")
            )
            if (application, version) != (_APPLICATION, _VERSION):
                raise Refusal("ledger-foreign", f"{path} is not a ledger of version {_VERSION}")
            found = problems(db)
            if found:
                raise Refusal("ledger-corrupt", f"{path}: {'; '.join(found)}")
        except BaseException:
            db.close()
            raise
        return db


@contextlib.contextmanager
def refusing(path: Path) -> Generator[None]:
    """Turn SQLite's errors into refusals: an institution that cannot account does not train."""
    try:
        yield
    except sqlite3.OperationalError as error:
        words = str(error)
        code = "ledger-locked" if "locked" in words else "ledger-unusable"
        code = "ledger-corrupt" if "no such" in words else code  # a table or column is gone
        raise Refusal(code, f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise Refusal("ledger-corrupt", f"{path}: {error}") from error


def answered(db: sqlite3.Connection, run: str, round: int, digest: str) -> bytes | None:
    """The stored answer to this very order, or None if the round has no answer yet."""
    stored = db.execute(
        "SELECT digest, answer FROM answers WHERE (run, round) = (?, ?)", (run, round)
    ).fetchone()
    if stored is not None and stored[0] == digest:
        return stored[1]
    wiped = db.execute(
        "SELECT count(*) FROM charges WHERE (run, round) = (?, ?) AND key IS NULL", (run, round)
    ).fetchone()[0]
    if wiped:
        raise Refusal(
            "round-already-answered",
            f"round {round} of run {run} was answered "
            + ("to another order" if stored else "and its answer dropped after a later round"),
        )
    return None


def check_same_run(
    db: sqlite3.Connection, run: str, event: Event, extra_events: Sequence[Event]
) -> None:
    """Refuse a charge that is not of the run's first charge's kind.

    What a run does to the data is fixed by its first charge. A server that changed its mind between
    rounds could otherwise have a one-off release made that nobody paid for, or choose the next
    noise after seeing the last answer, which numerical composition does not cover.
    """
    first = db.execute(
        "SELECT noise_multiplier, sample_rate, steps, extra FROM charges "
        "WHERE run = ? ORDER BY id LIMIT 1",
        (run,),
    ).fetchone()
    wanted = (
        event.noise_multiplier,
        event.sample_rate,
        event.steps,
        json.dumps([[e.noise_multiplier, e.sample_rate, e.steps] for e in extra_events]),
    )
    if first is not None and tuple(first) != wanted:
        raise Refusal(
            "run-changed",
            f"run {run} began with (noise, rate, steps, one-off releases) {tuple(first)} and now "
            f"asks for {wanted}",
        )


def append(
    db: sqlite3.Connection,
    run: str,
    round: int,
    digest: str,
    event: Event,
    extra: Sequence[Event],
    key: bytes,
) -> None:
    """Add a charge to the end of the chain."""
    entries, head = db.execute("SELECT entries, head FROM ledger").fetchone()
    row = (
        entries + 1,
        run,
        round,
        digest,
        float(event.noise_multiplier),
        float(event.sample_rate),
        event.steps,
        json.dumps([[e.noise_multiplier, e.sample_rate, e.steps] for e in extra]),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    chain = _link(head, *row)
    db.execute(
        f"INSERT INTO charges ({COLUMNS}, chain, key) VALUES ({'?, ' * 10}?)", (*row, chain, key)
    )
    db.execute("UPDATE ledger SET entries = ?, head = ?", (entries + 1, chain))


def events(
    db: sqlite3.Connection, *, only: str | None = None, other_than: str | None = None
) -> History:
    """Everything charged, or one run's part, or all but one run's, in canonical form."""
    rows = db.execute(
        "SELECT noise_multiplier, sample_rate, steps, extra FROM charges"
        " WHERE (:only IS NULL OR run = :only) AND (:other IS NULL OR run <> :other)",
        {"only": only, "other": other_than},
    )
    parts = [part for *main, extra in rows for part in (main, *json.loads(extra))]
    return compose(Event(noise_multiplier=s, sample_rate=q, steps=n) for s, q, n in parts)


def problems(db: sqlite3.Connection) -> list[str]:
    """What is wrong with the file, in words: its pages, its limits, each charge in the chain."""
    db.execute("BEGIN")  # one snapshot, whatever other processes charge meanwhile
    try:
        return _problems(db)
    finally:
        db.execute("ROLLBACK")


def _problems(db: sqlite3.Connection) -> list[str]:
    found = [row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
    limits = db.execute(
        "SELECT max_epsilon, delta, accountant, entries, head FROM ledger"
    ).fetchall()
    if len(limits) != 1:
        return [*found, f"it states its limits {len(limits)} times"]
    *settings, entries, head = limits[0]
    chain, count = _genesis(*settings), 0
    for *row, stated in db.execute(f"SELECT {COLUMNS}, chain FROM charges ORDER BY id"):
        chain, count = _link(chain, *row), count + 1
        if chain != stated:
            return [
                *found,
                f"charge {row[0]} was altered, one before it removed, or the limits were changed",
            ]
    if (count, chain) != (entries, head):
        found.append(
            f"it has {count} charges and should have {entries}, or the limits were changed"
        )
    return found


def _genesis(max_epsilon: float, delta: float, accountant: str) -> str:
    return _link("", "fedlora ledger", _VERSION, max_epsilon, delta, accountant)


def _link(previous: str, *values: object) -> str:
    return hashlib.sha256(json.dumps([previous, *values]).encode()).hexdigest()
