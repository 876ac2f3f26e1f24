"""The example for Kubernetes fits this version, and each volume that it mounts exists."""

from importlib.metadata import version

import pytest
import yaml

import fedlora
from fedlora.config.config import from_flat
from tests.deployment.harness import ROOT

FOLDER = ROOT / "docs" / "cluster"


@pytest.fixture(scope="module")
def parts():
    """Kind -> the object of this kind in the example."""
    objects = yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())
    return {one["kind"]: one for one in objects}


@pytest.fixture(scope="module")
def job(parts):
    return parts["RayJob"]


def _pods(job):
    cluster = job["spec"]["rayClusterSpec"]
    return [pod["template"] for pod in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_example_names_the_versions_of_this_tree(job):
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    made = (FOLDER / "Dockerfile").read_text()
    assert f"ray[default]=={version('ray')}" in made
    assert f"ARG BASE=fedlora:{fedlora.__version__}" in made
    for pod in _pods(job):
        spec = pod["spec"]
        (container,) = spec["containers"]
        assert container["image"] == f"fedlora-ray:{fedlora.__version__}"
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in spec["volumes"]}
        assert mounted["runs"] == "/runs" and container["resources"]["limits"]["memory"]


def test_its_command_joins_the_cluster_and_writes_to_the_shared_volume(job):
    command, file, *options = job["spec"]["entrypoint"].split()[1:]
    assert (command, file) == ("run", "/configs/run.toml")
    chosen = dict(zip(options[::2], options[1::2], strict=True))
    assert chosen["--out"].startswith("/runs/")
    key, _, value = chosen["--set"].partition("=")
    assert from_flat({key: value}).engine.ray_address == "auto"


def test_every_process_of_the_cluster_and_the_operator_have_the_token_of_one_secret(job):
    options = job["spec"]["rayClusterSpec"]["authOptions"]
    assert options["mode"] == "token"
    for pod in _pods(job):
        (container,) = pod["spec"]["containers"]
        given = {one["name"]: one for one in container["env"]}
        assert given["RAY_AUTH_MODE"]["value"] == "token"
        secret = given["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert secret == {"name": options["secretName"], "key": "auth_token"}
    made = (ROOT / "docs" / "cluster.md").read_text()
    assert (
        f"kubectl create secret generic {options['secretName']} --from-literal=auth_token=" in made
    )


def test_only_the_clusters_pods_and_the_operator_reach_its_pods(parts, job):
    policy = parts["NetworkPolicy"]["spec"]
    labels = policy["podSelector"]["matchLabels"]
    assert labels and all(pod["metadata"]["labels"] == labels for pod in _pods(job))
    assert policy["policyTypes"] == ["Ingress"]
    own, operator = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    (one,) = operator["from"]
    assert one["namespaceSelector"]["matchLabels"] and one["podSelector"]["matchLabels"]
    assert list(parts) == ["NetworkPolicy", "RayJob"]  # no pod exists before the policy
