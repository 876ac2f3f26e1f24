"""The SQLite files of an institution: its ledger with a seal, and what its other store shares.

A file has a rollback journal, so that between transactions it is one file. The ledger's seal is a
hash over all that the file holds: every opening and every transaction checks it first, and a
transaction renews it last.

Guaranteed: an opening finds a change, by accident or by hand, to anything that is read. Not found:
a change after which somebody computed the seal anew, since it has no key; and an older copy of the
whole file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from fedlora import files
from fedlora.errors import InputError, Refusal
from fedlora.privacy.composition import Event, History, compose

BUSY_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file.

    Args:
        store: Its name, which begins the codes of refusals.
        application: Its mark for `file` and ``PRAGMA application_id``.
        version: The version of its tables.
        schema: Its tables.
    """

    store: str
    application: int
    version: int
    schema: str

    def corrupt(self, path: Path, problem: str) -> Refusal:
        """The refusal of a damaged file."""
        return Refusal(
            f"{self.store}-corrupt",
            f"{path}: {problem}; restore a backup that has all its charges, or name the right file",
        )


LEDGER = Kind(
    store="ledger",
    application=0x66646C64,  # "fdld"
    version=5,
    schema="""
CREATE TABLE ledger (
    max_epsilon REAL NOT NULL, delta REAL NOT NULL, accountant TEXT NOT NULL,
    fingerprint TEXT, unit TEXT,      -- fixed by the first use
    seal TEXT NOT NULL
);
CREATE TABLE charges (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, digest TEXT NOT NULL,
    noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL, steps INTEGER NOT NULL,
    shares INTEGER NOT NULL,          -- of discrete noise in the sum; 0: all noise is this one's
    at TEXT NOT NULL,
    key BLOB                          -- of the round's randomness; NULL once the answer is stored
);
CREATE INDEX charges_of_run ON charges (run, round);
CREATE TABLE answers (
    run TEXT NOT NULL, round INTEGER NOT NULL, digest TEXT NOT NULL, answer BLOB NOT NULL,
    sha256 TEXT NOT NULL,             -- of the answer
    PRIMARY KEY (run, round)
);
CREATE TABLE closed (                 -- rounds of secure aggregation whose shares may have left
    run TEXT NOT NULL, round INTEGER NOT NULL,
    digest TEXT NOT NULL,             -- of the order and its mechanism, as all survivors signed it
    survivors TEXT NOT NULL,          -- JSON, sorted
    PRIMARY KEY (run, round)
);
""",
)
_SEALED = (
    "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name",
    "SELECT max_epsilon, delta, accountant, fingerprint, unit FROM ledger",
    "SELECT id, run, round, digest, noise_multiplier, sample_rate, steps, shares, at,"
    " quote(key) FROM charges ORDER BY id",
    "SELECT run, round, digest, sha256 FROM answers ORDER BY run, round",
    "SELECT run, round, digest, survivors FROM closed ORDER BY run, round",
)


def write(path: Path, *, max_epsilon: float, delta: float, accountant: str) -> None:
    """Write an empty ledger, readable by its owner only, atomically.

    Raises:
        InputError: If the file exists, cannot be written, or others may write to its directory.
    """
    try:
        if exposed := files.exposed(path):
            raise InputError(exposed)
        with new(path, LEDGER) as db:
            values = (float(max_epsilon), float(delta), accountant)
            db.execute("INSERT INTO ledger VALUES (?, ?, ?, NULL, NULL, '')", values)
            seal(db)
    except FileExistsError:
        raise InputError(
            f"{path} exists; a ledger is never overwritten, because its spending stays spent"
        ) from None
    except (OSError, sqlite3.Error) as error:
        remedy = "" if path.parent.is_dir() else f"; make it: mkdir -m 700 {path.parent}"
        raise InputError(f"the ledger {path} cannot be written: {error}{remedy}") from error


@contextlib.contextmanager
def new(path: Path, kind: Kind) -> Generator[sqlite3.Connection]:
    """Write a file with its tables, whole or not at all; a block fills it.

    Raises:
        FileExistsError: If the file exists.
    """
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as scratch:
        draft = Path(scratch) / path.name
        draft.touch(mode=0o600)
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous=OFF")  # the draft is private, and synced once below
            db.executescript(kind.schema)
            db.execute(f"PRAGMA application_id={kind.application}")
            db.execute(f"PRAGMA user_version={kind.version}")
            yield db
        files.sync(draft)
        path.hardlink_to(draft)  # unlike a rename, a link fails if the file exists
    files.sync(path.parent)


