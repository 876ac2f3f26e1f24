"""The upgrade of ledgers from version 1, which had a chain and no seal, to version 2.

Version 1 does not show a change of fingerprint, unit, keys, answers or sizes. The upgrade seals
their present values.
"""

from __future__ import annotations

import sqlite3

from client import ledger_integrity

FROM_VERSION = 1


def upgrade(db: sqlite3.Connection) -> list[str]:
    """Check a ledger of version 1 and rewrite it as one of version 2. Call it in a transaction.

    Charges stay as they are. The transaction makes the upgrade atomic.

    Returns:
        The ledger's problems, in words; the transaction must then be rolled back.
    """
    if found := ledger_integrity.broken_pages(db) or ledger_integrity.broken_chain(db):
        return found
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
    ledger_integrity.seal(db)
    db.execute(f"PRAGMA user_version={ledger_integrity.VERSION}")
    return ledger_integrity.problems(db)
