"""The very containers of docker-compose.yml, with podman: up, one run, down.

The image is made from a local base, the host's own /usr and Python mounted read-only, because a
registry may be out of reach; what the Dockerfile copies, its environment and its user are the
Dockerfile's. Everything else is the engine's: users, read-only roots, capabilities, limits,
networks and their names, ports, health checks, `init`, the order of starts.

Needs root, podman, podman-compose, runc and catatonit (apt-get install); skips with a reason.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import measure
from fedlora.config.config import from_flat
from fedlora.runs.run_files import read_records
from tests.deployment import harness
from tests.deployment.conftest import MODEL, NAMES, PLAIN, as_in_an_image, prepare

pytestmark = pytest.mark.slow

RUNTIME = ["--runtime", "runc"]
HOST = ("/usr", "/bin", "/sbin", "/lib", "/lib64", *(f"/etc/{name}" for name in harness.ETC))


def _run(*command: str | Path, check: bool = True, **options: Any):
    quiet = {**os.environ, "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}
    done = subprocess.run(
        [*map(str, command)], env=quiet, text=True, capture_output=True, timeout=600, **options
    )
    assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
    return done


def _host_mounts() -> list[str]:
    """The host's programs and this Python's environment, read-only, at their own paths."""
    pythons = (sys.base_prefix, sys.prefix)
    paths = [*HOST, *(path for path in pythons if not path.startswith("/usr/"))]
    return [f"{path}:{path}:ro" for path in dict.fromkeys(paths) if Path(path).exists()]


def _build(tag: str, context: Path) -> None:
    """An image with what the Dockerfile copies, its environment and its user, and nothing else."""
    copied, variables = harness.image()
    for name in copied:
        source = harness.ROOT / name
        if source.is_dir():
            shutil.copytree(source, context / name)
        else:
            shutil.copy(source, context / name)
    python = f"PATH={sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONPATH=/app"
    (user,) = (
        line for line in (harness.ROOT / "Dockerfile").read_text().splitlines() if "USER" in line
    )
    (context / "Containerfile").write_text(
        "FROM scratch\nCOPY . /app\nWORKDIR /app\n"
        f"ENV {' '.join(f'{k}={v}' for k, v in variables.items())} {python}\n{user}\n"
    )
    _run("podman", "build", "--quiet", "--tag", tag, context)


class Containers:
    """A project of podman-compose."""

    def __init__(self, directory: Path, project: str, files: list[Path]) -> None:
        self.directory, self._project = directory, project
        self._compose = ["podman-compose", f"--podman-run-args={' '.join(RUNTIME)}"]
        self._compose += ["--project-name", project, "--env-file", directory / ".env"]
        self._compose += [part for file in files for part in ("--file", file)]
        self.services = list(
            harness.compose(harness.environment_file(directory / ".env"))["services"]
        )

    def compose(self, *arguments: str, **options: Any):
        return _run(*self._compose, *arguments, **options)

    def name(self, service: str) -> str:
        return f"{self._project}_{service}_1"

    def inspect(self, service: str) -> dict[str, Any]:
        return json.loads(_run("podman", "inspect", self.name(service)).stdout)[0]

    def exec(self, service: str, *command: str, **options: Any):
        return _run("podman", "exec", self.name(service), *command, **options)

    def logs(self) -> str:
        return "\n".join(
            _run("podman", "logs", "--tail", "20", self.name(name), check=False).stdout
            for name in self.services
        )

    def check(self) -> None:
        """Run the health checks: podman leaves that to timers of systemd, which a host may lack."""
        for name in self.services:
            _run("podman", "healthcheck", "run", self.name(name), check=False)


def _unavailable() -> str:
    if os.geteuid() != 0:
        return "the containers of this test need root"
    for tool in ("podman", "podman-compose", "runc", "catatonit", "nginx"):
        if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/usr/libexec/podman") is None:
            return f"{tool} is not installed (apt-get install podman podman-compose runc catatonit)"
    return ""


@pytest.fixture(scope="module")
def containers(tmp_path_factory, tiny_encoder, complaints):
    if reason := _unavailable():
        pytest.skip(reason)
    scratch = tmp_path_factory.mktemp("podman")
    project = f"fedlora-{uuid.uuid4().hex[:8]}"
    tag = f"localhost/{project}:test"
    (scratch / "context").mkdir()
    _build(tag, scratch / "context")
    mounts = _host_mounts()
    flags = [flag for mount in mounts for flag in ("--volume", mount)]
    tried = _run("podman", "run", "--rm", *RUNTIME, "--init", *flags, tag, "true", check=False)
    if tried.returncode:
        _run("podman", "image", "rm", "--force", tag)
        pytest.skip(f"no container starts here: {tried.stderr.strip()}")
    directory = scratch / "deployment"
    prepare(directory, complaints)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment = directory / ".env"
    environment.write_text(
        re.sub("FEDLORA_PORT=.*", f"FEDLORA_PORT={port}", environment.read_text())
    )
    mounts.append(f"{as_in_an_image(tiny_encoder, scratch)}:{MODEL}:ro")
    services = harness.compose(harness.environment_file(environment))["services"]
    same = {"image": tag, "volumes": mounts}
    override = scratch / "override.yml"
    override.write_text(yaml.safe_dump({"services": dict.fromkeys(services, same)}))
    made = Containers(directory, project, [harness.COMPOSE, override])
    try:
        with measure.meanwhile(made.check, every=1.0):
            made.compose("up", "--detach", "--no-build")
            yield made
    finally:
        made.compose("down", "--volumes", check=False)
        _run("podman", "image", "rm", "--force", tag)


def test_the_containers_are_up_with_what_the_file_says(containers):
    for service in containers.services:
        said = containers.inspect(service)
        assert said["State"]["Running"], containers.logs()
        assert said["Config"]["User"] == "10001:10001"
        host = said["HostConfig"]
        assert host["ReadonlyRootfs"] and host["PidsLimit"] > 0 and host["Memory"] > 0
        assert not said["EffectiveCaps"]
        assert "no-new-privileges" in host["SecurityOpt"]
        assert bool(host["PortBindings"]) == (service == "gateway")


def test_an_institution_knows_nobody_but_the_gateway(containers):
    found = containers.exec("institution-a", "getent", "hosts", "gateway")
    assert found.stdout
    for other in ("superlink", "server", "institution-b"):
        done = containers.exec("institution-a", "getent", "hosts", other, check=False)
        assert done.returncode == 2, (other, done.stdout)


def test_a_run_ends_with_a_result(containers):
    config = from_flat(PLAIN)
    (containers.directory / "server" / "configs" / "run.toml").write_text(config.to_toml())
    submit = ("fedlora", "deploy", "submit", "--wait", "--json")
    done = containers.exec("server", *submit, "/configs/run.toml", "--name", "one", check=False)
    assert done.returncode == 0, done.stdout + done.stderr + containers.logs()
    assert json.loads(done.stdout)["submissions"][0]["state"] == "completed"
    records = read_records(containers.directory / "results" / "one")
    assert [record["updates"] for record in records] == [len(NAMES)] * len(records) != []
