"""A ledger's tables, and the checks that they are unchanged: a hash chain and a seal.

Charges are only added. Each holds a hash of itself and of all charges before it: the chain.
The rest changes: the binding is set, keys are wiped, answers are dropped. The seal is a hash over
the rest and the chain's end; every transaction checks it first and renews it last.

The whole file is checked when it is opened, once a round. While it is open, each write checks the
seal, which shows another program's change to all but the earlier charges; the chain shows changes
to those at the next opening.

Guaranteed: an opening finds a change, by accident or by hand, to anything that is read. Not found:
a change after which somebody computed the hashes anew, since they have no key, or rebuilt the file
in the form of version 1, which had no seal; and an older copy of the whole file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sqlite3

VERSION = 3
_CHAIN_VERSION = 1  # the chain's form did not change with the file's version

LEDGER = """CREATE TABLE ledger (
    max_epsilon REAL NOT NULL, delta REAL NOT NULL, accountant TEXT NOT NULL,
    fingerprint TEXT, unit TEXT,      -- fixed by the first use
    entries INTEGER NOT NULL, head TEXT NOT NULL,  -- of charges: number, last chain value
    seal TEXT NOT NULL
) STRICT"""
CHARGES = """CREATE TABLE charges (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, digest TEXT NOT NULL,
    noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL, steps INTEGER NOT NULL,
    extra TEXT NOT NULL,  -- one-off releases: [[noise_multiplier, sample_rate, steps], ...]
    at TEXT NOT NULL,
    shares INTEGER NOT NULL,          -- of discrete noise in the sum; 0: all noise is this one's
    chain TEXT NOT NULL,
    key BLOB                          -- of the round's randomness; NULL once the answer is stored
) STRICT"""
INDEX = "CREATE INDEX charges_of_run ON charges (run, round)"
ANSWERS = """CREATE TABLE answers (
    run TEXT NOT NULL, round INTEGER NOT NULL, digest TEXT NOT NULL, answer BLOB NOT NULL,
    sha256 TEXT NOT NULL,             -- of the answer
    PRIMARY KEY (run, round)
) STRICT"""
CLOSED = """CREATE TABLE closed (      -- rounds of secure aggregation whose shares may have left
    run TEXT NOT NULL, round INTEGER NOT NULL,
    digest TEXT NOT NULL,             -- of the order and its mechanism, as all survivors signed it
    survivors TEXT NOT NULL,          -- JSON, sorted
    PRIMARY KEY (run, round)
) STRICT"""
SCHEMA = f"""
{LEDGER};
{CHARGES};
{INDEX};
{ANSWERS};
CREATE TABLE sizes (run TEXT PRIMARY KEY, size REAL NOT NULL) STRICT;
{CLOSED};
"""
COLUMNS = "id, run, round, digest, noise_multiplier, sample_rate, steps, extra, at, shares"
_SEALED = (
    "SELECT max_epsilon, delta, accountant, fingerprint, unit, entries, head FROM ledger",
    "SELECT id, hex(key) FROM charges WHERE key IS NOT NULL ORDER BY id",
    "SELECT run, round, digest, sha256 FROM answers ORDER BY run, round",
    "SELECT run, size FROM sizes ORDER BY run",
    "SELECT run, round, digest, survivors FROM closed ORDER BY run, round",
)
_SEALED_BEFORE_3 = _SEALED[:-1]


def genesis(max_epsilon: float, delta: float, accountant: str) -> str:
    """The chain's value before the first charge."""
    return link("", "fedlora ledger", _CHAIN_VERSION, max_epsilon, delta, accountant)


def link(previous: str, *values: object) -> str:
    """The chain's value after an entry with these values."""
    return _hash([previous, *values])


def charged(previous: str, *row: object) -> str:
    """The chain's value after a charge with these values of `COLUMNS`.

    A charge without shares has the value that it had before there were shares.
    """
    *others, shares = row
    return link(previous, *others, shares) if shares else link(previous, *others)


def sha256(answer: bytes) -> str:
    """The digest of a stored answer."""
    return hashlib.sha256(answer).hexdigest()


def seal(db: sqlite3.Connection) -> None:
    """Renew the seal where it has changed. The last statement of a transaction."""
    value = _seal(db)
    if value != _stated_seal(db):
        db.execute("UPDATE ledger SET seal = ?", (value,))


def broken_seal(db: sqlite3.Connection, version: int = VERSION) -> list[str]:
    """Problems of the state that a version sealed, in words. The first call of a transaction."""
    if _seal(db, version) == _stated_seal(db):
        return []
    return [
        "its limits, records, unit, keys, answers, sizes or rounds were changed by something else"
    ]


def problems(db: sqlite3.Connection) -> list[str]:
    """Problems of a file of this version, in words. Call it in a transaction."""
    return (
        broken_pages(db)  # a damaged file cannot be checked further
        or _other_tables(db)
        or broken_chain(db)
        or broken_seal(db)
        or altered_answers(db)
    )


def altered_answers(db: sqlite3.Connection) -> list[str]:
    """Problems of the stored answers."""
    return [
        f"the answer to round {number} of run {run} was altered"
        for run, number, answer, stated in db.execute(
            "SELECT run, round, answer, sha256 FROM answers"
        )
        if sha256(answer) != stated
    ]


def broken_pages(db: sqlite3.Connection) -> list[str]:
    """Problems that SQLite finds in its own structures, types included."""
    return [row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]


def broken_chain(db: sqlite3.Connection, columns: str = COLUMNS) -> list[str]:
    """Problems of the limits and the charges, which have these columns."""
    limits = db.execute(
        "SELECT max_epsilon, delta, accountant, entries, head FROM ledger"
    ).fetchall()
    if len(limits) != 1:
        return [f"it states its limits {len(limits)} times"]
    *settings, entries, head = limits[0]
    chain, count = genesis(*settings), 0
    for *row, stated in db.execute(f"SELECT {columns}, chain FROM charges ORDER BY id"):
        chain, count = charged(chain, *row), count + 1
        if chain != stated:
            return [
                f"charge {row[0]} was altered, one before it removed, or the limits were changed"
            ]
    if (count, chain) != (entries, head):
        return [f"it has {count} charges and should have {entries}, or the limits were changed"]
    return []


def _other_tables(db: sqlite3.Connection) -> list[str]:
    found, wanted = _tables(db), _expected_tables()
    changed = sorted({str(name) for _, name, _, _ in found ^ wanted})
    return [f"{', '.join(changed)} is not defined as in a ledger"] if changed else []


@functools.cache
def _expected_tables() -> frozenset[tuple[object, ...]]:
    with contextlib.closing(empty()) as db:
        return _tables(db)


def empty() -> sqlite3.Connection:
    """A database in memory with the tables of this version."""
    db = sqlite3.connect(":memory:")
    db.executescript(SCHEMA)
    return db


def _tables(db: sqlite3.Connection) -> frozenset[tuple[object, ...]]:
    return frozenset(db.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema"))


def _stated_seal(db: sqlite3.Connection) -> str:
    row = db.execute("SELECT seal FROM ledger").fetchone()
    return row[0] if row else ""


def _seal(db: sqlite3.Connection, version: int = VERSION) -> str:
    queries = _SEALED if version >= VERSION else _SEALED_BEFORE_3
    state = [db.execute(query).fetchall() for query in queries]
    return _hash(["fedlora ledger state", version, *state])


def _hash(values: list[object]) -> str:
    return hashlib.sha256(json.dumps(values, default=repr).encode()).hexdigest()
