"""The protocol of secure aggregation in whole runs: losses, deaths and lies change no bit."""

import json
from pathlib import Path

import pytest

import client.app
import server.app
from client import secure_store
from client.ledger import Ledger
from fedlora.errors import Refusal
from fedlora.runs.run_files import read_records
from fedlora.wire import wire
from server import verification
from server.roster import RunFailed
from simulation import run
from simulation.engines.grid import error_reply, run_server
from simulation.engines.inline import InlineGrid
from tests.samples import final_adapter, same_adapters

FIVE = {
    "data.partition": "iid",
    "data.institutions": 5,
    "privacy.trust": "secure-aggregation",
    "privacy.honest": 2,
    "privacy.colluding": 1,
    "federation.weighting": "public-size",
    "federation.server-optimizer": "none",
    "federation.server-learning-rate": 1.0,
}
TRAIN = "train"
STEPS = (TRAIN, wire.LIST, wire.UNMASK)
LOST = 5
"""Flower's code of a node that is not available."""


class Lossy(InlineGrid):
    """A grid on which some messages, or the replies to them, are lost.

    Args:
        config: The run.
        lost: (message type, round from 1, node) of each lost message.
        reply: Whether the institution has the message, and its reply is lost.
    """

    def __init__(self, config, lost, *, reply=False):
        super().__init__(client.app.app, config.data.institutions, config.shared())
        self.lost, self.reply = set(lost), reply
        self.exchanges = dict.fromkeys((*STEPS, wire.KEYS, wire.SHARES), 0)

    def push_messages(self, messages):
        messages = list(messages)
        kind = messages[0].metadata.message_type
        if kind in self.exchanges:
            self.exchanges[kind] += 1
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        lost = [m for i in message_ids if (m := self._waiting.get(i)) and self._is_lost(m)]
        if not lost or self.reply:
            return [self._replaced(reply) for reply in super().pull_messages(message_ids)]
        for message in lost:
            del self._waiting[message.metadata.message_id]
        return [error_reply(message, LOST, "lost") for message in lost]

    def _is_lost(self, message):
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        return (kind, self.exchanges.get(kind, 0), node) in self.lost

    def _replaced(self, reply):
        kind, node = reply.metadata.message_type, reply.metadata.src_node_id
        if (kind, self.exchanges.get(kind, 0), node) not in self.lost:
            return reply
        reply.content = wire.pack_refusal("lost")
        return reply


def _play(config, lost=(), **kinds):
    """Run a configuration on a lossy grid; gives the grid."""
    with run.load("inline", config):
        grid = Lossy(config, lost, **kinds)
        run_server(server.app.app, grid, config.flat())
    return grid


def _ledgers(config):
    """The entries of each institution's ledger."""
    for file in sorted((Path(config.run_dir) / "ledgers").glob("*.db")):
        if not file.name.endswith(secure_store.FILE):
            with Ledger.open(file) as ledger:
                yield ledger.show()["entries"]


@pytest.fixture
def both(tiny_config, tmp_path):
    """Makes the configurations of an undisturbed run and of another."""

    def make(**values):
        return [
            tiny_config(
                **{
                    **FIVE,
                    "run-dir": str(tmp_path / kind),
                    **values,
                }
            )
            for kind in ("calm", "full")
        ]

    return make


@pytest.mark.parametrize("strategy", ["fedavg", pytest.param("rolora", marks=pytest.mark.slow)])
def test_fresh_masks_change_no_bit(both, strategy):
    calm, full = both(**{"federation.strategy": strategy})
    _play(calm)
    grid = _play(full)
    assert same_adapters(final_adapter(calm), final_adapter(full))
    assert grid.exchanges == {
        TRAIN: 3, wire.LIST: 3, wire.UNMASK: 3, wire.KEYS: 1, wire.SHARES: 1
    }  # fmt: skip
    said = [json.loads((Path(c.run_dir) / "privacy.json").read_text()) for c in (calm, full)]
    assert said[0]["institutions"] == said[1]["institutions"]
    spent = [[(e["round"], e["answered"]) for e in entries] for entries in _ledgers(full)]
    assert spent == [[(1, True), (2, True), (3, True)]] * 5


