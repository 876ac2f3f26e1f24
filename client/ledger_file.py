"""The file of a privacy ledger: creation, opening, statements, and SQLite's errors as refusals."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import tempfile
from collections.abc import Generator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from client import ledger_integrity, ledger_upgrade
from fedlora import files
from fedlora.errors import InputError, Refusal
from fedlora.privacy.composition import Event, History, compose

_APPLICATION = 0x66646C64  # "fdld", the file's mark for `file` and PRAGMA application_id
BUSY_SECONDS = 30.0
MIN_SQLITE = (3, 37)
"""The first version of SQLite that has STRICT tables."""
STORED_RUNS = 20
"""Runs whose last answer stays: a server that begins many must not fill the institution's disk."""


def write(path: Path, *, max_epsilon: float, delta: float, accountant: str) -> None:
    """Write an empty ledger, readable by its owner only, atomically.

    Raises:
        InputError: If the file exists, cannot be written, or others may write to its directory, or
            if SQLite is too old.
    """
    if old := too_old():
        raise InputError(old)
    limits = (float(max_epsilon), float(delta), accountant)
    try:
        if exposed := files.exposed(path):
            raise InputError(exposed)
        with tempfile.TemporaryDirectory(prefix=".ledger-", dir=path.parent) as scratch:
            draft = Path(scratch) / "ledger.db"
            draft.touch(mode=0o600)
            with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
                # The draft is private, so it is synced once and not after each statement.
                db.execute("PRAGMA synchronous=OFF")
                db.execute("PRAGMA journal_mode=WAL")
                db.executescript(ledger_integrity.SCHEMA)
                db.execute(
                    "INSERT INTO ledger VALUES (?, ?, ?, NULL, NULL, 0, ?, '')",
                    (*limits, ledger_integrity.genesis(*limits)),
                )
                ledger_integrity.seal(db)
                db.execute(f"PRAGMA application_id={_APPLICATION}")
                db.execute(f"PRAGMA user_version={ledger_integrity.VERSION}")
            files.sync(draft)
            path.hardlink_to(draft)  # unlike a rename, a link fails if the file exists
        files.sync(path.parent)
    except FileExistsError:
        raise InputError(
            f"{path} exists; a ledger is never overwritten, because its spending stays spent"
        ) from None
    except (OSError, sqlite3.Error) as error:
        remedy = "" if path.parent.is_dir() else f"; make it: mkdir -m 700 {path.parent}"
        raise InputError(f"the ledger {path} cannot be written: {error}{remedy}") from error


def too_old() -> str:
    """What is wrong with this Python's SQLite, in words; empty where nothing is."""
    if sqlite3.sqlite_version_info >= MIN_SQLITE:
        return ""
    return (
        f"SQLite is {sqlite3.sqlite_version}, but ledgers and stores of keys need "
        f"{'.'.join(map(str, MIN_SQLITE))} or newer: use a Python that was built with it"
    )


def form(
    db: sqlite3.Connection, path: Path, *, application: int, newest: int, store: str = "ledger"
) -> int:
    """The version of a file's form; nothing is written before it is known.

    Args:
        db: The file.
        path: Its path.
        application: The file's mark.
        newest: The newest version that can be read.
        store: What it is; begins the codes.

    Raises:
        Refusal: ``STORE-foreign`` or ``STORE-newer``.
    """
    found = number(db, "user_version")
    if number(db, "application_id") != application or found < 1:
        raise Refusal(
            f"{store}-foreign", f"{path} is no {store.replace('-', ' ')}; name the right file"
        )
    if found > newest:
        raise Refusal(
            f"{store}-newer",
            f"{path} was written by a newer fedlora (form {found}, this one reads up to {newest}): "
            "install that version; do not make a new file, which would know nothing of what is "
            "spent and sent",
        )
    return found


def _form(db: sqlite3.Connection, path: Path) -> int:
    return form(db, path, application=_APPLICATION, newest=ledger_integrity.VERSION)


def _open(path: Path, *, looks: bool = False) -> sqlite3.Connection:
    """Open a ledger's file, unchecked."""
    if old := too_old():
        raise Refusal("ledger-unusable", old)
    if not path.is_file():
        raise Refusal(
            "ledger-missing",
            f"there is no ledger at {path}; correct the path, or, for records without "
            "spending, create one with `fedlora ledger init`",
        )
    if exposed := files.exposed(path):
        raise Refusal("ledger-exposed", exposed)
    uri = f"{path.absolute().as_uri()}?mode=rw"
    if looks and _is_still(path.resolve()):
        uri += "&immutable=1"  # else SQLite wants to write beside a file that had a log
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)


def _is_still(path: Path) -> bool:
    """Whether a file's directory cannot be written here, and no other process has it open."""
    beside = (path.with_name(f"{path.name}-{kind}") for kind in ("wal", "journal"))
    return not os.access(path.parent, os.W_OK) and not any(file.exists() for file in beside)


