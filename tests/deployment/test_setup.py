"""What `fedlora deploy init` makes, and what it refuses."""

import ssl
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from typer.testing import CliRunner

from cli.main import app
from client import settings
from deployment import keys, node, setup
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


def test_each_institution_of_a_rehearsal_has_the_others_keys_also_of_one_that_is_added(made):
    setup.make(made, ["c"], host="", port=8443)
    keys_of = {
        name: peers.read_private(made / "institutions" / name / "keys" / "node.key").public_key()
        for name in "abc"
    }
    for name in "abc":
        pinned = peers.read_directory(made / "institutions" / name / "keys" / "peers")
        assert pinned == {peer: key for peer, key in keys_of.items() if peer != name}


def _contents(directory):
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


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
