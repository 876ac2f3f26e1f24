"""A ledger's file: damage, edits by hand, and who else may write to it."""

import contextlib
import random
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from client.ledger import Ledger
from fedlora.errors import InputError, Refusal
from fedlora.privacy.composition import Event

DELTA = 1e-4
STEP = Event(noise_multiplier=2.0, sample_rate=0.25, steps=1)
FINGERPRINT = "f" * 64
ANSWER = b"the update of round 2" * 20


def charge(ledger: Ledger, run: str, round: int, digest: str = "order"):
    return ledger.charge(
        run_id=run,
        round_number=round,
        order_digest=digest,
        event=STEP,
        max_steps_of_run=100,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with all kinds of rounds in it, answered, open and closed."""
    path = tmp_path / "bank.db"
    Ledger.create(path, max_epsilon=9.0, delta=DELTA, accountant="rdp")
    with Ledger.open(path) as ledger:
        ledger.bind(FINGERPRINT, "record")
        for round in (1, 2):
            charge(ledger, "run", round)
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
        path.write_bytes(damaged)
        try:
            end = "as before" if read(path) == before else f"other values, bit {bit}"
        except Refusal as refusal:
            end = refusal.code if refusal.code.startswith("ledger-") else f"{refusal.code}, {bit}"
        except Exception as error:
            end = f"{type(error).__name__} at bit {bit}"
        ends[end] = ends.get(end, 0) + 1
    return ends


HARMLESS = {"as before", "ledger-corrupt", "ledger-foreign", "ledger-unusable"}


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
        "DELETE FROM closed",
        "UPDATE closed SET survivors = '[\"a\"]'",
        "UPDATE closed SET round = 2",
        "CREATE TRIGGER undo AFTER INSERT ON charges BEGIN DELETE FROM charges; END",
        "DROP INDEX charges_of_run",
        "ALTER TABLE charges ADD COLUMN more TEXT",
        "INSERT INTO ledger SELECT * FROM ledger",
        "UPDATE charges SET steps = 2 WHERE id = 2",
        "UPDATE charges SET noise_multiplier = 20.0 WHERE id = 3",
        "DELETE FROM charges WHERE id = 1",
        "DELETE FROM charges WHERE id = 5",
        "DELETE FROM charges",
        "UPDATE ledger SET max_epsilon = 1000.0",
        "UPDATE ledger SET delta = 0.1",
        "DELETE FROM ledger",
        "DROP TABLE charges",
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


def test_shares_of_noise_are_sealed_and_count_in_both_totals(path: Path) -> None:
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
                max_steps_of_run=2,
            )
        with pytest.raises(Refusal, match="run-changed"):
            ledger.charge(
                run_id="secure",
                round_number=2,
                order_digest="other",
                event=replace(shared, shares=3),
                max_steps_of_run=3,
            )
        shown, history = ledger.show(), ledger.history("secure")
    assert history == (replace(shared, steps=2),)
    assert [entry["shares"] for entry in shown["entries"]][-3:] == [0, 4, 4]
    assert before["epsilon"] < shown["epsilon"] < shown["epsilon_alone"]
    edit(path, "UPDATE charges SET shares = 0 WHERE run = 'secure'")
    with pytest.raises(Refusal, match="ledger-corrupt"):
        Ledger.open(path)


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