def look(path: Path) -> sqlite3.Connection:
    """Open a ledger's file to read it, after checking all of it. The file stays as it is.

    An older version is upgraded in memory.

    Raises:
        Refusal: As `connect`.
    """
    with refusing(path):
        db = _open(path, looks=True)
        try:
            with transaction(db, "DEFERRED"):  # one snapshot beside charges of other processes
                version = _form(db, path)
                if version == ledger_integrity.VERSION:
                    refuse(path, ledger_integrity.problems(db))
                    found = db
                else:
                    found = _upgraded_copy(db, path, version)
            found.execute("PRAGMA query_only=ON")
        except BaseException:
            db.close()
            raise
        if found is not db:
            db.close()
        return found


def _upgraded_copy(db: sqlite3.Connection, path: Path, version: int) -> sqlite3.Connection:
    copy = sqlite3.connect(":memory:", isolation_level=None)
    try:
        db.backup(copy)
        with transaction(copy):
            refuse(path, ledger_upgrade.upgrade(copy, version))
    except BaseException:
        copy.close()
        raise
    return copy


def connect(path: Path, *, shared: bool) -> sqlite3.Connection:
    """Open a ledger's file to charge it, after checking all of it. An older version is upgraded.

    Args:
        path: The file.
        shared: Whether processes of several machines open it. SQLite's write-ahead log needs memory
            that all of them share, so the file is then kept without one.

    Raises:
        Refusal: ``ledger-missing``, ``-exposed``, ``-corrupt``, ``-foreign``, ``-newer``,
            ``-locked`` or ``-unusable``.
    """
    with refusing(path):
        db = _open(path)
        try:
            older = _form(db, path) in ledger_upgrade.VERSIONS
            if shared:
                db.execute("PRAGMA journal_mode=DELETE")
            db.execute("PRAGMA synchronous=EXTRA")  # the deletion of a journal too
            db.execute("PRAGMA secure_delete=ON")  # a wiped key is overwritten
            if older:
                with transaction(db):
                    if (version := _form(db, path)) in ledger_upgrade.VERSIONS:  # still
                        refuse(path, ledger_upgrade.upgrade(db, version))
            with transaction(db, "DEFERRED"):  # one snapshot beside charges of other processes
                refuse(path, ledger_integrity.problems(db))
            # A process that was killed may have left a wiped key in the log. No waiting for others:
            # whoever wipes a key now, or closes the file last, empties the log.
            db.execute("PRAGMA busy_timeout=0")
            with contextlib.suppress(sqlite3.OperationalError):  # a file that may only be read
                empty_log(db)
            db.execute(f"PRAGMA busy_timeout={round(1000 * BUSY_SECONDS)}")
        except BaseException:
            db.close()
            raise
        return db


def number(db: sqlite3.Connection, pragma: str) -> int:
    """The value of a pragma."""
    return db.execute(f"PRAGMA {pragma}").fetchone()[0]


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, kind: str = "IMMEDIATE") -> Generator[None]:
    """Run a block as one transaction: all of it is on the disk, or nothing."""
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def empty_log(db: sqlite3.Connection) -> None:
    """Write the write-ahead log into the file and cut it to nothing. Call it in no transaction.

    A key that is wiped is overwritten in the file only: its earlier page stays in the log for as
    long as any process has the file open. Where others keep the log in use for longer than the
    connection waits, it stays as it is, and the next call empties it.
    """
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def refuse(path: Path, problems: Sequence[str]) -> None:
    """Raise ``ledger-corrupt`` if there are problems."""
    if problems:
        remedy = "restore the file from a backup that has all its charges, or name the right file"
        raise Refusal("ledger-corrupt", f"{path}: {'; '.join(problems)}; {remedy}")


