"""The file of an institution's state in secure aggregation: SQLite, readable by its owner only.

A row that is erased is overwritten in the file, and the journal of the change is deleted. Blocks
that a file system or a drive keeps elsewhere are beyond this program. The file has no write-ahead
log, because that needs memory which machines of a cluster do not share.

The functions run inside a transaction of `opened`.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from client import ledger_file
from client.ledger_file import Kind
from fedlora import files
from fedlora.errors import Refusal

FILE = "secure.db"
"""The store's name in a deployed institution's ``state``."""
MAX_UNUSED = 20
"""The most runs that were set up and have no masked vector, which a charge comes before: a server
may ask for any number of them."""
_KIND = Kind(
    store="secure-store",
    application=0x66646C73,  # "fdls"
    version=2,
    schema="""
CREATE TABLE runs (
    run TEXT PRIMARY KEY, terms BLOB NOT NULL,
    roster BLOB NOT NULL,   -- digest of the pinned keys of the run's names
    keys BLOB NOT NULL,     -- answer to the first exchange of the setup
    channel BLOB,           -- private key; NULL once shares of the others arrived
    peers BLOB,             -- the order of the second exchange
    sealed BLOB,            -- the answer to it
    delivered INTEGER NOT NULL DEFAULT 0,  -- whether shares of the others arrived
    ended INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE secrets (
    run TEXT NOT NULL, round INTEGER NOT NULL, mask BLOB NOT NULL, seed BLOB NOT NULL,
    PRIMARY KEY (run, round)
);
CREATE TABLE shares (
    run TEXT NOT NULL, round INTEGER NOT NULL, dealer TEXT NOT NULL,
    mask BLOB NOT NULL, seed BLOB NOT NULL,
    PRIMARY KEY (run, round, dealer)
);
CREATE TABLE rounds (
    run TEXT NOT NULL, round INTEGER NOT NULL, digest BLOB NOT NULL,
    masked BLOB,            -- the masked vector; empty once it is of no use
    list BLOB, signature BLOB,
    PRIMARY KEY (run, round)
);
""",
)


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A row of ``runs``."""

    run: str
    terms: bytes
    roster: bytes
    keys: bytes
    channel: bytes | None
    peers: bytes | None = None
    sealed: bytes | None = None
    delivered: int = 0
    ended: int = 0


@dataclass(frozen=True, kw_only=True)
class StoredRound:
    """What is stored of a run's round."""

    round: int
    digest: bytes
    masked: bytes | None
    list: bytes | None
    signature: bytes | None


Pair = tuple[bytes, bytes]
"""A secret, or a share, of a mask key and of a self-mask seed."""


@contextlib.contextmanager
def opened(path: Path) -> Generator[sqlite3.Connection]:
    """Open the store, make it if it does not exist, and run a block as one transaction.

    Raises:
        Refusal: ``secure-store-exposed``, ``-foreign``, ``-locked``, ``-corrupt`` or ``-unusable``;
            the block's own error otherwise.
    """
    with ledger_file.refusing(path, _KIND):
        if exposed := files.exposed(path):
            raise Refusal(f"{_KIND.store}-exposed", exposed)
        if not path.exists():
            # another process may make it meanwhile
            with contextlib.suppress(FileExistsError), ledger_file.new(path, _KIND):
                pass
        with (
            contextlib.closing(ledger_file.opened(path, _KIND)) as db,
            ledger_file.transaction(db),
        ):
            ledger_file.check_pages(db, path, _KIND)
            yield db


def run(db: sqlite3.Connection, run: str) -> StoredRun | None:
    """What is stored of a run."""
    row = db.execute(
        "SELECT run, terms, roster, keys, channel, peers, sealed, delivered, ended FROM runs "
        "WHERE run = ?",
        (run,),
    ).fetchone()
    names = StoredRun.__dataclass_fields__
    return None if row is None else StoredRun(**dict(zip(names, row, strict=True)))


def add_run(db: sqlite3.Connection, stored: StoredRun, secrets: Iterable[Pair]) -> None:
    """Store a new run, with the mask key and the seed of each round from 1."""
    db.execute(
        "INSERT INTO runs (run, terms, roster, keys, channel) VALUES (?, ?, ?, ?, ?)",
        (stored.run, stored.terms, stored.roster, stored.keys, stored.channel),
    )
    db.executemany(
        "INSERT INTO secrets VALUES (?, ?, ?, ?)",
        ((stored.run, number, *pair) for number, pair in enumerate(secrets, 1)),
    )


def drop_unused(db: sqlite3.Connection) -> None:
    """Forget the oldest runs without a masked vector: fewer than `MAX_UNUSED` are left."""
    found = db.execute(
        "SELECT run FROM runs WHERE NOT ended AND run NOT IN "
        "(SELECT run FROM rounds WHERE masked IS NOT NULL) ORDER BY rowid DESC LIMIT -1 OFFSET ?",
        (MAX_UNUSED - 1,),
    ).fetchall()
    for table in ("secrets", "shares", "rounds", "runs"):
        db.executemany(f"DELETE FROM {table} WHERE run = ?", found)


def known(db: sqlite3.Connection) -> dict[str, bool]:
    """Run -> whether its secrets are erased, the oldest first."""
    return {
        run: bool(ended) for run, ended in db.execute("SELECT run, ended FROM runs ORDER BY rowid")
    }


def add_sealed(db: sqlite3.Connection, run: str, *, peers: bytes, sealed: bytes) -> None:
    """Store the second exchange of a run's setup: its order and the answer."""
    db.execute("UPDATE runs SET peers = ?, sealed = ? WHERE run = ?", (peers, sealed, run))


def secrets(db: sqlite3.Connection, run: str) -> dict[int, Pair]:
    """Round -> mask key and seed, of all rounds that are not erased."""
    rows = db.execute("SELECT round, mask, seed FROM secrets WHERE run = ?", (run,))
    return {number: (mask, seed) for number, mask, seed in rows}


def add_shares(db: sqlite3.Connection, run: str, dealer: str, shares: Mapping[int, Pair]) -> None:
    """Store the shares of an institution's secrets: round -> share of its mask key, its seed."""
    db.executemany(
        "INSERT INTO shares VALUES (?, ?, ?, ?, ?)",
        ((run, number, dealer, *pair) for number, pair in shares.items()),
    )


def delivered(db: sqlite3.Connection, run: str) -> None:
    """Note that shares arrived, and erase the channel's key, whether or not all of them opened."""
    db.execute("UPDATE runs SET delivered = 1, channel = NULL WHERE run = ?", (run,))


def shares(db: sqlite3.Connection, run: str, number: int) -> dict[str, Pair]:
    """Dealer -> share of its mask key and of its seed, for a round."""
    rows = db.execute(
        "SELECT dealer, mask, seed FROM shares WHERE (run, round) = (?, ?)", (run, number)
    )
    return {dealer: (mask, seed) for dealer, mask, seed in rows}


def latest_round(db: sqlite3.Connection, run: str) -> StoredRound | None:
    """The last round of a run that began."""
    row = db.execute(
        "SELECT round, digest, masked, list, signature FROM rounds WHERE run = ? "
        "ORDER BY round DESC LIMIT 1",
        (run,),
    ).fetchone()
    names = StoredRound.__dataclass_fields__
    return None if row is None else StoredRound(**dict(zip(names, row, strict=True)))


def begin_round(db: sqlite3.Connection, run: str, number: int, digest: bytes) -> None:
    """Store a round's order; erase secrets, shares and masked vectors of all rounds before it."""
    _erase_masked(db, run)
    db.execute("INSERT INTO rounds (run, round, digest) VALUES (?, ?, ?)", (run, number, digest))
    for table in ("secrets", "shares"):
        db.execute(f"DELETE FROM {table} WHERE run = ? AND round < ?", (run, number))


def add_masked(db: sqlite3.Connection, run: str, number: int, masked: bytes) -> None:
    """Store a round's masked vector."""
    db.execute("UPDATE rounds SET masked = ? WHERE (run, round) = (?, ?)", (masked, run, number))


def add_list(
    db: sqlite3.Connection, run: str, number: int, *, listed: bytes, signature: bytes
) -> None:
    """Store a round's list and this institution's signature over it."""
    db.execute(
        "UPDATE rounds SET list = ?, signature = ? WHERE (run, round) = (?, ?)",
        (listed, signature, run, number),
    )


def end(db: sqlite3.Connection, run: str) -> None:
    """Erase a run's secrets, shares, key messages and masked vectors.

    Its terms and its rounds' digests, lists and signatures stay.
    """
    for table in ("secrets", "shares"):
        db.execute(f"DELETE FROM {table} WHERE run = ?", (run,))
    _erase_masked(db, run)
    db.execute(
        "UPDATE runs SET keys = x'', channel = NULL, peers = NULL, sealed = NULL, ended = 1 "
        "WHERE run = ?",
        (run,),
    )


def _erase_masked(db: sqlite3.Connection, run: str) -> None:
    """Erase a run's masked vectors; which rounds had one stays known."""
    db.execute("UPDATE rounds SET masked = x'' WHERE run = ? AND masked IS NOT NULL", (run,))
