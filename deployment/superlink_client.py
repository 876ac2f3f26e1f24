"""Requests to the SuperLink through the functions of Flower's command line.

A process of the command line itself would take seconds to start.
"""

import contextlib
import hashlib
import json
import os
import shutil
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.cli.utils import flwr_cli_exc_handler
from flwr.common.constant import Status
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from deployment import keys
from deployment.errors import FlowerError, Unanswered, in_words, named
from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.runs.run_files import KEYS, NODES, SIZES, alone
from fedlora.secure import peers

REQUEST_SECONDS = 90.0
"""Timeout of a request: longer than the SuperLink waits for its database."""
REGISTERED = ("registered", "already registered")
"""What `register` says of an institution whose key is registered."""
MAX_LISTED_RUNS = 1000
"""The number of newest runs among which a run without a known id is searched."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server's directories and address; `docker-compose.yml` sets them in the environment.

    Args:
        keys: Directory with ``ca.crt`` and ``superexec.secret``.
        institutions: Directory with a public key ``NAME.pub`` of each institution, and perhaps
            ``NAME.size``: the server's bound of the institution's number of records.
        results: Directory of the runs' directories.
        superlink: HOST:PORT of the SuperLink.
    """

    keys: Path
    institutions: Path
    results: Path
    superlink: str

    @property
    def ca(self) -> Path:
        """The federation's CA certificate."""
        return self.keys / "ca.crt"

    @property
    def secret(self) -> Path:
        """The secret with which a SuperExec identifies itself to the SuperLink."""
        return self.keys / "superexec.secret"

    def scratch(self) -> Path:
        """An empty directory for updates that wait to be aggregated; made at the server's start.

        A container's own temporary files are in memory.
        """
        folder = self.results / ".scratch"
        shutil.rmtree(folder, ignore_errors=True)
        with named(folder):
            folder.mkdir()
        return folder


def server() -> Server:
    """The server of this environment.

    Raises:
        InputError: When a variable is missing, or names a file or directory that is missing.
    """
    names = ("FEDLORA_KEYS", "FEDLORA_INSTITUTIONS", "FEDLORA_RESULTS")
    for name in (*names, "FEDLORA_SUPERLINK"):
        if not os.environ.get(name):
            raise InputError(
                f"{name} is not set; run this where the server runs (docker compose exec server "
                "fedlora deploy ...), or set it as docker-compose.yml does"
            )
    places = [Path(os.environ[name]) for name in names]
    for name, place in zip(names, places, strict=True):
        if not place.is_dir():
            raise InputError(f"{name} is {place}, which is not a directory; correct it")
    made = Server(
        keys=places[0],
        institutions=places[1],
        results=places[2],
        superlink=os.environ["FEDLORA_SUPERLINK"],
    )
    for file in (made.ca, made.secret):
        if not file.is_file():
            raise InputError(f"{file} is missing; FEDLORA_KEYS must hold it")
    return made


def key_files(server: Server) -> dict[Path, int]:
    """Each institution's files, with the time of their last change (nanoseconds).

    Raises:
        FileError: When the directory cannot be read. That removes no institution.
    """
    with named(server.institutions):
        return {
            file: file.stat().st_ctime_ns
            for file in sorted(server.institutions.iterdir())
            if file.suffix in (".pub", ".size") and file.exists()
        }


