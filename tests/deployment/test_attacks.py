"""What an attacker tries, and that it is refused. One federation, from several places.

Outsiders are on the gateway's published network with the CA certificate. Institution c is bad: it
answers with what `misbehaving` makes of its updates. A bad server is an app of its own
(`rogue_server`) that an operator submits.
"""

import datetime
import json
import pickle
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from flwr.app import Array, ArrayRecord
from flwr.supercore.routers.runtime.router import router as runtime
from flwr.superlink.routers.control.router import router as control
from flwr.superlink.routers.fleet.router import router as fleet

from deployment import keys
from fedlora.errors import InputError, Refusal
from fedlora.models.adapters import AdapterState
from fedlora.runs.run_files import NODES
from fedlora.wire import wire
from fedlora.wire.messages import ClientUpdate
from tests.deployment import harness
from tests.deployment.conftest import PLAIN, PRIVATE, rehearsal

pytestmark = pytest.mark.slow

ASK = """
import http.client, json, ssl, sys
context = ssl.create_default_context(cafile="/keys/ca.crt")
codes = {}
for path in json.loads(sys.argv[1]):
    link = http.client.HTTPSConnection("gateway", 8443, context=context, timeout=60)
    link.putrequest("POST", path, skip_host=False)  # as it is: nobody tidies it up
    link.putheader("content-type", "application/protobuf")
    link.putheader("content-length", "0")
    link.endheaders()
    codes[path] = link.getresponse().status
print(json.dumps(codes))
"""
EXPIRED = "certificate verify failed: certificate has expired"
SUPERNODE = ["timeout", "180", "flower-supernode", "--superlink", "gateway:8443"]
FORGED = """
import sys
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli.flower_supernode import flower_supernode
theirs = load_ssh_public_key(open("/theirs/a.pub", "rb").read())
class Forged(fleet_http_connection.NodeAuthHttpInterceptor):
    def __init__(self, private, public):
        super().__init__(private, theirs)
fleet_http_connection.public_key_to_bytes = lambda own: public_key_to_bytes(theirs)
fleet_http_connection.NodeAuthHttpInterceptor = Forged
flower_supernode()
"""
IN_ANOTHERS_NAME = """
import sys, httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
theirs, own = int(sys.argv[1]), int(sys.argv[2])
key = load_ssh_private_key(open("/keys/node.key", "rb").read(), None)
signed = NodeAuthHttpInterceptor(key, key.public_key())
link = FleetHttpClient.from_server_address("gateway:8443", False, "/keys/ca.crt", [signed])
order = dict(src_node_id=1, dst_node_id=theirs)
answer = dict(src_node_id=theirs, dst_node_id=1, reply_to_message_id="0" * 64)
for said in (order, answer, {**answer, "src_node_id": own}):
    request = PushMessagesRequest(
        node=Node(node_id=own),
        messages_list=[Message(metadata=Metadata(**said))],
        message_object_trees=[ObjectTree(object_id="0" * 64)],
    )
    try:
        link.PushMessages(request)
    except httpx.HTTPStatusError as error:
        print("answers of its own" in error.response.text)
    else:
        print("taken")
"""
SUBMIT_ROGUE = """
import tomllib
from pathlib import Path
from deployment import superlink_client
values = tomllib.loads(Path("/configs/rogue.toml").read_text())
superlink_client.start(superlink_client.server(), Path("/rogue"), values)
"""
FLOOD = """
import re, socket, ssl, threading
context = ssl.create_default_context(cafile="/keys/ca.crt")
request = b"POST /v1/fleet/activate-node HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n"
codes = []
def work():
    plain = socket.create_connection(("gateway", 8443), 60)
    with context.wrap_socket(plain, server_hostname="gateway") as link:
        link.sendall(request * 250)
        said = b""
        while said.count(b"HTTP/1.1 ") < 250 and (more := link.recv(65536)):
            said += more
        codes.extend(re.findall(rb"HTTP/1.1 (\\d+)", said))
threads = [threading.Thread(target=work) for _ in range(40)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(codes), codes.count(b"503"))
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory, tiny_encoder, complaints):
    scratch = tmp_path_factory.mktemp("attacks")
    rogue = scratch / "rogue"
    own = tomllib.loads((harness.ROOT / "pyproject.toml").read_text())
    flower = own["tool"]["flwr"]["app"]
    flower["components"] = {"serverapp": "rogue_server:app", "clientapp": "rogue_client:app"}
    project = {"project": {"name": "rogue", "version": "1.0.0", "license": "Apache-2.0"}}
    rogue.mkdir()
    (rogue / "pyproject.toml").write_text(
        tomli_w.dumps({**project, "tool": {"flwr": {"app": flower}}})
    )
    for name in ("rogue_server.py", "rogue_client.py"):
        shutil.copy(Path(__file__).with_name(name), rogue)
    volumes = {"server": [f"{rogue}:/rogue:ro"]}
    with rehearsal(scratch, tiny_encoder, complaints, "c", volumes=volumes) as made:
        made.settings("a", without_dp=False)
        made.up()
        yield made


def _ca(federation):
    """What anybody may have: the CA certificate and nothing else."""
    return f"{federation.folder('c')}/keys/ca.crt:/keys/ca.crt:ro"


def _fails(federation, *command, volumes=()):
    done = federation.outsider(*command, volumes=[_ca(federation), *volumes], check=False)
    assert done.returncode, done.stdout
    return done.stdout + done.stderr


def _node_key(federation, name):
    public, private = keys.make_node(name)
    folder = federation.directory / "outside" / name
    folder.mkdir(parents=True)
    (folder / "node.key").write_bytes(private)
    (folder / f"{name}.pub").write_bytes(public)
    folder.chmod(0o755)
    (folder / "node.key").chmod(0o644)
    return folder


# With the CA certificate only.


@pytest.mark.parametrize("where", ["outside", "institution-c"])
def test_nothing_but_fleet_passes_the_gateway_on_any_path(federation, where):
    paths = [route.path for router in (control, runtime) for route in router.routes]
    assert {"/v1/control/register-node", "/v1/control/start-run"} <= set(paths)
    assert "/v1/control/pull-artifacts" in paths and "/v1/runtime/pull-task-input" in paths
    paths += [
        "/",
        "/docs",
        "/openapi.json",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "//v1/control/start-run",
        "/v1/fleet/;/../../control/start-run",
        "/V1/CONTROL/start-run",
        "https://superlink:9092/v1/control/start-run",
        "/v1/control/start-run/../../fleet/x",
        "/v1/runtime/../fleet/../control/start-run",
    ]
    ask = ("python", "-c", ASK, json.dumps(paths))
    if where == "outside":
        done = federation.outsider(*ask, volumes=[_ca(federation)])
    else:
        done = federation.exec(where, *ask)
    codes = json.loads(done.stdout)
    assert len(codes) == len(paths)
    assert {path: code for path, code in codes.items() if code not in (400, 403, 404)} == {}
    plain = [path for path in paths if path.startswith("/v1/") and ".." not in path]
    assert {codes[path] for path in plain if "fleet" not in path} == {403}
    assert "/v1/control/start-run 403" in federation.log("gateway")
    for line in federation.log("superlink").splitlines():
        through = any(f"{address}:" in line for address in federation.addresses("gateway"))
        assert not (through and '"POST /v1/control' in line), line


def test_every_fleet_call_wants_a_signature(federation):
    paths = [route.path for route in fleet.routes]
    assert "/v1/fleet/pull-messages" in paths and "/v1/fleet/register-node" in paths
    done = federation.outsider("python", "-c", ASK, json.dumps(paths), volumes=[_ca(federation)])
    assert set(json.loads(done.stdout).values()) == {401}


def test_flowers_own_command_cannot_register_or_list_from_outside(federation):
    script = (
        'mkdir -p /tmp/flwr && printf \'[superlink]\\ndefault = "x"\\n[superlink.x]\\n'
        'address = "gateway:8443"\\nroot-certificates = "/keys/ca.crt"\\n\' > /tmp/flwr/config.toml'
        " && export FLWR_HOME=/tmp/flwr && flwr "
    )
    folder = _node_key(federation, "stranger")
    for command in ("supernode register /own/stranger.pub x", "list x"):
        said = _fails(federation, "sh", "-c", script + command, volumes=[f"{folder}:/own:ro"])
        assert "only /v1/fleet/ passes" in said


def test_the_superlink_and_other_institutions_are_out_of_reach(federation):
    connect = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
    for name in ("superlink", "server", "institution-a"):
        for address in federation.addresses(name):
            for port in ("9092", "8443"):
                done = federation.exec(
                    "institution-c", "python", "-c", connect, address, port, check=False
                )
                assert done.returncode, (name, address, port)


# With keys and certificates that are not the right ones.


def test_an_unknown_key_is_refused_and_logged(federation):
    folder = _node_key(federation, "unknown")
    node = [*SUPERNODE, "--root-certificates", "/keys/ca.crt"]
    node += ["--auth-supernode-private-key", "/own/node.key"]
    said = _fails(federation, *node, volumes=[f"{folder}:/own:ro"])
    assert "305" in said
    assert "No SuperNode found with the given public key" in federation.log("superlink")


def test_another_institutions_public_key_is_of_no_use_without_its_private_key(federation):
    folder = _node_key(federation, "forger")
    theirs = f"{federation.directory}/server/institutions:/theirs:ro"
    node = ["timeout", "180", "python", "-c", FORGED, "--superlink", "gateway:8443"]
    node += ["--root-certificates", "/keys/ca.crt", "--auth-supernode-private-key", "/own/node.key"]
    refused = federation.log("gateway").count("activate-node 401")
    active = federation.log("superlink").count("Activated node_id")
    # Flower's node ends itself when it is not let in, under exit code 0
    federation.outsider(*node, volumes=[_ca(federation), f"{folder}:/own:ro", theirs], check=False)
    assert federation.log("gateway").count("activate-node 401") > refused
    assert federation.log("superlink").count("Activated node_id") == active


def test_a_stolen_key_is_of_no_use_while_its_owner_is_there(federation):
    stolen = f"{federation.folder('b')}/keys:/own:ro"
    node = [*SUPERNODE, "--root-certificates", "/keys/ca.crt"]
    node += ["--auth-supernode-private-key", "/own/node.key"]
    _fails(federation, *node, volumes=[stolen])
    assert "could not be activated" in federation.log("superlink")


def test_a_certificate_of_another_ca_or_plain_http_is_refused(federation):
    other = federation.directory / "outside" / "other.crt"
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(keys.make_authority().pem)
    key = f"{federation.folder('b')}/keys:/own:ro"
    wrong = [*SUPERNODE, "--root-certificates", "/other.crt"]
    wrong += ["--auth-supernode-private-key", "/own/node.key", "--max-retries", "1"]
    said = _fails(federation, *wrong, volumes=[key, f"{other}:/other.crt:ro"])
    assert "certificate" in said.lower()
    ask = "import urllib.request as r; print(r.urlopen('http://gateway:8443/v1/fleet/').status)"
    assert "400" in _fails(federation, "python", "-c", ask)
    assert "fleet/ 400" in federation.log("gateway")


def test_an_expired_certificate_is_refused_and_named_and_all_are_back_after_it(federation):
    place = federation.directory / "gateway" / "server.pem"
    right = place.read_bytes()
    place.write_bytes(_expired(federation.directory, right))
    federation.stop("gateway")
    federation.start("gateway")
    ask = ("fedlora", "deploy", "check", "https://gateway:8443/health", "--ca", "/keys/ca.crt")
    check = lambda: federation.exec("server", *ask, check=False)  # noqa: E731
    try:
        federation.until(lambda: "certificate has expired" in check().stdout)
        assert check().returncode == 1
        for name in "abc":  # whose heartbeat may come only after half a minute
            federation.until(lambda name=name: EXPIRED in federation.log(f"institution-{name}"))
    finally:
        place.write_bytes(right)
        federation.restart("gateway")
    federation.until(lambda: check().returncode == 0)
    for name in "abc":  # within a minute, as long as the SuperLink holds the place of one who left
        said = lambda name=name: federation.log(f"institution-{name}")  # noqa: E731
        federation.until(
            lambda said=said: -1 < said().rfind(EXPIRED) < said().rfind("SuperNode ID")
        )


def _expired(directory, pem):
    """The gateway's certificate, which ended yesterday."""
    old = x509.load_pem_x509_certificate(pem)
    key = serialization.load_pem_private_key((directory / "ca" / "ca.key").read_bytes(), None)
    today = datetime.datetime.now(datetime.UTC)
    new = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=9))
        .not_valid_after(today - datetime.timedelta(days=1))
    )
    for extension in old.extensions:
        new = new.add_extension(extension.value, extension.critical)
    return new.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