def connect(path: Path) -> sqlite3.Connection:
    """Open a ledger's file after checking all of it. Opening writes nothing.

    Raises:
        Refusal: ``ledger-missing``, ``-exposed``, ``-corrupt``, ``-foreign``, ``-locked`` or
            ``-unusable``.
    """
    if not path.is_file():
        raise Refusal(
            "ledger-missing",
            f"there is no ledger at {path}; correct the path, or, for records without "
            "spending, create one with `fedlora ledger init`",
        )
    with refusing(path):
        db = opened(path, LEDGER)
        try:
            with transaction(db, "DEFERRED"):  # one snapshot beside charges of other processes
                check_pages(db, path)
                check_seal(db, path)
                answers = db.execute("SELECT round, answer, sha256 FROM answers")
                for number, answer, stated in answers:
                    if sha256(answer) != stated:
                        raise LEDGER.corrupt(path, f"the answer to round {number} was changed")
        except BaseException:
            db.close()
            raise
        return db


def opened(path: Path, kind: Kind) -> sqlite3.Connection:
    """Open a file whose changes are on the disk once they are committed.

    Raises:
        Refusal: ``STORE-exposed`` if others may write to it, or ``STORE-foreign`` for a file of
            another program or version.
    """
    if exposed := files.exposed(path):
        raise Refusal(f"{kind.store}-exposed", exposed)
    uri = f"{path.absolute().as_uri()}?mode=rw"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        marks = ("application_id", "user_version")
        found = [db.execute(f"PRAGMA {mark}").fetchone()[0] for mark in marks]
        if found != [kind.application, kind.version]:
            raise Refusal(
                f"{kind.store}-foreign",
                f"{path} is no {kind.store} of this version of fedlora: name the right file, or "
                "install the version that wrote it; a new file would know nothing of what is spent",
            )
        db.execute("PRAGMA synchronous=EXTRA")  # the deletion of a journal too
        db.execute("PRAGMA secure_delete=ON")  # a wiped key is overwritten
    except BaseException:
        db.close()
        raise
    return db


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


@contextlib.contextmanager
def refusing(path: Path, kind: Kind = LEDGER) -> Generator[None]:
    """Turn SQLite's errors into refusals: without its files an institution does not train.

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
        raise Refusal(f"{kind.store}-{code}", f"{path}: {error}") from error
    except (sqlite3.Error, UnicodeDecodeError) as error:  # a damaged schema is no text either
        raise Refusal(f"{kind.store}-corrupt", f"{path}: {error}") from error
    except OSError as error:
        raise Refusal(f"{kind.store}-unusable", f"{path}: {error.strerror}") from error


def check_pages(db: sqlite3.Connection, path: Path, kind: Kind = LEDGER) -> None:
    """Raise ``STORE-corrupt`` for damage that SQLite finds in its own structures."""
    if (problem := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
        raise kind.corrupt(path, problem)


def check_seal(db: sqlite3.Connection, path: Path) -> None:
    """Raise ``ledger-corrupt`` if anything changed since the seal. A transaction begins with it."""
    row = db.execute("SELECT seal FROM ledger").fetchone()
    if row is None or row[0] != _seal(db):
        raise LEDGER.corrupt(path, "its content was changed by something else than fedlora")


def seal(db: sqlite3.Connection) -> None:
    """Renew the seal where it has changed. The last statement of a transaction."""
    db.execute("UPDATE ledger SET seal = :seal WHERE seal <> :seal", {"seal": _seal(db)})


def sha256(content: bytes) -> str:
    """The digest of a content."""
    return hashlib.sha256(content).hexdigest()


def _seal(db: sqlite3.Connection) -> str:
    state = [db.execute(query).fetchall() for query in _SEALED]
    return sha256(json.dumps(state, default=repr).encode())


def answered(db: sqlite3.Connection, run: str, number: int, digest: str) -> bytes | None:
    """The stored answer to this order, or None if the round has no answer yet.

    Raises:
        Refusal: ``round-already-answered``: to another order, its answer gone, its sum unmasked, or
            the round given up.
    """
    place = (run, number)
    stored = db.execute(
        "SELECT answer FROM answers WHERE (run, round, digest) = (?, ?, ?)", (*place, digest)
    ).fetchone()
    if stored is not None:
        return stored[0]
    query = "SELECT 1 FROM charges WHERE (run, round) = (?, ?) AND key IS NULL"
    if db.execute(query, place).fetchone():
        raise Refusal(
            "round-already-answered",
            f"round {number} of run {run} was answered to another order, or its answer dropped "
            "after a later round, or, under secure aggregation, its sum unmasked or given up",
        )
    return None


def events(db: sqlite3.Connection, run: str | None = None) -> History:
    """The charged events of all runs or of one, in canonical form."""
    # Charges of one run are alike, so that a ledger of many rounds has few groups to read.
    rows = db.execute(
        "SELECT noise_multiplier, sample_rate, sum(steps), shares FROM charges"
        " WHERE run = coalesce(?, run) GROUP BY noise_multiplier, sample_rate, shares",
        (run,),
    )
    return compose(
        Event(noise_multiplier=sigma, sample_rate=rate, steps=steps, shares=shares)
        for sigma, rate, steps, shares in rows
    )
