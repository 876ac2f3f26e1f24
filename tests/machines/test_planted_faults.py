"""The machines find faults that are planted: each takes away one thing that privacy rests on."""

import contextlib
import dataclasses

import pytest

from client import checks, ledger_file, private_round
from client.ledger import Ledger
from fedlora.wire.messages import TrainOrder
from server import replies, run_directory
from tests.machines.budgets import finds
from tests.machines.test_institution_machine import InstitutionMachine
from tests.machines.test_ledger_machine import LedgerMachine
from tests.machines.test_run_directory_machine import RunDirectoryMachine, references
from tests.machines.test_server_machine import ServerMachine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def test_a_charge_in_pieces_is_found(monkeypatch):
    @contextlib.contextmanager
    def in_pieces(ledger):
        with ledger_file.refusing(ledger._path):
            yield ledger._connection  # each statement by itself
            ledger_file.seal(ledger._connection)

    monkeypatch.setattr(Ledger, "_transaction", in_pieces)
    finds(LedgerMachine)


def test_a_limit_that_nobody_checks_is_found(monkeypatch):
    monkeypatch.setattr(Ledger, "_check_budget", lambda *_: None)
    finds(LedgerMachine)


def test_an_answer_to_any_order_of_its_round_is_found(monkeypatch):
    def answered(db, run, round, digest):
        row = db.execute("SELECT answer FROM answers WHERE (run, round) = (?, ?)", (run, round))
        found = row.fetchone()
        return found and found[0]

    monkeypatch.setattr(ledger_file, "answered", answered)
    finds(LedgerMachine)


def test_an_order_that_its_adapter_has_no_part_in_is_found(monkeypatch, institution_world):
    digest = TrainOrder.digest
    monkeypatch.setattr(
        TrainOrder, "digest", lambda order, config: digest(_without_adapter(order), config)
    )
    finds(InstitutionMachine, **institution_world)


def _without_adapter(order):
    return dataclasses.replace(order, adapter=order.adapter.only(()))


def test_steps_with_less_noise_than_was_paid_are_found(monkeypatch, institution_world):
    whole = private_round.Participant

    def less(**values):
        mechanism = values["mechanism"]
        half = dataclasses.replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)
        return whole(**values | {"mechanism": half})

    monkeypatch.setattr(private_round, "Participant", less)
    finds(InstitutionMachine, **institution_world)


def test_an_adapter_that_nobody_checks_is_found(monkeypatch, institution_world):
    monkeypatch.setattr(checks, "check_adapter", lambda *_: None)
    finds(InstitutionMachine, **institution_world)


def test_an_answer_that_nobody_validates_is_found(monkeypatch, server_world):
    monkeypatch.setattr(replies.base, "validate", lambda *_, **__: None)
    finds(ServerMachine, **server_world)


def test_files_that_are_written_in_place_are_found(monkeypatch, make_config, tmp_path):
    reference = references(make_config, tmp_path)

    def in_place(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    monkeypatch.setattr(run_directory, "write_atomic", in_place)
    finds(RunDirectoryMachine, make_config=staticmethod(make_config), reference=reference)


def test_rounds_that_are_not_cut_back_to_the_checkpoint_are_found(
    monkeypatch, make_config, tmp_path
):
    reference = references(make_config, tmp_path)
    write = run_directory.write_atomic

    def all_but_lines(path, content):
        if path.name != "rounds.jsonl":
            write(path, content)

    monkeypatch.setattr(run_directory, "write_atomic", all_but_lines)
    finds(RunDirectoryMachine, make_config=staticmethod(make_config), reference=reference)