# From an institution.


def test_bad_updates_are_rejected_with_institution_and_reason_and_the_run_goes_on(federation):
    bad = {
        "r2": ("nan", "invalid-update"),
        "r3": ("shape", "invalid-update"),
        "r4": ("huge", "too-large"),
        "r5": ("stale", "stale-update"),
        "r6": ("replay", "stale-update"),
        "r7": ("other-run", "other-run"),
        "r8": ("other-name", "wrong-institution"),
    }
    federation.misbehave("c", **{number: how for number, (how, _) in bad.items()})
    said = federation.submit("bad", **PRIVATE, **{"federation.rounds": 9})
    assert said["state"] == "completed"
    records = federation.rounds("bad")
    rejected = [record["aggregation"]["rejected"] for record in records]
    assert rejected == [{}, *({"c": code} for _, code in bad.values()), {}]
    assert [record["updates"] for record in records] == [3, *(2 for _ in bad), 3]
    log = federation.log("server")
    assert "c: too-large" in log and "c: other-run" in log


def test_an_institution_that_takes_anothers_name_counts_for_nothing(federation):
    before = {name: len(federation.charges(name)) for name in "ac"}
    federation.misbehave("c")
    federation.stop("institution-a")  # the bad one is there first
    federation.settings("c", name="a")
    federation.restart("institution-c")
    asked = lambda: [set(r["institutions"]) for r in federation.rounds("names")]  # noqa: E731
    try:
        values = {"federation.rounds": 40, "data.institutions": 2}
        federation.submit("names", wait=False, **PRIVATE, **values)
        federation.until(asked)
        assert asked()[0] == {"b"}
        assert "wrong-name: it calls itself a, but has the key of c" in federation.log("server")
        federation.start("institution-a")
        federation.until(lambda: {"a", "b"} in asked())
        federation.deploy("stop", "names")
    finally:
        federation.settings("c", name="c")
        federation.restart("institution-c")
    assert all(names <= {"a", "b"} for names in asked())
    assert len(federation.charges("a")) > before["a"]
    assert len(federation.charges("c")) == before["c"]


