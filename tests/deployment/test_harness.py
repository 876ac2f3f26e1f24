"""The harness itself, with shells in the place of services."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.deployment import harness

SHELL = {
    "command": ["sh", "-c", "echo '{\"up\": 1}'; exec sleep 4321"],
    "healthcheck": {"test": ["CMD", "test", "-d", "/keys"]},
}
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 5000), 2)"
MAKE = """
import pathlib, sys, time
from tests.deployment import harness
scratch = pathlib.Path(sys.argv[1])
made = harness.Federation(scratch / ".env", scratch)
print(made._inner, flush=True)
time.sleep(1000)
"""
LISTEN = "import socket, time; s = socket.create_server(('', 5000)); time.sleep(1000)"


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    if reason := harness.unavailable():
        pytest.skip(reason)
    scratch = tmp_path_factory.mktemp("federation")
    env = scratch / ".env"
    env.write_text(f"FEDLORA_USER=10001:10001\nFEDLORA_DIR={scratch}\n")
    changes = dict.fromkeys(harness.compose(harness.environment_file(env))["services"], SHELL)
    changes["gateway"] = {**SHELL, "command": ["python", "-c", LISTEN]}
    for service in harness.compose(harness.environment_file(env))["services"].values():
        for source, target, *_ in (volume.split(":") for volume in service["volumes"]):
            file = scratch / source
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch() if target.endswith(".toml") else file.mkdir()
            if os.geteuid() == 0:
                os.chown(file, 10001, 10001)
    with harness.Federation(env, scratch, changes=changes) as made:
        made.up()
        yield made


def _reaches(federation, one, other):
    done = federation.exec(one, "python", "-c", CONNECT, other, check=False)
    return done.returncode == 0


def test_a_service_has_no_rights_and_writes_to_its_volumes_only(federation):
    status = federation.exec("institution-a", "cat", "/proc/self/status").stdout
    assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status
    if os.geteuid() == 0:
        assert "Uid:\t10001" in status
    places = ("/x", "/app/x", "/usr/x", "/keys/x", "/data/x", "/etc/fedlora/institution.toml")
    for place in places:
        assert federation.exec("institution-a", "touch", place, check=False).returncode
    for place in ("/ledger/x", "/state/x", "/tmp/x"):
        federation.exec("institution-a", "touch", place)


def test_services_see_each_other_only_where_they_share_a_network(federation):
    assert _reaches(federation, "institution-a", "gateway")
    assert _reaches(federation, "server", "gateway")
    hosts = federation.exec("institution-a", "cat", "/etc/hosts").stdout
    assert "gateway" in hosts and "superlink" not in hosts and "institution-b" not in hosts
    assert federation.outsider("python", "-c", CONNECT, "gateway").returncode == 0
    with pytest.raises(subprocess.CalledProcessError):
        federation.outsider("python", "-c", CONNECT, "superlink")


def test_a_cut_link_is_silent_until_it_is_restored(federation):
    federation.cut("institution-b")
    assert not _reaches(federation, "institution-b", "gateway")
    assert _reaches(federation, "institution-a", "gateway")
    federation.restore("institution-b")
    deadline = time.monotonic() + 30
    while not _reaches(federation, "institution-b", "gateway"):
        assert time.monotonic() < deadline


def test_what_crashes_comes_back_and_what_is_killed_or_stopped_does_not(federation):
    federation.crash("server")
    deadline = time.monotonic() + 30
    while not federation.restarts("server"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    federation.wait("server")
    federation.kill("institution-c")
    assert federation.stop("institution-b") == 128 + 15
    time.sleep(1.5)
    assert not federation.running("institution-c") and not federation.running("institution-b")
    federation.start("institution-c")
    federation.wait("institution-c")
    deadline = time.monotonic() + 30  # its health check may pass before it says so
    while len(federation.records("institution-c")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert federation.records("institution-c") == [{"up": 1}] * 2


def test_nothing_is_left_when_whoever_made_it_is_killed(federation, tmp_path):
    (tmp_path / ".env").write_text(f"FEDLORA_USER=10001:10001\nFEDLORA_DIR={tmp_path}\n")
    make = [sys.executable, "-c", MAKE, str(tmp_path)]
    with subprocess.Popen(make, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True) as maker:
        inner = psutil.Process(int(maker.stdout.readline()))
        assert inner.is_running()
        maker.kill()
    inner.wait(30)


def test_nothing_is_left_when_it_ends(federation):
    own = [process for name in ("gateway", "superlink") for process in federation.processes(name)]
    assert len(own) >= 4
    federation.close()
    assert not any(process.is_running() for process in own)
