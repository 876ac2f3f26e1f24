"""What we ask of the SuperLink, through Flower's own command line and its JSON."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.errors import InputError
from fedlora.files import write_atomic

LINK = "fedlora"
"""The connection's name in Flower's own configuration."""
BIN = Path(sys.executable).parent
TIMEOUT = 120.0


class FlowerError(RuntimeError):
    """What Flower's command line said instead of doing what it was asked."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where the server finds things; `docker-compose.yml` sets it in the environment.

    Args:
        keys: Directory with ``ca.crt`` and ``superexec.secret``.
        institutions: Directory with a public key ``NAME.pub`` of each institution.
        results: Directory of the runs' directories.
        superlink: HOST:PORT of the SuperLink.
        home: Flower's own directory.
    """

    keys: Path
    institutions: Path
    results: Path
    superlink: str
    home: Path

    @property
    def ca(self) -> Path:
        """The federation's CA certificate."""
        return self.keys / "ca.crt"

    @property
    def secret(self) -> Path:
        """What a SuperExec proves to the SuperLink that it knows."""
        return self.keys / "superexec.secret"


def server(environment: Mapping[str, str] = os.environ) -> Server:
    """The server of this environment.

    Raises:
        InputError: When a variable is missing, or names what is not there.
    """
    names = ("FEDLORA_KEYS", "FEDLORA_INSTITUTIONS", "FEDLORA_RESULTS")
    for name in (*names, "FEDLORA_SUPERLINK", "FLWR_HOME"):
        if not environment.get(name):
            raise InputError(
                f"{name} is not set; run this where the server runs (docker compose exec server "
                "fedlora deploy ...), or set it as docker-compose.yml does"
            )
    places = [Path(environment[name]) for name in names]
    for name, place in zip(names, places, strict=True):
        if not place.is_dir():
            raise InputError(f"{name} is {place}, which is not a directory; mend it")
    made = Server(
        keys=places[0],
        institutions=places[1],
        results=places[2],
        superlink=environment["FEDLORA_SUPERLINK"],
        home=Path(environment["FLWR_HOME"]),
    )
    for file in (made.ca, made.secret):
        if not file.is_file():
            raise InputError(f"{file} is missing; FEDLORA_KEYS must hold it")
    return made


def connect(server: Server) -> None:
    """Write the connection into Flower's configuration."""
    link = {"address": server.superlink, "root-certificates": str(server.ca)}
    content = {"superlink": {"default": LINK, LINK: link}}
    write_atomic(server.home / "config.toml", tomli_w.dumps(content).encode())


def register(server: Server) -> dict[str, str]:
    """Register the public key of each institution; one that is registered stays as it is.

    Returns:
        Institution -> ``registered``, ``already registered``, or what is wrong with its key.
    """
    done: dict[str, str] = {}
    for file in sorted(server.institutions.glob("*.pub")):
        try:
            _flwr("supernode", "register", str(file), LINK, "--name", file.stem)
            done[file.stem] = "registered"
        except FlowerError as error:
            known = "already in use" in str(error)
            done[file.stem] = "already registered" if known else str(error)
    return done


def start(app: Path, values: Mapping[str, Any]) -> str:
    """Submit the app with these values of its configuration; the run's id."""
    with tempfile.TemporaryDirectory(prefix="fedlora-submit-") as folder:
        file = Path(folder) / "run.toml"
        file.write_text(tomli_w.dumps(values), encoding="utf-8")
        return str(_flwr("run", str(app), LINK, "--run-config", str(file))["run-id"])


def status(run: str) -> tuple[str, str]:
    """A run's status, such as ``finished:completed``, and its details; ``unknown`` for no run."""
    try:
        (found,) = _flwr("list", LINK, "--run-id", run)["runs"]
    except FlowerError as error:
        if "not found" in str(error).lower():
            return "unknown", str(error)
        raise
    return str(found["status"]), str(found["status-details"])


def stop(run: str) -> None:
    """Stop a run; one that has ended stays as it is."""
    try:
        _flwr("stop", run, LINK)
    except FlowerError as error:
        if "finished" not in str(error) and "not found" not in str(error).lower():
            raise


def _flwr(*arguments: str) -> dict[str, Any]:
    """Run Flower's command line, which answers in JSON.

    Raises:
        FlowerError: When it fails, with what it said in one line.
    """
    command = [str(BIN / "flwr"), *arguments, "--format", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise FlowerError(f"flwr {arguments[0]} did not end in {TIMEOUT:.0f} s") from None
    try:
        said: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        text = " ".join((done.stdout + done.stderr).split())[-300:]
        raise FlowerError(f"flwr {arguments[0]} exited with {done.returncode}: {text}") from None
    if not said.get("success"):
        text = " ".join(str(said.get("error-message", said)).split())
        raise FlowerError(f"flwr {arguments[0]}: {text}")
    return said