@contextlib.contextmanager
def refusing(path: Path, store: str = "ledger") -> Generator[None]:
    """Turn SQLite's errors into refusals: without its files an institution does not train.

    Args:
        path: The file.
        store: What it is; begins the codes.

    Raises:
        Refusal: ``STORE-locked``, ``-corrupt`` or ``-unusable``.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        words = str(error)
        code = "locked" if "locked" in words else "unusable"
        # a table or column is gone, or a text is damaged
        code = "corrupt" if "no such" in words or "decode" in words else code
        raise Refusal(f"{store}-{code}", f"{path}: {error}") from error
    except (sqlite3.Error, UnicodeDecodeError) as error:  # a damaged schema is no text either
        raise Refusal(f"{store}-corrupt", f"{path}: {error}") from error
    except OSError as error:
        raise Refusal(f"{store}-unusable", f"{path}: {error.strerror}") from error


def answered(db: sqlite3.Connection, run: str, number: int, digest: str) -> bytes | None:
    """The stored answer to this order, or None if the round has no answer yet.

    Raises:
        Refusal: ``round-already-answered``: to another order, its answer gone, its sum unmasked, or
            the round given up.
    """
    stored = db.execute(
        "SELECT digest, answer FROM answers WHERE (run, round) = (?, ?)", (run, number)
    ).fetchone()
    if stored is not None and stored[0] == digest:
        return stored[1]
    wiped = db.execute(
        "SELECT count(*) FROM charges WHERE (run, round) = (?, ?) AND key IS NULL", (run, number)
    ).fetchone()[0]
    if wiped:
        raise Refusal(
            "round-already-answered",
            f"round {number} of run {run} was answered "
            + (
                "to another order"
                if stored
                else "and its answer dropped after a later round; or, under secure aggregation, "
                "its sum was unmasked or the round given up"
            ),
        )
    return None


def charged(db: sqlite3.Connection, run: str, number: int, digest: str | None = None) -> bool:
    """Whether a round was charged, for one order or for any."""
    found = db.execute(
        "SELECT 1 FROM charges WHERE (run, round) = (?, ?) AND digest = coalesce(?, digest)",
        (run, number, digest),
    )
    return found.fetchone() is not None


def store_answer(db: sqlite3.Connection, run: str, number: int, digest: str, answer: bytes) -> None:
    """Store an answer, wipe the round's keys, and drop answers that nobody asks for any more.

    These are of the run's earlier rounds and of old runs: each opening of the ledger reads all.
    """
    db.execute("UPDATE charges SET key = NULL WHERE (run, round) = (?, ?)", (run, number))
    db.execute("DELETE FROM answers WHERE run = ? AND round < ?", (run, number))
    db.execute(
        "DELETE FROM answers WHERE run NOT IN "
        "(SELECT run FROM charges GROUP BY run ORDER BY max(id) DESC LIMIT ?)",
        (STORED_RUNS,),
    )
    db.execute(
        "INSERT INTO answers VALUES (?, ?, ?, ?, ?)",
        (run, number, digest, answer, ledger_integrity.sha256(answer)),
    )


def wipe_keys(db: sqlite3.Connection, run: str, before: float = math.inf) -> None:
    """Wipe the keys of a run's rounds before the given one."""
    db.execute("UPDATE charges SET key = NULL WHERE run = ? AND round < ?", (run, before))


def check_same_run(
    db: sqlite3.Connection, run: str, event: Event, extra_events: Sequence[Event]
) -> None:
    """Refuse a charge whose mechanism or one-off releases differ from the run's first charge.

    A server that changes them between rounds could obtain a one-off release without a charge, or
    choose the next noise after the last answer, which numerical composition does not cover.
    """
    first = db.execute(
        "SELECT noise_multiplier, sample_rate, steps, shares, extra FROM charges "
        "WHERE run = ? ORDER BY id LIMIT 1",
        (run,),
    ).fetchone()
    wanted = (
        event.noise_multiplier,
        event.sample_rate,
        event.steps,
        event.shares,
        json.dumps([[e.noise_multiplier, e.sample_rate, e.steps] for e in extra_events]),
    )
    if first is not None and tuple(first) != wanted:
        raise Refusal(
            "run-changed",
            f"run {run} began with (noise, rate, steps, shares, one-off releases) {tuple(first)} "
            f"and now asks for {wanted}",
        )


def append(
    db: sqlite3.Connection,
    run: str,
    number: int,
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
        number,
        digest,
        float(event.noise_multiplier),
        float(event.sample_rate),
        event.steps,
        json.dumps([[e.noise_multiplier, e.sample_rate, e.steps] for e in extra]),
        datetime.now(UTC).isoformat(timespec="seconds"),
        event.shares,
    )
    chain = ledger_integrity.charged(head, *row)
    db.execute(
        f"INSERT INTO charges ({ledger_integrity.COLUMNS}, chain, key) VALUES ({'?, ' * 11}?)",
        (*row, chain, key),
    )
    db.execute("UPDATE ledger SET entries = ?, head = ?", (entries + 1, chain))


def events(
    db: sqlite3.Connection, *, only: str | None = None, other_than: str | None = None
) -> History:
    """The charged events of all runs, of one, or of all but one, in canonical form."""
    # Charges of one run are alike, so that a ledger of many rounds has few groups to read.
    rows = db.execute(
        "SELECT count(*), noise_multiplier, sample_rate, steps, shares, extra FROM charges"
        " WHERE (:only IS NULL OR run = :only) AND (:other IS NULL OR run <> :other)"
        " GROUP BY noise_multiplier, sample_rate, steps, shares, extra",
        {"only": only, "other": other_than},
    )
    parts = [(n, part) for n, *main, extra in rows for part in (main, *json.loads(extra))]
    return compose(
        Event(noise_multiplier=sigma, sample_rate=rate, steps=n * steps, shares=sum(shares))
        for n, (sigma, rate, steps, *shares) in parts  # a one-off release has none
    )
