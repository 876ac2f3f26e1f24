"""What docker-compose.yml promises, read from the file: nothing is started here."""

import itertools

import pytest

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


def test_keys_are_read_only_everywhere(service):
    (keys,) = (volume for volume in service["volumes"] if volume.split(":")[1] == "/keys")
    assert keys.endswith(":/keys:ro")
