"""Public keys at the SuperLink, and the file that says which node is whose."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flwr.proto.control_pb2 import RegisterNodeResponse
from flwr.supercore.constant import NodeStatus

from deployment import keys, superlink_client
from deployment.errors import FileError
from fedlora.runs.run_files import KEYS, NODES, SIZES
from fedlora.secure import peers


class SuperLink:
    """Nodes as Flower lists them; ids begin at 2**63, which no signed integer holds."""

    def __init__(self):
        self.nodes = []

    def ListNodes(self, request):  # noqa: N802
        return SimpleNamespace(nodes_info=self.nodes)

    def RegisterNode(self, request):  # noqa: N802
        assert request.public_key not in {node.public_key for node in self.nodes}
        node = SimpleNamespace(
            node_id=2**63 + len(self.nodes),
            public_key=request.public_key,
            name=request.name,
            status=NodeStatus.REGISTERED,
        )
        self.nodes.append(node)
        return RegisterNodeResponse(node_id=node.node_id)


@pytest.fixture
def link(monkeypatch):
    made = SuperLink()
    monkeypatch.setattr(superlink_client, "_superlink", lambda _: contextlib.nullcontext(made))
    return made


@pytest.fixture
def here(tmp_path):
    for name in ("keys", "institutions", "results"):
        (tmp_path / name).mkdir()
    return superlink_client.Server(
        keys=tmp_path / "keys",
        institutions=tmp_path / "institutions",
        results=tmp_path / "results",
        superlink="localhost:1",
    )


def _put(here, name, content=b""):
    (here.institutions / f"{name}.pub").write_bytes(content or keys.make_node(name)[0])


def _nodes(here):
    content = json.loads((here.results / NODES).read_text())
    return {name: int(node) - 2**63 for node, name in content.items()}


def test_new_keys_are_registered_and_each_node_is_its_institutions(here, link):
    key = peers.simulated(1, "b").public_key()
    _put(here, "a")
    _put(
        here,
        "b",
        key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    )
    assert superlink_client.register(here) == {"a": "registered", "b": "registered"}
    known = json.loads((here.results / KEYS).read_text())
    for name in ("a", "b"):
        file = here.institutions / f"{name}.pub"
        assert peers.read(known[name].encode(), name) == peers.read(file.read_bytes(), file)
    _put(here, "c")
    assert superlink_client.register(here) == {
        "a": "already registered",
        "b": "already registered",
        "c": "registered",
    }
    assert _nodes(here) == {"a": 0, "b": 1, "c": 2}


def test_a_node_is_known_by_its_key_and_not_by_the_name_it_was_registered_under(here, link):
    _put(here, "a")
    _put(here, "b")
    superlink_client.register(here)
    link.nodes[0].name, link.nodes[1].name = "b", "a"
    superlink_client.register(here)
    assert _nodes(here) == {"a": 0, "b": 1}


def test_a_replaced_key_is_a_new_node_and_the_old_one_is_nobodys(here, link):
    _put(here, "a")
    superlink_client.register(here)
    _put(here, "a")
    assert superlink_client.register(here) == {"a": "registered"}
    assert _nodes(here) == {"a": 1}


def test_without_its_file_an_institution_is_out(here, link):
    _put(here, "a")
    _put(here, "b")
    superlink_client.register(here)
    (here.institutions / "a.pub").unlink()
    superlink_client.register(here)
    assert _nodes(here) == {"b": 1}


def test_a_key_that_was_unregistered_is_said_to_be_of_no_use(here, link):
    _put(here, "a")
    superlink_client.register(here)
    link.nodes[0].status = NodeStatus.UNREGISTERED
    assert "Flower takes no key twice" in superlink_client.register(here)["a"]
    assert _nodes(here) == {}


@pytest.mark.parametrize("known", [True, False])
def test_of_two_institutions_with_one_key_none_takes_part(here, link, known):
    _put(here, "a")
    if known:
        superlink_client.register(here)
    _put(here, "b", (here.institutions / "a.pub").read_bytes())
    outcomes = superlink_client.register(here)
    assert outcomes == dict.fromkeys("ab", "a and b have one key; ask each for its own")
    assert _nodes(here) == {} and len(link.nodes) == known


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (ec.generate_private_key(ec.SECP256R1()), "is a key on the curve secp256r1"),
        (ec.generate_private_key(ec.SECP521R1()), "is a key on the curve secp521r1"),
        (ed25519.Ed25519PrivateKey.generate(), "is not an elliptic curve key"),
    ],
    ids=["P-256", "P-521", "Ed25519"],
)
def test_a_key_on_another_curve_than_p_384_is_not_registered(here, link, key, words):
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _put(here, "a")
    _put(here, "b", public)
    outcomes = superlink_client.register(here)
    assert outcomes["a"] == "registered"
    assert words in outcomes["b"] and "b.pub" in outcomes["b"]
    assert "`ssh-keygen -t ecdsa -b 384 -N ''`" in outcomes["b"]
    assert set(json.loads((here.results / KEYS).read_text())) == {"a"}
    assert _nodes(here) == {"a": 0}


def test_a_directory_of_keys_that_cannot_be_read_removes_no_institution(here, link, monkeypatch):
    _put(here, "a")
    superlink_client.register(here)

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    for read in (superlink_client.key_files, superlink_client.register):
        with pytest.raises(FileError, match=f"{here.institutions} cannot be used"):
            read(here)
    assert _nodes(here) == {"a": 0}


def test_a_change_of_the_keys_is_seen(here):
    _put(here, "a")
    first = superlink_client.key_files(here)
    assert superlink_client.key_files(here) == first
    _put(here, "a")
    second = superlink_client.key_files(here)
    assert second != first
    (here.institutions / "a.pub").unlink()
    assert superlink_client.key_files(here) != second


def test_how_large_an_institution_may_be_is_said_beside_its_key(here, link):
    for name in "abc":
        _put(here, name)
    (here.institutions / "a.size").write_text("4096\n")
    (here.institutions / "c.size").write_text("many")
    outcomes = superlink_client.register(here)
    assert outcomes["a"] == outcomes["b"] == "registered"
    assert "c.size holds 'many'; it must be a whole number from 1" in outcomes["c"]
    assert json.loads((here.results / SIZES).read_text()) == {"a": 4096}
    assert _nodes(here) == {"a": 0, "b": 1}
    before = superlink_client.key_files(here)
    (here.institutions / "c.size").write_text("64")
    assert superlink_client.key_files(here) != before
    assert superlink_client.register(here)["c"] == "registered"
    assert json.loads((here.results / SIZES).read_text()) == {"a": 4096, "c": 64}
