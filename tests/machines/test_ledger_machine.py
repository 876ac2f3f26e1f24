"""The ledger against a model of it: any charges and answers, processes that die, several at once.

The model is `Book`, a value, and `after`, what each operation makes of it. Of a process that was
killed its last operation happened or did not; two processes' operations happened in some order.
What the file then says must be one of the books that this allows.
"""

import dataclasses
import functools
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from client import ledger_file
from client.ledger import Ledger
from fedlora.errors import Refusal
from fedlora.privacy import composition
from fedlora.privacy.composition import Event
from tests.machines.budgets import search, searched
from tests.machines.lives import Cut, Life, Report, live

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

DELTA = 1e-5
EVENTS = {
    "a": Event(noise_multiplier=2.0, sample_rate=0.25, steps=1),
    "b": Event(noise_multiplier=3.0, sample_rate=0.5, steps=2),
}
MAX_STEPS = 4
OWNER = ("f" * 64, "record")


@functools.cache
def _epsilon(events: tuple[Event, ...]) -> float:
    return composition.epsilon(events, DELTA, "rdp")


def _spent(events: Sequence[Event]) -> float:
    return _epsilon(composition.compose(events))


LIMIT = _spent([EVENTS["a"]] * 3 + [EVENTS["b"]]) * 1.001


@dataclass(frozen=True)
class Charging:
    """`Ledger.charge` of a round."""

    run: str
    round: int
    digest: str
    like: str

    def on(self, ledger: Ledger) -> Any:
        event = EVENTS[self.like]
        charge = ledger.charge(
            run_id=self.run,
            round_number=self.round,
            order_digest=self.digest,
            event=event,
            max_steps_of_run=MAX_STEPS,
        )
        return charge.key if charge.answer is None else ("answer", charge.answer)


@dataclass(frozen=True)
class Storing:
    """`Ledger.store_answer`."""

    run: str
    round: int
    digest: str
    answer: bytes

    def on(self, ledger: Ledger) -> Any:
        try:
            return ledger.store_answer(self.run, self.round, self.digest, self.answer)
        except ValueError:
            return "never charged"


Operation = Charging | Storing


@dataclass(frozen=True)
class Row:
    """A charge. ``key`` is None until a process has said it."""

    run: str
    round: int
    digest: str
    event: Event
    key: bytes | None = None
    answered: bool = False

    @property
    def shown(self) -> tuple[Any, ...]:
        return self.run, self.round, self.event, self.answered


@dataclass(frozen=True)
class Book:
    """What a ledger holds: charges in order, answers that can be given again."""

    rows: tuple[Row, ...] = ()
    answers: tuple[tuple[str, int, str, bytes], ...] = ()

    @property
    def events(self) -> list[Event]:
        return [row.event for row in self.rows]


def after(book: Book, operation: Operation, said: Any) -> Book | None:
    """The book after an operation that returned ``said``; None if it could not have.

    ``said`` is ``...`` for an operation of which nothing is known but that it took place.
    """
    if isinstance(operation, Storing):
        return _stored(book, operation, said)
    return _charged(book, operation, said)


def _of(book: Book, operation: Charging | Storing) -> list[Row]:
    place = (operation.run, operation.round)
    return [row for row in book.rows if (row.run, row.round) == place]


def _stored(book: Book, operation: Storing, said: Any) -> Book | None:
    rows = _of(book, operation)
    place = (operation.run, operation.round, operation.digest)
    for *where, answer in book.answers:
        if tuple(where) == place:
            return book if said in (..., answer) else None
    if any(row.answered for row in rows):
        return book if said in (..., "round-already-answered") else None
    if operation.digest not in {row.digest for row in rows}:
        return book if said in (..., "never charged") else None
    if said not in (..., operation.answer):
        return None
    wiped = [dataclasses.replace(r, key=None, answered=True) if r in rows else r for r in book.rows]
    kept = [a for a in book.answers if a[0] != operation.run or a[1] >= operation.round]
    kept.append((operation.run, operation.round, operation.digest, operation.answer))
    return dataclasses.replace(book, rows=tuple(wiped), answers=tuple(sorted(kept)))


