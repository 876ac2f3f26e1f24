"""Institutions with pinned keys and a server that may lie: the full protocol, without a network."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import Message

import server.app
from client import cohort
from client.ledger import Ledger
from deployment import keys, setup
from fedlora.runs.run_files import KEYS, read_records
from fedlora.secure import peers, secure_order
from fedlora.secure.secure_aggregation import (
    ListOrder,
    SharesOrder,
    Terms,
    UnmaskMessage,
    UnmaskOrder,
)
from fedlora.wire import wire
from server import binding, secure_session, verification
from server.roster import RunFailed
from simulation.engines.grid import run_server
from tests.deployment.remote import BANKS, Remote

SECURE = {
    "privacy.trust": "secure-aggregation",
    "privacy.honest": 2,
    "privacy.colluding": 1,
    "federation.weighting": "public-size",
    "federation.server-optimizer": "none",
    "federation.server-learning-rate": 1.0,
    "federation.rounds": 2,
}


@pytest.fixture(autouse=True)
def no_pause_between_tries(monkeypatch):
    monkeypatch.setattr(secure_session, "SETUP_PAUSE", 0.0)


@pytest.fixture
def files(institutions, rows):
    """Settings of four institutions that pinned each other's keys, which the server knows too."""
    made = institutions()
    public = {}
    for name in BANKS:
        public[name], private = keys.make_node(name)
        key = rows / name / "node.key"
        key.write_bytes(private)
        key.chmod(0o600)
    for name, file in zip(BANKS, made, strict=True):
        folder = rows / name / "peers"
        folder.mkdir()
        for peer in BANKS:
            if peer != name:
                (folder / f"{peer}.pub").write_bytes(public[peer])
        more = 'secure-aggregation = true\nkey = "node.key"\npeers = "peers"\n'
        file.write_text(file.read_text() + more)
    pem = {
        name: peers.read(key, name)
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
        for name, key in public.items()
    }
    (rows / KEYS).write_text(json.dumps(pem))
    return made


def _run(config, grid):
    run_server(server.app.app, grid, config.flat())
    return json.loads((Path(config.run_dir) / "result.json").read_text())


def _entries(rows, name):
    with Ledger.open(rows / name / "ledger.db") as ledger:
        return ledger.show()["entries"]


def test_a_deployment_runs_the_protocol_and_erases_its_secrets_at_the_end(
    deployed, files, rows, tmp_path, monkeypatch
):
    setup.make(tmp_path / "federation", ["a"], host="localhost", port=8443)
    signing = tmp_path / "federation" / "server" / "keys"
    monkeypatch.setenv(binding.KEYS, str(signing))
    config = deployed(**SECURE)
    result = _run(config, Remote(files, config.flat()))
    assert [record["updates"] for record in read_records(Path(config.run_dir))] == [4, 4]
    assert result["released"] == dict.fromkeys(BANKS, "stored")
    for name in BANKS:
        assert [entry["answered"] for entry in _entries(rows, name)] == [True, True]
        store = rows / name / "state" / "secure.db"
        assert store.stat().st_mode & 0o077 == 0
    checks = verification.verify(Path(config.run_dir), signing / "ca.crt")
    assert {check.name for check in checks if check.state != "ok"} == set()


class Lying(Remote):
    """A grid whose server says something else than the protocol, in messages of one type.

    Args:
        files: The institutions' settings.
        config: The run.
        message_type: The type of the messages that it changes.
        lie: Makes the content of a message to an institution (an index) from the honest one; None
            leaves it.
    """

    def __init__(self, files, config, message_type, lie):
        super().__init__(files, config.flat())
        self.type, self.lie = message_type, lie
        self.codes = {}
        self.words = []  # (round, node, words) of all vectors that left
        self.shares = []  # (round, node) of all shares that left

    def push_messages(self, messages):
        changed = []
        for message in messages:
            node = message.metadata.dst_node_id
            if message.metadata.message_type == self.type:
                content = self.lie(message.content, node - 1)
                message = Message(content, node, self.type, group_id="lie")
            changed.append(message)
        return super().push_messages(changed)

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        for reply in replies:
            kind, node = reply.metadata.message_type, reply.metadata.src_node_id
            refused = reply.content.config_records.get("refused")
            if refused and kind == self.type:
                self.codes[BANKS[node - 1]] = refused["code"]
            elif kind == "train" and not refused:
                update = wire.unpack_update(reply.content)
                self.words.append((update.round, node, update.words))
            elif kind == wire.UNMASK and not refused:
                answer = wire.unpack_secure(UnmaskMessage, reply.content)
                self.shares.append((answer.round, node, answer.shares))
        return replies


