"""Public keys at the SuperLink, and the file that says which node is whose."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import RegisterNodeResponse
from flwr.supercore.constant import NodeStatus

from deployment import keys, superlink_client
from deployment.errors import FileError
from fedlora.runs.run_files import KEYS, NODES
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


def test_a_replaced_key_is_a_new_node_and_the_old_one_is_nobodys(here, link):
    _put(here, "a")
    superlink_client.register(here)
    _put(here, "a")
    assert superlink_client.register(here) == {"a": "registered"}
    assert _nodes(here) == {"a": 1}


@pytest.mark.parametrize("known", [True, False])
def test_of_two_institutions_with_one_key_none_takes_part(here, link, known):
    _put(here, "a")
    if known:
        superlink_client.register(here)
    _put(here, "b", (here.institutions / "a.pub").read_bytes())
    outcomes = superlink_client.register(here)
    assert outcomes == dict.fromkeys("ab", "a and b have one key; ask each for its own")
    assert _nodes(here) == {} and len(link.nodes) == known


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