def register(server: Server) -> dict[str, str]:
    """Register the public key of each institution, and write the file of nodes and institutions.

    A key identifies a node, whatever its name at registration: `NODES` maps the node's id to
    the institution whose file holds that key. No other node takes part in a run (`server.roster`).
    `SIZES` holds the content of the files ``NAME.size``, and `KEYS` the registered keys.

    Returns:
        Institution -> ``registered``, ``already registered``, or the problem with its key or size.
    """
    done: dict[str, str] = {}
    own: dict[str, bytes] = {}
    nodes: dict[int, str] = {}
    sizes: dict[str, int] = {}
    with alone(server.results), _superlink(server) as superlink:
        found = superlink.ListNodes(ListNodesRequest()).nodes_info
        known = {node.public_key: node for node in found}
        for file in key_files(server):
            if file.suffix == ".pub":
                try:
                    own[file.stem] = public_key_to_bytes(peers.read(file.read_bytes(), file))
                    if (stated := file.with_suffix(".size")).exists():
                        sizes[file.stem] = keys.stated_size(stated)
                except (OSError, ValueError) as error:
                    own.pop(file.stem, None)
                    done[file.stem] = in_words(error)
        for name, key in list(own.items()):
            node, holders = known.get(key), [one for one, of in own.items() if of == key]
            if len(holders) > 1:
                done[name] = f"{' and '.join(holders)} have one key; ask each for its own"
            elif node is None:
                request = RegisterNodeRequest(public_key=key, name=name)
                nodes[superlink.RegisterNode(request).node_id] = name
                done[name] = "registered"
            elif node.status == NodeStatus.UNREGISTERED:
                done[name] = f"{name}.pub was unregistered; Flower takes no key twice: make a new"
            else:
                nodes[node.node_id] = name
                done[name] = "already registered"
        public = {name: own[name].decode() for name in nodes.values()}
        for name, content in ((KEYS, public), (SIZES, sizes), (NODES, nodes)):
            with named(server.results / name):
                write_atomic(server.results / name, (json.dumps(content, indent=2) + "\n").encode())
    return done


def start(server: Server, app: Path, values: Mapping[str, Any]) -> str:
    """Submit the app with these values of its configuration; return the run's id."""
    with _superlink(server) as superlink:
        content = build_fab_from_disk(app)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        answer = superlink.StartRun(
            StartRunRequest(
                fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(values))
            )
        )
    if not answer.HasField("run_id"):
        raise FlowerError("the SuperLink did not start the run; see its log")
    return str(answer.run_id)


def unfinished(server: Server, directory: str) -> list[str]:
    """The runs with this ``run-dir`` that have not ended, the newest last."""
    with _superlink(server) as superlink:
        answer = superlink.ListRuns(ListRunsRequest(limit=MAX_LISTED_RUNS))
    found = [
        (run.pending_at, number)
        for number, run in answer.run_dict.items()
        if run.status.status != Status.FINISHED
        and run.override_config["run-dir"].string == directory
    ]
    return [str(number) for _, number in sorted(found)]


def status(server: Server, run: str) -> tuple[str, str, float]:
    """A run's status, such as ``finished:completed`` (``unknown`` for no run), and its details.

    The third value is the seconds since a server started it, by the SuperLink's clock; 0 before.
    """
    try:
        with _superlink(server) as superlink:
            answer = superlink.ListRuns(ListRunsRequest(run_id=int(run)))
    except FlowerError as error:
        if "not found" in str(error).lower():
            return "unknown", str(error), 0.0
        raise
    if int(run) not in answer.run_dict:
        return "unknown", "the SuperLink does not know this run", 0.0
    found = answer.run_dict[int(run)]
    age = 0.0
    if found.starting_at:
        begun = datetime.fromisoformat(found.starting_at)
        age = (datetime.fromisoformat(answer.now) - begun).total_seconds()
    now = found.status
    return ":".join(filter(None, (now.status, now.sub_status))), now.details, age


def stop(server: Server, run: str) -> None:
    """Stop a run; a run that has ended stays as it is."""
    try:
        with _superlink(server) as superlink:
            superlink.StopRun(StopRunRequest(run_id=int(run)))
    except FlowerError as error:
        if "finished" not in str(error) and "not found" not in str(error).lower():
            raise


@contextlib.contextmanager
def _superlink(server: Server) -> Iterator[ControlHttpClient]:
    """A connection to the SuperLink, whose errors are `FlowerError`, in one line."""
    with named(server.ca):
        accepted = ssl.create_default_context(cafile=str(server.ca))
    client = ControlHttpClient(
        f"https://{server.superlink}",
        verify=accepted,
        timeout=REQUEST_SECONDS,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedlora")],
    )
    try:
        with flwr_cli_exc_handler(_open_outcome):
            yield client
    except click.ClickException as error:
        raise FlowerError(" ".join(error.format_message().split())) from None
    finally:
        client.close()


def _open_outcome(error: Exception) -> None:
    """Raise `Unanswered` unless the error shows that the request had no effect."""
    if isinstance(error, httpx.HTTPStatusError):
        answer = error.response
        if answer.is_server_error:  # such as a database that stayed locked
            raise Unanswered(f"the SuperLink failed ({answer.status_code}); see its log") from None
    elif not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        raise Unanswered(f"the SuperLink did not answer ({type(error).__name__})") from None