def _changed(kind, change):
    """A lie that changes a message of the protocol."""

    def lie(content, node):
        return wire.pack_secure(change(wire.unpack_secure(kind, content), node))

    return lie


def _without_the_last(order, _):
    return dataclasses.replace(order, survivors=order.survivors[:-1])


def _one_renamed(terms, _):
    return dataclasses.replace(terms, names=(*terms.names[:-1], "Zeta"))


def _more_colluding(terms, node):
    return dataclasses.replace(terms, colluding=2) if node == 0 else terms


def _own_key_in_place(order, node):
    """The keys of one institution are those that it made for another run."""
    keys = list(order.keys)
    keys[(node + 1) % 4] = keys[(node + 2) % 4]
    return dataclasses.replace(order, keys=tuple(keys))


@pytest.mark.parametrize(
    ("message_type", "kind", "lie", "codes"),
    [
        (wire.KEYS, Terms, _one_renamed, {"secure-unknown-institution", "secure-name-missing"}),
        (wire.KEYS, Terms, _more_colluding, {"secure-terms-mismatch"}),
        (wire.SHARES, SharesOrder, _own_key_in_place, {"secure-keys-swapped"}),
    ],
)
def test_another_roster_other_terms_and_swapped_keys_end_the_run_before_anything_is_spent(
    deployed, files, rows, message_type, kind, lie, codes
):
    config = deployed(**SECURE)
    grid = Lying(files, config, message_type, _changed(kind, lie))
    with pytest.raises(RunFailed, match="no part in the setup"):
        _run(config, grid)
    assert set(grid.codes.values()) == codes
    assert not grid.words and not any(_entries(rows, name) for name in BANKS)


def test_a_roster_in_which_one_key_has_two_names_is_refused(deployed, files, rows):
    folder = rows / "Alpha" / "peers"
    (folder / "Delta.pub").write_bytes((folder / "Gamma.pub").read_bytes())
    config = deployed(**SECURE)
    grid = Lying(files, config, wire.KEYS, lambda content, _: content)
    with pytest.raises(RunFailed, match="no part in the setup"):
        _run(config, grid)
    assert grid.codes == {"Alpha": "secure-shared-key"}


def test_different_lists_for_different_institutions_unmask_nothing(deployed, files, rows):
    def lie(order, node):
        """Every institution is told of the three that it is asked with, itself among them."""
        others = [name for name in order.survivors if name != BANKS[node]]
        return dataclasses.replace(order, survivors=tuple(sorted([BANKS[node], *others[:2]])))

    config = deployed(**SECURE)
    grid = Lying(files, config, wire.LIST, _changed(ListOrder, lie))
    _run(config, grid)
    assert all(record["skipped"] for record in read_records(Path(config.run_dir)))
    assert not grid.shares
    assert not any(entry["answered"] for name in BANKS for entry in _entries(rows, name))


def test_a_masked_round_is_not_trained_again_for_a_server_that_changes_its_passes(
    deployed, files, rows, monkeypatch
):
    """The last bits of a second training may depend on the records, and a refusal would tell."""
    config = deployed(**SECURE)
    trained, again, orders = [], [], {}
    train = cohort.train_rounds

    def counted(rounds):
        if len(rounds) == 1:  # together they cannot: each has a table of its own
            trained.extend(rounds)
        return train(rounds)

    monkeypatch.setattr(cohort, "train_rounds", counted)

    def lie(content, node):
        grid._contexts[node + 1].run_config["training.physical-batch"] = 1
        (reply,) = Remote.send_and_receive(grid, [orders[node + 1]])
        again.append(reply)
        return content

    grid = Lying(files, config, wire.LIST, lie)
    push = grid.push_messages

    def remember(messages):
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train":
                node = message.metadata.dst_node_id
                orders[node] = Message(message.content, node, "train", group_id="again")
        return push(messages)

    grid.push_messages = remember
    _run(config, grid)
    assert len(trained) == len(again) == 8 and len(grid.words) == 16
    assert len({(number, node, words.tobytes()) for number, node, words in grid.words}) == 8


def test_a_list_below_the_least_number_is_not_signed(deployed, files):
    def lie(order, node):
        return dataclasses.replace(order, survivors=tuple(sorted({BANKS[node], "Alpha"})))

    config = deployed(**SECURE)
    grid = Lying(files, config, wire.LIST, _changed(ListOrder, lie))
    _run(config, grid)
    assert set(grid.codes.values()) == {"secure-list-short"} and not grid.shares