def _charged(book: Book, operation: Charging, said: Any) -> Book | None:
    event, rows = EVENTS[operation.like], _of(book, operation)
    place = (operation.run, operation.round, operation.digest)
    for *where, answer in book.answers:
        if tuple(where) == place:
            return book if said in (..., ("answer", answer)) else None
    if any(row.answered for row in rows):
        return book if said in (..., "round-already-answered") else None
    same = [row for row in rows if (row.digest, row.event) == (operation.digest, event)]
    if same:
        return _keyed(book, same[-1], said)
    mine = [row for row in book.rows if row.run == operation.run]
    if sum(row.event.steps for row in mine) + event.steps > MAX_STEPS:
        return book if said in (..., "participation-cap") else None
    first = mine[0] if mine else None
    if first and first.event != event:
        return book if said in (..., "run-changed") else None
    if _spent([*book.events, event]) > LIMIT:
        return book if said in (..., "budget-exhausted") else None
    row = Row(*place, event)
    return _keyed(dataclasses.replace(book, rows=(*book.rows, row)), row, said)


def _keyed(book: Book, row: Row, said: Any) -> Book | None:
    """The book in which a charge has the key that was said: its own, and no other's."""
    if said is ...:
        return book
    others = {other.key for other in book.rows if other is not row}
    if not isinstance(said, bytes) or len(said) != 32 or said in others:
        return None
    if row.key not in (None, said):
        return None
    keyed = dataclasses.replace(row, key=said)
    return dataclasses.replace(book, rows=tuple(keyed if r is row else r for r in book.rows))


@dataclass(frozen=True)
class Past:
    """What one process did: operations with what they returned, and perhaps one more."""

    done: tuple[tuple[Operation, Any], ...]
    cut_off: Operation | None


def reachable(book: Book, pasts: Sequence[Past]) -> Iterator[Book]:
    """Every book that these processes can have left, whatever came first."""
    if not any(past.done or past.cut_off for past in pasts):
        yield book
        return
    for i, past in enumerate(pasts):
        if past.done:
            (operation, said), *later = past.done
            rest = dataclasses.replace(past, done=tuple(later))
        elif past.cut_off:
            yield from reachable(book, [*pasts[:i], Past((), None), *pasts[i + 1 :]])
            operation, said, rest = past.cut_off, ..., Past((), None)
        else:
            continue
        if (made := after(book, operation, said)) is not None:
            yield from reachable(made, [*pasts[:i], rest, *pasts[i + 1 :]])


def perform(path: Path, operations: Sequence[Operation], report: Report) -> None:
    """A process at work: what each operation returned."""
    with Ledger.open(path) as ledger:
        for operation in operations:
            try:
                said = operation.on(ledger)
            except Refusal as refusal:
                said = refusal.code
            report(said)


def _lose(path: Path, share: float) -> None:
    """Lose the end of a journal that was not synced, as the end of a machine does."""
    journal = path.with_name(f"{path.name}-journal")
    if journal.exists():
        with journal.open("r+b") as file:
            if not any(file.read(12)[8:]):  # SQLite writes the number of records once they are
                file.truncate(int(share * journal.stat().st_size))


runs, rounds, digests = st.sampled_from("ab"), st.integers(1, 3), st.sampled_from("xy")
seldom = st.sampled_from([False, False, False, False, True])


@st.composite
def charging(draw: st.DrawFn) -> Charging:
    run = draw(runs)
    like = {"a": "b", "b": "a"}[run] if draw(seldom) else run
    return Charging(run, draw(rounds), draw(digests), like)


storing = st.builds(Storing, runs, rounds, digests, st.sampled_from([b"first", b"second"]))
operations = st.lists(st.one_of(charging(), charging(), storing), min_size=1, max_size=4)
cuts = st.one_of(
    st.none(),
    st.builds(Cut, st.just("statement"), st.integers(1, 50)),
    st.builds(Cut, st.just("instruction"), st.integers(1, 120)),
)


