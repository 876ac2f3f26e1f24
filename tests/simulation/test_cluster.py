"""The example for Kubernetes fits this version, and each volume that it mounts exists."""

from importlib.metadata import version

import pytest
import yaml

import fedlora
from fedlora.config import from_flat
from tests.deployment.harness import ROOT

FOLDER = ROOT / "docs" / "cluster"


@pytest.fixture(scope="module")
def job():
    return yaml.safe_load((FOLDER / "rayjob.yaml").read_text())


def test_the_example_names_the_versions_of_this_tree(job):
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    made = (FOLDER / "Dockerfile").read_text()
    assert f"ray[default]=={version('ray')}" in made
    assert f"ARG BASE=fedlora:{fedlora.__version__}" in made
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in pods:
        spec = pod["template"]["spec"]
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