def test_nothing_is_unmasked_without_the_signatures_of_the_threshold(deployed, files, rows):
    def lie(order, _):
        """One signature in all places but one, in place of each institution's own."""
        first = next(signature for signature in order.signatures if signature)
        return dataclasses.replace(order, signatures=(first,) * len(order.signatures))

    config = deployed(**SECURE)
    grid = Lying(files, config, wire.UNMASK, _changed(UnmaskOrder, lie))
    _run(config, grid)
    assert set(grid.codes.values()) == {"secure-unmask-signatures"} and not grid.shares
    assert not any(entry["answered"] for name in BANKS for entry in _entries(rows, name))


def test_less_noise_for_one_institution_than_for_another_is_refused_at_the_setup(
    deployed, files, rows
):
    config = deployed(**SECURE)
    grid = Lying(files, config, wire.KEYS, lambda content, _: content)
    grid._contexts[2].run_config["privacy.epsilon"] = 4.0
    with pytest.raises(RunFailed, match="secure-terms-mismatch x 1"):
        _run(config, grid)
    assert grid.codes == {"Beta": "secure-terms-mismatch"}
    assert not any(_entries(rows, name) for name in BANKS)


def test_less_noise_after_the_setup_is_refused_before_it_is_charged(deployed, files, rows):
    """Two of four follow another configuration from the first round on."""
    config = deployed(**SECURE)

    def lie(content, node):
        grid._contexts[node + 1].run_config["privacy.epsilon"] = 4.0 if node < 2 else 8.0
        return content

    grid = Lying(files, config, "train", lie)
    _run(config, grid)
    assert grid.codes == dict.fromkeys(("Alpha", "Beta"), "secure-order-mismatch")
    assert all(record["skipped"] for record in read_records(Path(config.run_dir)))
    assert not _entries(rows, "Alpha") and len(_entries(rows, "Delta")) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy.honest": 1000},  # a share of noise for a sum of a thousand
        {"privacy.epsilon": 4.0},
        {"adapter.rank": 1},  # shorter vectors, so that the rest has fewer shares of noise
    ],
    ids=str,
)
def test_a_round_under_other_terms_than_the_setup_is_refused_before_it_is_charged(
    deployed, files, rows, changes
):
    """The server gives all institutions another configuration, and orders that are bound to it."""
    config = deployed(**SECURE)
    other = config.replace(changes)

    def lie(content, node):
        grid._contexts[node + 1].run_config.update(changes)
        order = wire.unpack_order(content)
        order = dataclasses.replace(order, adapter=order.adapter.cut(other.adapter.rank))
        masked = dataclasses.replace(order.masked, digest=secure_order.digest(order, other))
        packed = wire.pack_order(order, wire.pack_adapter(order.adapter))
        return wire.with_masked_order(packed, masked)

    grid = Lying(files, config, "train", lie)
    with pytest.raises(RunFailed, match="secure-terms-mismatch x 4"):
        _run(config, grid)
    assert not grid.words and not any(_entries(rows, name) for name in BANKS)


def test_a_server_that_leaves_the_masked_order_out_gets_no_plain_words(deployed, files, rows):
    config = deployed(**SECURE)
    grid = Lying(files, config, "train", lambda content, _: _without_mask(content))
    with pytest.raises(RunFailed, match="secure-order-missing x 4"):
        _run(config, grid)
    assert not grid.words and not any(_entries(rows, name) for name in BANKS)


def _without_mask(content):
    del content["secure"]
    return content


