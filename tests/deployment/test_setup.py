"""What `fedlora deploy init` makes, and what it refuses."""

import contextlib
import errno
import os
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from typer.testing import CliRunner

from cli.main import app
from client import settings
from deployment import check, keys, node, setup
from fedlora.config import config
from fedlora.errors import InputError
from fedlora.secure import peers


@pytest.fixture
def made(tmp_path):
    setup.make(tmp_path / "d", ["a", "b"], host="fed.example.org", port=9443)
    return tmp_path / "d"


def test_every_secret_is_for_its_owner_alone(made):
    secret = [*made.rglob("*.key"), *made.rglob("*.secret")]
    # CA, gateway, SuperLink, statements, two institutions, the secret twice
    assert len(secret) == 8
    assert {stat.S_IMODE(file.stat().st_mode) for file in secret} == {0o600}


def test_private_keys_are_in_their_institutions_folders_only(made):
    for name in "ab":
        private = (made / "institutions" / name / "keys" / "node.key").read_bytes()
        holders = [f for f in made.rglob("*") if f.is_file() and f.read_bytes() == private]
        assert holders == [made / "institutions" / name / "keys" / "node.key"]
        public = (made / "server" / "institutions" / f"{name}.pub").read_bytes()
        assert serialization.load_ssh_private_key(
            private, None
        ).public_key() == serialization.load_ssh_public_key(public)


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("gateway", {"fed.example.org", "gateway", "localhost"}),
        ("superlink", {"superlink", "localhost"}),
    ],
)
def test_a_certificate_names_its_server_and_passes_strict_checks(made, folder, names):
    pem = made / folder / "server.pem"
    certificate = x509.load_pem_x509_certificate(pem.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(found.get_values_for_type(x509.DNSName)) == names
    assert [str(ip) for ip in found.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert _handshake(made, folder, "localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(made, folder, "other.example.org")


def _handshake(made, folder, host):
    """A TLS handshake in memory, with the strictest checks that Python has."""
    client = ssl.create_default_context(cafile=str(made / "ca" / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made / folder / "server.pem", made / folder / "server.key")
    one, two = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(one, two, server_hostname=host),
        server.wrap_bio(two, one, server_side=True),
    ]
    done = set()
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
    return len(done) == 2


def test_its_settings_and_its_example_run_are_valid(made):
    own = settings.load(str(made / "institutions" / "a" / "settings" / "institution.toml"))
    assert (own.name, own.gateway, own.key) == ("a", "gateway:8443", "/keys/node.key")
    run = config.load(made / "server" / "configs" / "run.toml")
    assert run.deployed
    assert run.data.institutions == 2
    assert run.data.labels == own.labels


def test_the_environment_is_that_of_the_compose_file(made):
    lines = dict(line.split("=", 1) for line in (made / ".env").read_text().splitlines())
    assert set(lines) == {"FEDLORA_DIR", "FEDLORA_USER", "FEDLORA_PORT"}
    assert lines["FEDLORA_DIR"] == str(made)
    assert lines["FEDLORA_PORT"] == "9443"
    owner = (made / "institutions" / "a" / "keys" / "node.key").stat()
    assert lines["FEDLORA_USER"] == f"{owner.st_uid}:{owner.st_gid}"


@pytest.mark.parametrize(
    ("names", "host", "port", "words"),
    [
        (["a/b"], "h", 1, "'a/b'"),
        (["a", "a"], "h", 1, "twice"),
        ([".."], "h", 1, "begin with"),
        (["a"], "a b", 1, "--host"),
        (["a"], "fed.example.org:8443", 1, "without a port"),
        (["a"], "10.0.0.1:8443", 1, "without a port"),
        (["a"], "h", 0, "--port is 0"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, names, host, port, words):
    with pytest.raises(InputError, match=words):
        setup.make(tmp_path / "d", names, host=host, port=port)
    assert not list(tmp_path.iterdir())


def test_each_institution_of_a_rehearsal_has_the_others_keys_also_of_one_that_is_added(made):
    setup.make(made, ["c"], host="", port=8443)
    keys_of = {
        name: peers.read_private(made / "institutions" / name / "keys" / "node.key").public_key()
        for name in "abc"
    }
    for name in "abc":
        pinned = peers.read_directory(made / "institutions" / name / "keys" / "peers")
        assert pinned == {peer: key for peer, key in keys_of.items() if peer != name}


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_no_umask_lets_others_replace_keys(tmp_path, mask):
    before = os.umask(mask)
    try:
        setup.make(tmp_path / "d", ["a", "b"], host="localhost", port=8443)
        setup.make(tmp_path / "d", ["c"], host="", port=8443)
    finally:
        os.umask(before)
    folders = [tmp_path / "d", *(one for one in (tmp_path / "d").rglob("*") if one.is_dir())]
    assert [one for one in folders if one.stat().st_mode & 0o022] == []


def _contents(directory):
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def _mismatches(made):
    return {one.name for one in check.operator(made) if one.outcome == "fail"}


def test_another_init_adds_institutions_and_renews_certificates_and_replaces_no_key(made):
    before = _contents(made)
    done = CliRunner().invoke(app, ["deploy", "init", str(made), "--institutions", "b,c"])
    assert done.exit_code == 0, done.output
    after = _contents(made)
    changed = {str(f.relative_to(made)) for f, content in before.items() if after[f] != content}
    assert changed == {
        *(f"{name}/server.{part}" for name in ("gateway", "superlink") for part in ("key", "pem")),
        *(f"server/keys/statement.{part}" for part in ("key", "pem")),
    }
    assert (made / "institutions" / "c" / "keys" / "node.key").exists()
    assert _handshake(made, "gateway", "localhost")
    names = ("fed.example.org", "gateway", "localhost", "127.0.0.1")
    assert keys.hosts((made / "gateway" / "server.pem").read_bytes()) == names
    setup.make(made, [], host="new.example.org", port=8443)
    assert keys.hosts((made / "gateway" / "server.pem").read_bytes())[0] == "new.example.org"
    (made / "ca" / "ca.key").unlink()
    with pytest.raises(InputError, match=r"ca\.key does not"):
        setup.make(made, ["d"], host="", port=8443)


def test_certificates_are_renewed_where_a_killed_renewal_left_its_files(made):
    left = made / "gateway" / ".server.pem.new"
    left.write_bytes(b"half of a certif")
    left.chmod(0o400)
    before = (made / "gateway" / "server.pem").read_bytes()
    setup.make(made, [], host="", port=8443)
    assert (made / "gateway" / "server.pem").read_bytes() != before
    assert _mismatches(made) == set()
    assert not list(made.rglob("*.new"))


def test_a_full_disk_changes_no_certificate(made, monkeypatch):
    before, sync, synced = _contents(made), os.fsync, []

    def full(file):
        synced.append(file)
        if len(synced) == 8:  # of the eight files of a renewal
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be read or written: No space left on device"):
        setup.make(made, [], host="", port=8443)
    assert _contents(made) == before


@pytest.mark.parametrize("done", range(9))
def test_a_renewal_that_ends_between_two_renames_leaves_one_pair_apart_at_most(
    made, monkeypatch, done
):
    before, rename, renamed = _contents(made), Path.replace, []

    class Killed(BaseException):
        pass

    def replace(path, place):
        if len(renamed) == done:
            raise Killed
        renamed.append(place)
        return rename(path, place)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Path, "replace", replace)
        setup.make(made, [], host="", port=8443)
    after = _contents(made)
    assert after.keys() == before.keys()
    assert len(renamed) == min(done, 8)
    apart = _mismatches(made)
    expected = {2: "gateway key", 5: "superlink key", 7: "statement key"}
    assert apart == ({expected[done]} if done in expected else set())
    setup.make(made, [], host="", port=8443)
    assert _mismatches(made) == set()


def test_a_node_starts_only_with_a_key_of_its_own(made, tmp_path):
    file = made / "institutions" / "a" / "settings" / "institution.toml"
    file.write_text(
        file.read_text().replace('"/keys/', '"../keys/').replace('"/state"', '"../state"')
    )
    own = settings.load(str(file))
    node.check(own)
    (made / "institutions" / "a" / "keys" / "node.key").chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        node.check(own)


def test_a_node_starts_only_with_a_ledger_and_settings_that_others_cannot_write(made):
    folder = made / "institutions" / "a"
    file = folder / "settings" / "institution.toml"
    text = file.read_text().replace('"/keys/', '"../keys/').replace('"/state"', '"../state"')
    file.write_text(text.replace('"/ledger/', '"../ledger/'))
    node.check(settings.load(str(file)))
    (folder / "ledger").chmod(0o770)
    with pytest.raises(InputError, match=r"ledger may be written by others .*chmod go-w"):
        node.check(settings.load(str(file)))
    (folder / "ledger").chmod(0o700)
    (folder / "keys" / "ca.crt").chmod(0o666)  # whoever changes it becomes the gateway
    with pytest.raises(InputError, match=r"ca.crt may be written by others .*chmod go-w"):
        node.check(settings.load(str(file)))
    (folder / "keys" / "ca.crt").chmod(0o644)
    (folder / "settings").chmod(0o770)
    with pytest.raises(InputError, match=r"settings may be written by others .*chmod go-w"):
        settings.load(str(file))


def test_a_node_keeps_its_files_in_its_state_and_removes_those_of_one_that_was_killed(made):
    file = made / "institutions" / "a" / "settings" / "institution.toml"
    file.write_text(file.read_text().replace('"/state"', '"../state"'))
    own, state = settings.load(str(file)), made / "institutions" / "a" / "state"
    hold = (
        "import sys; from client import settings; from deployment import node\n"
        f"with node.running(settings.load({str(file)!r})) as private:\n"
        "    (private / 'cache').mkdir(); (private / 'cache' / 'tokens').touch()\n"
        "    print(private, flush=True); input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        private = Path(other.stdout.readline().strip())
        assert private == state / "node"
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        with pytest.raises(InputError, match="another node"), node.running(own):
            pass
        assert (private / "cache" / "tokens").exists()
        other.kill()
    assert (private / "cache" / "tokens").exists()
    with node.running(own) as again:
        assert again == private and not list(again.iterdir())
    assert {path.name for path in state.iterdir()} == {"node.lock"}


def test_a_node_is_healthy_while_it_holds_its_state(made):
    file = made / "institutions" / "a" / "settings" / "institution.toml"
    file.write_text(file.read_text().replace('"/state"', '"../state"'))
    own = settings.load(str(file))
    assert not node.is_running(own)
    hold = (
        "import sys; from client import settings; from deployment import node\n"
        f"with node.running(settings.load({str(file)!r})): print('held', flush=True); input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        assert node.is_running(own)
        with pytest.raises(InputError, match="another node"), node.running(own):
            pass
        other.kill()
    assert not node.is_running(own)
