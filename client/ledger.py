"""An institution's privacy ledger: the epsilon that its records have spent, on its own disk.

One SQLite file that outlives every process. A charge is on the disk *before* the steps run, and is
never refunded. An answer is stored before it is sent. So the ledger covers every sent answer,
whenever the machine dies.

Guaranteed: charges of any number of processes never add up to more than the limit, at the ledger's
own delta, over all runs on these records. The guarantee is void after: an older copy of the file is
put back; the file is separated from its ``-journal``; a second ledger is made for the same records;
somebody writes to the file and computes its seal anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sqlite3
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client import ledger_file
from fedlora.config.sections import MIN_DELTA
from fedlora.errors import InputError, Refusal
from fedlora.privacy import accounting, composition
from fedlora.privacy.composition import Event, History
from fedlora.privacy.streams import KEY_BYTES

STORED_RUNS = 20
"""Runs whose last answer stays: a server that begins many must not fill the institution's disk."""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """A charge, new or found in the ledger.

    Args:
        key: 32 bytes, the seed of the round's noise and sampling; empty when the round was
            answered before.
        answer: The stored answer to send again instead of training, or None.
    """

    key: bytes
    answer: bytes | None


class Ledger:
    """An open ledger; use it as a context manager, in the process and thread that opened it."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        ((self.max_epsilon, self.delta, self.accountant),) = self._rows(
            "SELECT max_epsilon, delta, accountant FROM ledger"
        )

    @classmethod
    def create(
        cls, path: Path | str, *, max_epsilon: float, delta: float, accountant: str = "prv"
    ) -> None:
        """Make an empty ledger, readable by its owner only, atomically.

        Args:
            path: The new file, in a directory that exists.
            max_epsilon: The limit on epsilon of all runs together.
            delta: The delta of that limit; below 1 / records.
            accountant: ``"prv"``, or ``"rdp"``, whose limit also holds where a server chooses a
                run's noise after it has seen another run.

        Raises:
            InputError: If a value is out of bounds, the file exists or cannot be written, or others
                may write to its directory.
        """
        if not 0 < max_epsilon < math.inf:
            raise InputError(f"max-epsilon is {max_epsilon}, but must be a finite number above 0")
        composition.epsilon((), delta, accountant)  # checks both
        if delta < MIN_DELTA:
            raise InputError(
                f"delta is {delta:g}, but accountants are exact from {MIN_DELTA:g} on; raise it"
            )
        ledger_file.write(Path(path), max_epsilon=max_epsilon, delta=delta, accountant=accountant)

    @classmethod
    def open(cls, path: Path | str) -> Ledger:
        """Open a ledger, and check that nothing in it was altered or removed.

        Raises:
            Refusal: ``ledger-missing``, ``ledger-exposed`` (others may write to it or to its
                directory), ``ledger-corrupt`` (damaged or altered), ``ledger-foreign`` (a file of
                another program or version), ``ledger-locked`` (busy for longer than half a minute)
                or ``ledger-unusable`` (not readable or not writable).
        """
        return cls(ledger_file.connect(Path(path)), Path(path))

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def bind(self, fingerprint: str, unit: str) -> None:
        """Bind the ledger to records and unit on first use; afterwards check both.

        Args:
            fingerprint: The digest of the records and their units.
            unit: ``"record"``, or the column whose values are the units of privacy.

        Raises:
            Refusal: ``ledger-foreign`` if it belongs to other records or another unit.
        """
        with self._transaction() as db:
            if not self.is_bound(fingerprint, unit):
                db.execute("UPDATE ledger SET fingerprint = ?, unit = ?", (fingerprint, unit))

    def is_bound(self, fingerprint: str, unit: str) -> bool:
        """Whether the ledger is bound to these records and this unit; False if to none yet.

        Raises:
            Refusal: ``ledger-foreign`` if it belongs to other records or another unit.
        """
        (bound,) = self._rows("SELECT fingerprint, unit FROM ledger")
        if bound not in ((None, None), (fingerprint, unit)):
            raise Refusal(
                "ledger-foreign",
                f"{self._path} belongs to records {bound[0][:12]} by {bound[1]}, not "
                f"{fingerprint[:12]} by {unit}: put back the records, the unit and whatever "
                "decides which of them are trained on, or see 'Other records' in "
                "docs/deployment.md",
            )
        return bound != (None, None)

    def charge(
        self,
        *,
        run_id: str,
        round_number: int,
        order_digest: str,
        event: Event,
        max_steps_of_run: int,
        key: bytes | None = None,
    ) -> Charge:
        """Charge a round before it runs, or find its earlier charge or answer.

        One immediate transaction, on the disk when the method returns:

        1. The round was answered: the same order gets the stored answer, nothing is charged.
        2. The same order was charged and not answered: nothing was sent, or, under secure
           aggregation, nothing was unmasked. So the round may run again under the same key, as the
           same release; nothing is charged.
        3. Otherwise the round is charged, with a fresh key, if it fits the limit. Under secure
           aggregation a round is charged once: with two vectors of the same records in one sum, two
           charges would not cover it. The keys of the run's earlier rounds are wiped, and these
           rounds count as answered.

        Args:
            run_id: The run.
            round_number: The round's number.
            order_digest: The digest of order, configuration and institution, which determine the
                release.
            event: The round's steps.
            max_steps_of_run: The number of steps in the run's plan.
            key: 32 bytes for a reproducible simulation; None for a key from the operating system.

        Raises:
            Refusal: ``round-already-answered`` (with another order, or the answer is gone),
                ``participation-cap``, ``run-changed`` (other noise, sampling rate or steps than the
                run's first charge), ``budget-exhausted``, ``ledger-foreign`` (not bound yet),
                ``ledger-locked``, ``ledger-corrupt``, ``ledger-unusable``.
        """
        order, mechanism = (run_id, round_number, order_digest), dataclasses.astuple(event)
        with self._transaction() as db:
            answer = ledger_file.answered(db, *order)
            if answer is not None:
                return Charge(key=b"", answer=answer)
            paid = db.execute(
                "SELECT key FROM charges WHERE (run, round, digest) = (?, ?, ?)"
                " AND (noise_multiplier, sample_rate, steps, shares) = (?, ?, ?, ?)"
                " ORDER BY id DESC LIMIT 1",
                (*order, *mechanism),
            ).fetchone()
            if paid is not None:
                return Charge(key=paid[0], answer=None)
            self._check_plan(run_id, event, max_steps_of_run)
            if event.shares:
                self._close_earlier(db, run_id, round_number)
            self._check_budget(db, event)
            fresh = os.urandom(KEY_BYTES) if key is None else key
            at = datetime.now(UTC).isoformat(timespec="seconds")
            db.execute(
                "INSERT INTO charges VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*order, *mechanism, at, fresh),
            )
        return Charge(key=fresh, answer=None)

    def _check_plan(self, run: str, event: Event, most: int) -> None:
        """Refuse a charge beyond the run's plan, or with another mechanism than its first one.

        A server could else choose the next noise after the last answer, which numerical composition
        does not cover.
        """
        if self._rows("SELECT fingerprint FROM ledger") == [(None,)]:
            raise Refusal("ledger-foreign", f"{self._path} was never bound to records")
        if (steps := self.steps_of(run) + event.steps) > most:
            raise Refusal(
                "participation-cap", f"run {run} was planned for {most} steps; this makes {steps}"
            )
        first = self._rows(
            "SELECT noise_multiplier, sample_rate, steps, shares FROM charges "
            "WHERE run = ? ORDER BY id LIMIT 1",
            run,
        )
        wanted = dataclasses.astuple(event)
        if first not in ([], [wanted]):
            raise Refusal(
                "run-changed",
                f"run {run} began with (noise, rate, steps, shares) {first[0]} and now asks for "
                f"{wanted}",
            )

    def _close_earlier(self, db: sqlite3.Connection, run: str, number: int) -> None:
        """Under secure aggregation: refuse a second charge of a round, wipe earlier keys."""
        query = "SELECT 1 FROM charges WHERE (run, round) = (?, ?)"
        if db.execute(query, (run, number)).fetchone():
            raise Refusal(
                "round-already-answered",
                f"round {number} of run {run} was charged for another order or institution; "
                "under secure aggregation one vector of the same records may be in a sum",
            )
        earlier = "UPDATE charges SET key = NULL WHERE run = ? AND round < ?"
        db.execute(earlier, (run, number))

    def _check_budget(self, db: sqlite3.Connection, cost: Event) -> None:
        before = ledger_file.events(db)
        needed = self._epsilon((*before, cost))
        if needed > self.max_epsilon:
            raise Refusal(
                "budget-exhausted",
                f"{self._path} allows epsilon {self.max_epsilon:g} at delta {self.delta:g}; "
                f"{self._epsilon(before):.4g} is spent and this round would make it {needed:.4g}",
            )

    def store_answer(
        self, run_id: str, round_number: int, order_digest: str, answer: bytes
    ) -> bytes:
        """Store a round's answer; what the method returns may be sent, and nothing else.

        The same transaction wipes the round's key and drops the answers of the run's earlier rounds
        and of old runs: each opening of the ledger reads all.

        Returns:
            The answer, or the one that another process has stored for the same order: two that were
            trained under one key may differ in their last bits, and only one may leave.

        Raises:
            Refusal: ``round-already-answered`` to another order, or ``ledger-*``.
            ValueError: If the round was not charged.
        """
        place = (run_id, round_number)
        with self._transaction() as db:
            stored = ledger_file.answered(db, run_id, round_number, order_digest)
            if stored is not None:
                return stored
            query = "SELECT 1 FROM charges WHERE (run, round, digest) = (?, ?, ?)"
            if db.execute(query, (*place, order_digest)).fetchone() is None:
                raise ValueError(f"round {round_number} of run {run_id} was never charged")
            db.execute("UPDATE charges SET key = NULL WHERE (run, round) = (?, ?)", place)
            db.execute("DELETE FROM answers WHERE run = ? AND round < ?", place)
            db.execute(
                "DELETE FROM answers WHERE run NOT IN "
                "(SELECT run FROM charges GROUP BY run ORDER BY max(id) DESC LIMIT ?)",
                (STORED_RUNS,),
            )
            db.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?)",
                (*place, order_digest, answer, ledger_file.sha256(answer)),
            )
            return answer

    def close_round(
        self, run_id: str, round_number: int, digest: bytes, survivors: Sequence[str]
    ) -> None:
        """Close a round of secure aggregation: the point of no return, before its shares leave.

        The round counts as answered from then on, and the same transaction wipes its key. The same
        call again changes nothing.

        Args:
            run_id: The run.
            round_number: The round's number.
            digest: The digest that all survivors signed (`fedlora.secure.secure_order`).
            survivors: The institutions whose sum is unmasked, sorted.

        Raises:
            Refusal: ``round-already-answered`` for another digest or other survivors,
                ``round-not-charged``, or ``ledger-*``.
        """
        place, values = (run_id, round_number), (digest.hex(), json.dumps(list(survivors)))
        with self._transaction() as db:
            query = "SELECT digest, survivors FROM closed WHERE (run, round) = (?, ?)"
            closed = db.execute(query, place).fetchone()
            if closed == values:
                return
            if closed is not None:
                raise Refusal(
                    "round-already-answered",
                    f"round {round_number} of run {run_id} was unmasked for other survivors: two "
                    "sums would show their difference",
                )
            wipe = "UPDATE charges SET key = NULL WHERE (run, round) = (?, ?) AND key IS NOT NULL"
            if not db.execute(wipe, place).rowcount:
                raise Refusal(
                    "round-not-charged", f"round {round_number} of run {run_id} has no open charge"
                )
            db.execute("INSERT INTO closed VALUES (?, ?, ?, ?)", (*place, *values))

    def end_run(self, run_id: str) -> None:
        """Wipe all keys of a run that has ended: none of its rounds can be made again."""
        with self._transaction() as db:
            db.execute("UPDATE charges SET key = NULL WHERE run = ?", (run_id,))

    def history(self, run_id: str | None = None) -> History:
        """All charged events, of all runs or of one, in canonical form."""
        with ledger_file.refusing(self._path):
            return ledger_file.events(self._connection, run_id)

    def steps_of(self, run_id: str) -> int:
        """The steps that a run was charged for."""
        query = "SELECT coalesce(sum(steps), 0) FROM charges WHERE run = ?"
        return self._rows(query, run_id)[0][0]

    def runs(self) -> tuple[str, ...]:
        """The identities of all charged runs, sorted."""
        return tuple(run for (run,) in self._rows("SELECT DISTINCT run FROM charges ORDER BY run"))

    def spent(self) -> float:
        """Epsilon of all charges, at the ledger's delta."""
        return self._epsilon(self.history())

    def spent_alone(self) -> float:
        """The same if, in runs with secure aggregation, all other institutions collude."""
        return accounting.epsilon_alone(self.history(), self.delta, self.accountant)

    def fits(self, planned: Sequence[Event], run: str = "") -> bool:
        """Whether all charges and a planned run, unless it was charged, are within the limit."""
        return run in self.runs() or self._epsilon((*self.history(), *planned)) <= self.max_epsilon

    def show(self) -> dict[str, Any]:
        """The ledger as plain values, ready for JSON."""
        ((fingerprint, unit),) = self._rows("SELECT fingerprint, unit FROM ledger")
        rows = self._rows(
            "SELECT run, round, noise_multiplier, sample_rate, steps, shares, at, "
            "key IS NULL AND (shares = 0 OR (run, round) IN (SELECT run, round FROM closed)) "
            "FROM charges ORDER BY id"
        )
        names = ("run", "round", *(field.name for field in dataclasses.fields(Event)), "at")
        spent, alone = self.spent(), self.spent_alone()
        return {
            "epsilon": spent,
            "epsilon_alone": alone if math.isfinite(alone) else "inf",
            "delta": self.delta,
            "limit": self.max_epsilon,
            "left": max(0.0, self.max_epsilon - spent),
            "accountant": self.accountant,
            "unit": unit,
            "fingerprint": fingerprint,
            "entries": [
                dict(zip(names, row, strict=True)) | {"answered": bool(answered)}
                for *row, answered in rows
            ],
        }

    def _epsilon(self, events: Sequence[Event]) -> float:
        return composition.epsilon(events, self.delta, self.accountant)

    def _rows(self, query: str, *values: object) -> list[Any]:
        with ledger_file.refusing(self._path):
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        """One transaction under the seal."""
        db = self._connection
        with ledger_file.refusing(self._path), ledger_file.transaction(db):
            ledger_file.check_seal(db, self._path)
            yield db
            ledger_file.seal(db)
