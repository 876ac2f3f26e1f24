"""The gateway's nginx, alone on the loopback: what it limits, and how it finds its resolver."""

import collections
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

from deployment import setup
from fedlora.secure import noise_shares, shamir
from fedlora.secure.secure_aggregation import MAX_TEXT_CHARACTERS, SharesMessage
from fedlora.wire import wire
from tests.deployment.harness import ROOT

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
REQUEST = "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
AT_ONCE = 250  # requests of one connection
MAX_REQUEST_BYTES = {"push-object": 8 * 2**20, "push-messages": 256 * 2**10}


@pytest.fixture
def place(tmp_path):
    """A function that puts a file of server/ here: with the paths of a container in this place."""
    if shutil.which("nginx", path=PATH) is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    setup.make(tmp_path / "made", ["a"], host="localhost", port=8443)

    def put(name, **words):
        text = (ROOT / "deployment" / name).read_text()
        changes = {"/tmp/": f"{tmp_path}/", "/keys/": f"{tmp_path}/made/gateway/", **words}
        for old, new in changes.items():
            assert old in text or old not in words
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return put


@pytest.fixture
def gateway(place, tmp_path, request):
    """nginx with the gateway's configuration: a connection, and many requests for one path.

    A test's parameter has words of the configuration that are replaced.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = {"listen 8443": f"listen 127.0.0.1:{port}", **getattr(request, "param", {})}
    conf = place("gateway.conf", **words)
    (tmp_path / "resolver.conf").write_text("resolver 127.0.0.1:1;\n")
    context = ssl.create_default_context(cafile=str(tmp_path / "made" / "ca" / "ca.crt"))

    def link_from(source):
        plain = socket.create_connection(("127.0.0.1", port), 60, (source, 0))
        return context.wrap_socket(plain, server_hostname="localhost")

    def flood(path, source, requests):
        codes = collections.Counter()
        while codes.total() < requests:
            with link_from(source) as link:
                link.sendall(REQUEST.format(path=path).encode() * AT_ONCE)
                said = b""
                while said.count(b"HTTP/1.1 ") < AT_ONCE and (more := link.recv(65536)):
                    said += more
            codes.update(int(code) for code in re.findall(rb"HTTP/1.1 (\d+)", said))
        return codes

    with (tmp_path / "log").open("w") as log:
        nginx = subprocess.Popen(
            ["nginx", "-c", conf], env={"PATH": PATH}, stdout=log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert nginx.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield SimpleNamespace(flood=flood, link_from=link_from)
        nginx.terminate()
        nginx.wait()


def test_what_the_gateway_answers_itself_is_limited_like_all_else(gateway, tmp_path):
    paths = {
        "/health": 200,
        "/v1/control/start-run": 403,
        "/v1/fleet/x/../../control/start-run": 403,
        "/v1/control/x/../../fleet/pull-messages": 403,  # what is passed on is the path as it came
        "/v1/fleet/pull-messages?x": 403,
        "/v1/control/x/../../fleet/push-object": 403,
    }
    refused = 0
    for number, (path, code) in enumerate(paths.items(), 2):
        codes = gateway.flood(path, f"127.0.0.{number}", 4000)  # each address has a rate of its own
        assert set(codes) == {code, 503}, (path, codes)
        assert codes[code] >= 2000 and codes[503] >= 1000, (path, codes)
        assert f'"message":"GET {path} {code}"' in (tmp_path / "log").read_text()
        refused += codes[503]
    # One line in a hundred: of thousands, more than one in twenty has a probability below 1e-9.
    written = (tmp_path / "log").read_text().splitlines()
    assert 0 < sum(' 503"' in line for line in written) < refused / 20
    assert not any("limiting requests" in line for line in written)
    gateway.flood(f"/{'x' * 1000}", "127.0.0.9", 250)
    assert max(map(len, (tmp_path / "log").read_text().splitlines())) < 600


def _post(link, length, call="push-object"):
    """Say that a body of so many bytes follows, and send none of it."""
    head = "POST /v1/fleet/{} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
    link.sendall(head.format(call, length).encode())


@pytest.mark.parametrize("call", MAX_REQUEST_BYTES)
def test_a_request_is_little_larger_than_flowers_largest_and_is_told_so(gateway, call):
    """A list of objects is smaller: read, it takes a multiple of its size."""
    assert MAX_REQUEST_BYTES["push-object"] > 1.5 * FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    with gateway.link_from("127.0.0.1") as link:
        _post(link, MAX_REQUEST_BYTES[call] + 1, call)
        said = b""
        while b"}" not in said and (more := link.recv(65536)):
            said += more
    assert b" 413 " in said
    assert b"8 MB" in said and b"256 kB" in said
    with gateway.link_from("127.0.0.1") as link:
        _post(link, MAX_REQUEST_BYTES[call], call)
        link.settimeout(1.0)  # it passes: the SuperLink is waited for, which nobody finds here
        with pytest.raises(TimeoutError):
            link.recv(1)


@pytest.mark.parametrize("institutions", [10_000, 1000, 12])
def test_the_shares_of_the_largest_run_with_full_secure_aggregation_pass(institutions):
    rounds = noise_shares.MAX_SHARES // institutions
    plain = bytes(2 * shamir.SHARE_BYTES * rounds)
    sealed = ChaCha20Poly1305(bytes(32)).encrypt(bytes(12), plain, None)
    shares = (b"", *(sealed for _ in range(institutions - 1)))
    packed = wire.pack_secure(SharesMessage(name="n" * MAX_TEXT_CHARACTERS, sealed=shares))
    largest = max(len(part.deflate()) for part in packed.children.values())
    assert largest + 1000 < MAX_REQUEST_BYTES["push-object"]  # node, run and digest beside it


@pytest.mark.parametrize(
    "gateway",
    [
        {
            "limit_conn connections 64": "limit_conn connections 3",
            "limit_conn all 400": "limit_conn all 8",
        }
    ],
    indirect=True,
)
def test_all_addresses_together_have_few_requests_at_once(gateway):
    with contextlib.ExitStack() as stack:
        for number in range(8):  # three of 127.0.0.1, three of 127.0.0.2, two of 127.0.0.3
            link = stack.enter_context(gateway.link_from(f"127.0.0.{1 + number // 3}"))
            _post(link, 1)
        time.sleep(0.5)
        with gateway.link_from("127.0.0.4") as more:
            _post(more, 1)
            assert b" 503 " in more.recv(65536)
        link.close()
        time.sleep(0.5)
        other = stack.enter_context(gateway.link_from("127.0.0.4"))
        _post(other, 1)
        other.settimeout(1.0)
        with pytest.raises(TimeoutError):
            other.recv(1)