class LedgerMachine(RuleBasedStateMachine):
    """One ledger, ever new processes."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "bank.db"
        self.books: set[Book] = {Book()}

    def teardown(self) -> None:
        shutil.rmtree(self.directory)

    def _create(self, report: Report) -> None:
        Ledger.create(self.path, max_epsilon=LIMIT, delta=DELTA, accountant="rdp")

    def _bind(self, report: Report) -> None:
        with Ledger.open(self.path) as ledger:
            ledger.bind(*OWNER)

    @initialize(
        creation=st.one_of(cuts, st.builds(Cut, st.just("file"), st.integers(1, 12))), binding=cuts
    )
    def begin(self, creation: Cut | None, binding: Cut | None) -> None:
        """A ledger is there whole or not at all, bound or not bound."""
        live(self._create, creation)
        if not self.path.exists():
            live(self._create)
        Ledger.open(self.path).close()
        live(self._bind, binding)
        live(self._bind)

    @rule(operations=operations, cut=cuts, lost=st.one_of(st.none(), st.floats(0, 1)))
    def one_process(self, operations: list[Operation], cut: Cut | None, lost: float | None) -> None:
        """One process, which may die; with ``lost`` the machine dies with it.

        A machine's end loses a part of the journal that was not synced.
        """
        reports, killed = live(lambda report: perform(self.path, operations, report), cut)
        if killed and lost is not None:
            _lose(self.path, lost)
        self._settle([_past(operations, reports, killed)])

    @rule(one=operations, other=operations, cut=cuts)
    def two_processes(self, one: list[Operation], other: list[Operation], cut: Cut | None) -> None:
        """Two at once, of which one may die."""
        lives = [
            Life(lambda report: perform(self.path, one, report), cut),
            Life(lambda report: perform(self.path, other, report), None),
        ]
        ends = [life.end() for life in lives]
        self._settle([_past(o, *end) for o, end in zip([one, other], ends, strict=True)])

    @rule(one=operations, other=operations, number=st.integers(8, 50), dies=st.booleans())
    def one_waits(
        self, one: list[Operation], other: list[Operation], number: int, dies: bool
    ) -> None:
        """One stops anywhere; the other does its work, or finds the ledger locked and says so."""
        stopping = Life(
            lambda report: perform(self.path, one, report),
            Cut("statement", number),
            signal.SIGSTOP,
        )
        stopped, patience = stopping.stopped(), ledger_file.BUSY_SECONDS
        ledger_file.BUSY_SECONDS = 0.02
        try:
            reports, _ = live(lambda report: perform(self.path, other, report))
        finally:
            ledger_file.BUSY_SECONDS = patience
        if stopped:
            stopping.signal(signal.SIGKILL if dies else signal.SIGCONT)
        ended = stopping.end()
        done = _past(other, reports, False)
        locked = [said == "ledger-locked" for _, said in done.done]
        assert stopped or not any(locked)
        through = [pair for pair, out in zip(done.done, locked, strict=True) if not out]
        self._settle([_past(one, *ended), Past(tuple(through), None)])

    def _settle(self, pasts: Sequence[Past]) -> None:
        """Keep the books that fit what the processes said and what the file says."""
        found = {book for before in self.books for book in reachable(before, pasts)}
        assert found, f"no order of these explains what was said: {pasts}"
        with Ledger.open(self.path) as ledger:
            shown, spent = ledger.show(), ledger.spent()
        rows = tuple(
            (
                entry["run"],
                entry["round"],
                Event(**{field.name: entry[field.name] for field in dataclasses.fields(Event)}),
                entry["answered"],
            )
            for entry in shown["entries"]
        )
        self.books = {book for book in found if tuple(row.shown for row in book.rows) == rows}
        assert self.books, f"the ledger says {rows} after {pasts}"
        (events,) = {tuple(book.events) for book in self.books}
        assert spent == _spent(events) <= LIMIT
        assert (shown["fingerprint"], shown["unit"]) == OWNER


def _past(operations: Sequence[Operation], reports: Sequence[Any], killed: bool) -> Past:
    done = tuple(zip(operations, reports, strict=False))
    next_one = operations[len(done)] if killed and len(done) < len(operations) else None
    return Past(done, next_one)


@searched(fixed=(5, 8), long=(150, 30))
def test_a_ledger_says_what_its_processes_were_told_whatever_dies(budget):
    search(LedgerMachine, budget)