def test_who_knows_anothers_node_can_neither_send_it_orders_nor_answer_for_it(federation):
    nodes = json.loads((federation.directory / "results" / NODES).read_text())
    ids = {name: node for node, name in nodes.items()}
    forge = ("python", "-c", IN_ANOTHERS_NAME, ids["a"], ids["c"])
    order, answer, own = federation.exec("institution-c", *forge).stdout.split()
    assert order == answer == "True" and own != "True"
    assert f"Refused a message of node_id={ids['c']}" in federation.log("superlink")


# From a server.


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({**PRIVATE, "privacy.noise": "seeded"}, ["seeded-noise"] * 3),
        ({}, ["dp-required", "hello from b", "hello from c"]),
        ({"data.source": "/data/records.csv"}, ["other-data"] * 3),
        (
            {"federation.weighting": "records"},
            ["metrics-not-allowed"] * 3,
        ),
    ],
)
def test_a_server_that_asks_for_more_is_refused_and_its_code_runs_nowhere(federation, values, said):
    name = f"rogue-{len(list((federation.directory / 'results').glob('rogue-*')))}.json"
    config = {**PLAIN, **values, "run-dir": f"/results/{name}"}
    file = federation.directory / "server" / "configs" / "rogue.toml"
    file.write_text(tomli_w.dumps(config))
    federation.exec("server", "python", "-c", SUBMIT_ROGUE)
    answers = federation.directory / "results" / name
    federation.until(answers.exists)
    assert json.loads(answers.read_text()) == said
    assert not any((federation.folder(n) / "state" / "taken-over").exists() for n in "abc")


