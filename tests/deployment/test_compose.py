"""What docker-compose.yml promises, read from the file: nothing is started here."""

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from deployment import setup
from tests.deployment import harness

VALUES = {"FEDLORA_USER": "10001:10001", "FEDLORA_DIR": "/srv/fedlora", "FEDLORA_PORT": "9443"}
SERVICES = ("gateway", "superlink", "server", "institution-a", "institution-b", "institution-c")
INSTITUTIONS = SERVICES[3:]


@pytest.fixture(scope="module")
def file():
    return harness.compose(VALUES)


@pytest.fixture(params=SERVICES)
def service(file, request):
    return file["services"][request.param]


def test_these_are_the_services_and_every_network_is_somebodys(file):
    assert tuple(file["services"]) == SERVICES
    used = {network for service in file["services"].values() for network in service["networks"]}
    assert used == set(file["networks"])


def test_docker_compose_reads_the_file_as_the_harness_does(file):
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed (apt-get install docker-compose)")
    done = subprocess.run(
        ["docker-compose", "--file", harness.COMPOSE, "config", "--format", "json"],
        env=os.environ | VALUES,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert set(theirs["services"]) == set(file["services"])
    for name, ours in file["services"].items():
        their = theirs["services"][name]
        for key in ("command", "user", "init", "read_only", "cap_drop", "restart", "tmpfs"):
            assert their[key] == ours[key], (name, key)
        assert their["healthcheck"]["test"] == ours["healthcheck"]["test"]
        assert their.get("environment", {}) == ours.get("environment", {})
        assert set(their["networks"]) == set(ours["networks"])
        assert [
            f"{v['source']}:{v['target']}{':ro' if v.get('read_only') else ''}"
            for v in their["volumes"]
        ] == ours["volumes"]
    internal = {name for name, network in theirs["networks"].items() if network.get("internal")}
    assert internal == set(file["networks"]) - {"published"}


def test_a_service_is_not_root_and_can_change_nothing_but_its_volumes(service):
    assert service["user"] == VALUES["FEDLORA_USER"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {
        "privileged",
        "devices",
        "pid",
        "ipc",
        "network_mode",
        "userns_mode",
    }


def test_a_service_has_limits_a_health_check_and_a_restart_policy(service):
    assert service["mem_limit"] and 0 < service["pids_limit"] <= 512
    assert all("size=" in entry for entry in service["tmpfs"])
    assert service["healthcheck"]["test"][0] == "CMD" and service["healthcheck"]["retries"]
    assert service["restart"] == "unless-stopped"
    assert service["init"] is True
    assert service["logging"]["options"]["max-size"]
    for how in service.get("depends_on", {}).values():
        assert how == {"condition": "service_healthy"}


def test_only_the_gateway_publishes_a_port(file):
    assert [n for n, s in file["services"].items() if "ports" in s] == ["gateway"]
    assert file["services"]["gateway"]["ports"] == ["9443:8443"]
    assert [n for n, s in file["services"].items() if "published" in s["networks"]] == ["gateway"]


def test_an_institution_shares_a_network_with_the_gateway_alone(file):
    networks = {name: set(service["networks"]) for name, service in file["services"].items()}
    for name in INSTITUTIONS:
        met = {other for other in SERVICES if other != name and networks[name] & networks[other]}
        assert met == {"gateway"}
    for one, other in itertools.combinations(INSTITUTIONS, 2):
        assert not networks[one] & networks[other]
    assert networks["superlink"] == networks["server"] == {"control"}
    assert all(file["networks"][n]["internal"] for n in set(file["networks"]) - {"published"})


def test_an_institution_writes_its_ledger_and_state_and_nothing_else(file):
    folders = set()
    for name in INSTITUTIONS:
        volumes = dict(v.split(":", 1)[::-1] for v in file["services"][name]["volumes"])
        where = VALUES["FEDLORA_DIR"] + "/institutions/" + name.removeprefix("institution-")
        assert all(source.startswith(where + "/") for source in volumes.values())
        folders |= set(volumes.values())
        assert set(volumes) == {
            "/etc/fedlora:ro",
            "/keys:ro",
            "/data:ro",
            "/ledger",
            "/state",
        }
    assert len(folders) == 5 * len(INSTITUTIONS)


def test_settings_are_mounted_by_their_directory(tmp_path):
    """A mount of the file alone would keep the old one when an editor puts another in its place."""
    setup.make(tmp_path / "made", ["a", "b", "c"], host="localhost", port=8443)
    made = harness.compose(VALUES | {"FEDLORA_DIR": str(tmp_path / "made")})
    for name in INSTITUTIONS:
        spec = made["services"][name]
        (source,) = (v.split(":")[0] for v in spec["volumes"] if v.split(":")[1] == "/etc/fedlora")
        file = spec["command"][-1].removeprefix("/etc/fedlora/")
        assert (Path(source) / file).is_file()


def test_no_two_services_share_a_folder(file):
    sources = [
        volume.split(":")[0]
        for service in file["services"].values()
        for volume in service["volumes"]
    ]
    for one, other in itertools.permutations(sources, 2):
        assert one != other and not other.startswith(one + "/")


def test_keys_are_read_only_everywhere(service):
    (keys,) = (volume for volume in service["volumes"] if volume.split(":")[1] == "/keys")
    assert keys.endswith(":/keys:ro")


def test_services_reach_each_other_without_a_proxy(service):
    for name in ("NO_PROXY", "no_proxy"):
        direct = service["environment"][name].split(",")
        assert {"localhost", "127.0.0.1", "superlink", "gateway"} <= set(direct)


def test_the_image_can_be_read_by_its_user_whatever_the_checkout_was_made_under():
    lines = (harness.ROOT / "Dockerfile").read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("COPY"))
    assert "RUN chmod -R a+rX /app" in lines[last:]


def test_without_what_deploy_init_writes_the_file_is_refused():
    with pytest.raises(KeyError, match="made by fedlora deploy init"):
        harness.compose({})