@pytest.mark.parametrize("reply", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_institution_that_vanishes_at_any_step_changes_no_bit_and_comes_back(both, reply):
    """Each round loses another institution, at another step: four of five are enough."""
    calm, full = both(**{"federation.rounds": 4})
    trains = {(TRAIN, 2, 4), (TRAIN, 4, 1)}
    _play(calm, trains, reply=reply)
    _play(full, {*trains, (wire.LIST, 1, 2), (wire.UNMASK, 3, 3)}, reply=reply)
    assert same_adapters(final_adapter(calm), final_adapter(full))
    counts = [[r["updates"] for r in read_records(Path(c.run_dir))] for c in (calm, full)]
    assert counts == [[5, 4, 5, 4]] * 2
    checks = verification.verify(Path(full.run_dir))
    assert [check.detail for check in checks if check.state == "failed"] == []


@pytest.mark.parametrize(("step", "answered"), [(TRAIN, 0), (wire.LIST, 0), (wire.UNMASK, 3)])
def test_a_round_with_too_few_is_given_up_changes_nothing_and_the_run_goes_on(both, step, answered):
    """Four of five are needed for the sum, the signatures and the shares: two are lost."""
    _, full = both(**{"privacy.colluding": 2})
    grid = _play(full, {(step, 2, 1), (step, 2, 2)})
    records = read_records(Path(full.run_dir))
    assert [record["skipped"] for record in records] == [False, True, False]
    assert grid.exchanges[wire.UNMASK] == (3 if step == wire.UNMASK else 2)
    closed = [e["round"] for entries in _ledgers(full) for e in entries if e["answered"]]
    assert closed.count(2) == answered and closed.count(1) == closed.count(3) == 5
    checks = verification.verify(Path(full.run_dir))
    assert [check.detail for check in checks if check.state == "failed"] == []


def test_a_setup_without_one_institution_begins_no_round_and_is_made_by_a_resumed_run(both):
    calm, full = both()
    with pytest.raises(RunFailed, match="1 institutions have no part in the setup"):
        _play(full, {(wire.SHARES, number, 3) for number in (1, 2, 3)})
    assert not read_records(Path(full.run_dir))
    _play(full)
    _play(calm)
    assert same_adapters(final_adapter(calm), final_adapter(full))


class Killed(BaseException):
    """The server dies."""


class Mortal(Lossy):
    """A grid whose server dies when it has, or has not yet, sent the nth exchange of a kind."""

    def __init__(self, config, kind, number, *, sent):
        super().__init__(config, ())
        self.kind, self.number, self.sent = kind, number, sent

    def push_messages(self, messages):
        messages = list(messages)
        kind = messages[0].metadata.message_type
        dies = kind == self.kind and self.exchanges[kind] + 1 == self.number
        ids = list(super().push_messages(messages)) if self.sent or not dies else []
        if dies:
            list(self.pull_messages(ids[:2]))  # some institutions have it, or none
            raise Killed
        return ids


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        (wire.UNMASK, True),
        *(
            pytest.param(kind, sent, marks=pytest.mark.slow)
            for kind in (wire.KEYS, wire.SHARES, *STEPS)
            for sent in (False, True)
            if (kind, sent) != (wire.UNMASK, True)
        ),
    ],
)
def test_a_server_killed_in_any_step_goes_on_and_gives_the_same_adapter(both, kind, sent):
    calm, full = both(**{"federation.rounds": 2})
    _play(calm)
    with run.load("inline", full), pytest.raises(Killed):
        number = 1 if kind in (wire.KEYS, wire.SHARES) else 2
        run_server(server.app.app, Mortal(full, kind, number, sent=sent), full.flat())
    grid = _play(full)
    assert same_adapters(final_adapter(calm), final_adapter(full))
    again = 0 if kind in STEPS else 1
    assert grid.exchanges[wire.SHARES] == again  # a stored setup is found
    assert [len(entries) for entries in _ledgers(full)] == [2] * 5


@pytest.mark.slow
def test_the_protocol_runs_on_ray(both, simulate_on_ray):
    calm, full = both(**{"federation.rounds": 2})
    _play(calm)
    simulate_on_ray(full)
    assert same_adapters(final_adapter(calm), final_adapter(full))


def test_an_order_without_a_mask_is_refused_before_a_charge(both):
    _, full = both()

    class Plain(Lossy):
        """Its server leaves the masks out of the orders."""

        def push_messages(self, messages):
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == TRAIN:
                    del message.content["secure"]
            return super().push_messages(messages)

    with run.load("inline", full), pytest.raises(RunFailed, match="secure-order-missing x 5"):
        run_server(server.app.app, Plain(full, ()), full.flat())
    assert list(_ledgers(full)) == [[]] * 5


def test_a_message_of_the_protocol_in_a_run_without_it_is_refused(both):
    from flwr.app import Message

    from fedlora.secure.secure_aggregation import ListOrder

    calm, _ = both(**{"privacy.trust": "local"})
    with run.load("inline", calm):
        grid = Lossy(calm, ())
        order = wire.pack_secure(ListOrder(run="a", round=1, survivors=("a",)))
        (reply,) = grid.send_and_receive([Message(order, 1, wire.LIST, group_id="1")])
    with pytest.raises(Refusal, match="protocol-mismatch"):
        wire.unpack_secure(ListOrder, reply.content)