# With files.


def test_settings_behind_a_link_or_dots_start_no_second_node(federation):
    """A path with dots is that of the same settings with the same lock; a link is refused."""
    federation.exec("institution-a", "ln", "-sf", "/etc/fedlora/institution.toml", "/tmp/link.toml")
    for path, said in (
        ("/etc/fedlora/../fedlora/institution.toml", "which another node uses now"),
        ("/tmp/link.toml", "without .. or links"),
    ):
        done = federation.exec("institution-a", "fedlora", "node", path, check=False)
        assert done.returncode == 2 and said in done.stderr


def test_an_adapter_with_pickle_in_it_is_refused_as_a_file_and_on_the_wire(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "taken-over",))

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises((InputError, Refusal)):
            AdapterState.open(tmp_path)
    objects = np.array([Payload()], dtype=object)
    file = tmp_path / "array.npy"
    np.save(file, objects, allow_pickle=True)
    pickled = file.read_bytes()
    array = Array(dtype="uint8", shape=(len(pickled),), stype="safetensors", data=pickled)
    update = wire.pack_update(ClientUpdate(institution="c", round=1, adapter=AdapterState({})))
    update["adapter"] = ArrayRecord({"adapter": array})
    with pytest.raises(Refusal, match="malformed-message"):
        wire.unpack_update(update)
    assert not (tmp_path / "taken-over").exists()


# With many requests. Last: it costs the most.


def test_ten_thousand_requests_are_limited_and_the_run_goes_on(federation):
    federation.misbehave("c")
    federation.submit("flooded", wait=False, **PRIVATE, **{"federation.rounds": 4})
    federation.until(lambda: federation.rounds("flooded"))
    done = federation.outsider("python", "-c", FLOOD, volumes=[_ca(federation)], timeout=300)
    sent, limited = (int(word) for word in done.stdout.split())
    assert sent == 10_000 and limited > 1_000, done.stdout
    assert federation.ended("flooded")["state"] == "completed"
    assert [record["updates"] for record in federation.rounds("flooded")] == [3] * 4