def test_a_round_that_is_asked_for_again_with_one_institution_fewer_shows_no_difference(
    deployed, files, rows
):
    """The differencing attack: the sums of two lists of one round would differ by one vector."""
    config = deployed(**{**SECURE, "federation.rounds": 1})
    grid = Lying(files, config, "none", lambda content, _: content)
    orders, lists, unmasks = [], [], []

    def remember(messages):
        messages = list(messages)
        kind = messages[0].metadata.message_type
        for known, of_kind in ((orders, "train"), (lists, wire.LIST), (unmasks, wire.UNMASK)):
            known += messages if kind == of_kind else []
        return Remote.push_messages(grid, messages)

    grid.push_messages = remember
    _run(config, grid)
    before = [_entries(rows, name) for name in BANKS]
    first = wire.unpack_secure(ListOrder, lists[0].content)
    fewer = dataclasses.replace(first, survivors=BANKS[:3])
    del grid.push_messages

    def ask(content, kind):
        codes = set()
        for node in (1, 2, 3):
            (reply,) = grid.send_and_receive([Message(content, node, kind, group_id="again")])
            refused = reply.content.config_records.get("refused")
            codes.add(refused["code"] if refused else "answered")
        return codes

    ended = {"secure-run-ended"}
    assert ask(wire.pack_secure(fewer), wire.LIST) == ended
    assert ask(unmasks[0].content, wire.UNMASK) == ended
    assert ask(orders[0].content, "train") == ended
    assert [_entries(rows, name) for name in BANKS] == before


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_server_that_was_killed_goes_on_though_a_key_is_no_longer_registered(
    deployed, files, rows, change
):
    class Killed(BaseException):
        pass

    config = deployed(**SECURE)
    grid, rounds = Remote(files, config.flat()), []
    push = grid.push_messages

    def dies_in_the_second_round(messages):
        messages = list(messages)
        if messages[0].metadata.message_type == "train":
            rounds.append(messages)
        if len(rounds) == 2:
            raise Killed
        return push(messages)

    grid.push_messages = dies_in_the_second_round
    with pytest.raises(Killed):
        _run(config, grid)
    public = json.loads((rows / KEYS).read_text())
    public |= {"Delta": keys.make_node("new")[0].decode()}
    if change == "removed":
        del public["Delta"]
    (rows / KEYS).write_text(json.dumps(public))
    _run(config, Remote(files, config.flat()))
    assert [record["updates"] for record in read_records(Path(config.run_dir))] == [4, 4]
    stored = (Path(config.run_dir) / "secure" / "setup").read_bytes()
    assert b"PUBLIC KEY" in stored and b"PRIVATE" not in stored


class Holding(Lying):
    """A grid that asks for more right after a round's shares were revealed."""

    def __init__(self, files, config, more):
        super().__init__(files, config, "none", lambda content, _: content)
        self.more, self.said = more, []
        self.sent = {}

    def push_messages(self, messages):
        messages = list(messages)
        kind = messages[0].metadata.message_type
        if kind == "train" and wire.UNMASK in self.sent and not self.said:
            for content, of_kind in self.more(self.sent):
                again = [Message(content, m.metadata.dst_node_id, of_kind, group_id="again")
                         for m in self.sent[of_kind]]  # fmt: skip
                ids = list(super().push_messages(again))
                replies = []
                while len(replies) < len(ids):
                    replies += Remote.pull_messages(self, ids)
                self.said.append([_code(reply) for reply in replies])
        self.sent[kind] = messages
        return super().push_messages(messages)


def _code(reply):
    refused = reply.content.config_records.get("refused")
    return refused["code"] if refused else "answered"


def test_between_two_rounds_a_revealed_round_gives_the_same_shares_and_nothing_else(
    deployed, files
):
    def more(sent):
        first = wire.unpack_secure(ListOrder, sent[wire.LIST][0].content)
        fewer = dataclasses.replace(first, survivors=BANKS[:3])
        yield wire.pack_secure(fewer), wire.LIST
        yield sent[wire.UNMASK][0].content, wire.UNMASK
        yield sent["train"][0].content, "train"

    config = deployed(**SECURE)
    grid = Holding(files, config, more)
    _run(config, grid)
    assert grid.said == [
        [*["secure-list-second"] * 3, "secure-list-excluded"],
        ["answered"] * 4,
        ["round-already-answered"] * 4,
    ]


def test_settings_without_peers_or_without_the_trust_take_no_part(deployed, files, caplog):
    text = files[1].read_text()
    files[1].write_text(text.replace('peers = "peers"\n', ""))
    config = deployed(**SECURE)
    grid = Lying(files, config, wire.KEYS, lambda content, _: content)
    with pytest.raises(RunFailed, match="3 of 4 institutions are online"):
        _run(config, grid)
    assert "no-peers" in caplog.text
    files[1].write_text(text.replace("secure-aggregation = true", "secure-aggregation = false"))
    with pytest.raises(RunFailed, match="3 of 4 institutions are online"):
        _run(config, Remote(files, config.flat()))


def test_half_of_the_bits_that_leave_are_ones(deployed, files):
    """False alarm: 2e-9 for each of 4 vectors (6 deviations)."""
    config = deployed(**{**SECURE, "federation.rounds": 1})
    grid = Lying(files, config, "none", lambda content, _: content)
    _run(config, grid)
    assert len(grid.words) == 4
    for _, _, words in grid.words:
        bits = np.unpackbits(words.view(np.uint8))
        assert abs(bits.sum() - len(bits) / 2) < 6 * np.sqrt(len(bits)) / 2
