"""The upgrade of ledgers of older versions.

Version 1 had a chain and no seal, so it does not show a change of fingerprint, unit, keys, answers
or sizes. The upgrade seals their present values. Version 2 had no shares of noise and no
closed rounds.
"""

from __future__ import annotations

import contextlib
import sqlite3

from client import ledger_integrity

VERSIONS = (1, 2)
"""The versions that can be upgraded."""
_CLOSED = {("closed", column) for column in ("run", "round", "digest", "survivors")}
_NEW_IN_3 = {("charges", "shares")} | _CLOSED
_LATER = {1: {("ledger", "seal"), ("answers", "sha256")} | _NEW_IN_3, 2: _NEW_IN_3}
"""Version -> the columns, as table and name, that a later version added."""
_WITHOUT_SHARES = ledger_integrity.COLUMNS.replace(", shares", ", 0")


def upgrade(db: sqlite3.Connection, version: int) -> list[str]:
    """Check a ledger of an older version and rewrite it as one of this. Call it in a transaction.

    Charges stay as they are. The transaction makes the upgrade atomic.

    Returns:
        The ledger's problems, in words; the transaction must then be rolled back.
    """
    if found := (
        ledger_integrity.broken_pages(db)
        or _other_form(db, version)
        or ledger_integrity.broken_chain(db, _WITHOUT_SHARES)
        or (version > 1 and ledger_integrity.broken_seal(db, version))
        or (version > 1 and ledger_integrity.altered_answers(db))
    ):
        return found
    if version == 1:
        _add_seals(db)
    charges = db.execute(f"SELECT {_WITHOUT_SHARES}, chain, key FROM charges ORDER BY id")
    rows = charges.fetchall()
    db.execute("DROP TABLE charges")
    db.execute(ledger_integrity.CHARGES)
    db.execute(ledger_integrity.INDEX)
    db.execute(ledger_integrity.CLOSED)
    db.executemany(f"INSERT INTO charges VALUES ({'?, ' * 11}?)", rows)
    ledger_integrity.seal(db)
    db.execute(f"PRAGMA user_version={ledger_integrity.VERSION}")
    return ledger_integrity.problems(db)


def _other_form(db: sqlite3.Connection, version: int) -> list[str]:
    """Problems of the tables: a newer ledger that is called older would be checked less."""
    with contextlib.closing(ledger_integrity.empty()) as newest:
        wanted = _columns(newest) - _LATER[version]
    changed = sorted({table for table, _ in _columns(db) ^ wanted})
    if not changed:
        return []
    return [f"{', '.join(changed)} is not defined as in a ledger of version {version}"]


def _columns(db: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(
        db.execute(
            "SELECT tables.name, columns.name FROM sqlite_schema AS tables, "
            "pragma_table_info(tables.name) AS columns WHERE tables.type = 'table'"
        )
    )


def _add_seals(db: sqlite3.Connection) -> None:
    """Give the tables of version 1 their columns for seals."""
    ledger = db.execute(
        "SELECT max_epsilon, delta, accountant, fingerprint, unit, entries, head FROM ledger"
    ).fetchall()
    answers = db.execute("SELECT run, round, digest, answer FROM answers").fetchall()
    for table in ("ledger", "answers"):
        db.execute(f"DROP TABLE {table}")
    db.execute(ledger_integrity.LEDGER)
    db.execute(ledger_integrity.ANSWERS)
    db.executemany("INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?, ?, '')", ledger)
    db.executemany(
        "INSERT INTO answers VALUES (?, ?, ?, ?, ?)",
        [(*row, ledger_integrity.sha256(row[-1])) for row in answers],
    )
