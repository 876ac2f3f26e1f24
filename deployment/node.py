"""The processes of an institution: Flower's SuperNode, and the executor of its own app.

The SuperNode connects to the federation's gateway. It hands each message to the executor over a
loopback port, with a secret that is made at each start.
"""

import contextlib
import fcntl
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from client.settings import Settings
from fedlora import files
from fedlora.errors import InputError
from fedlora.secure import peers

LOCK = "node.lock"
DIRECTORY = "node"
"""The directory of one start, in the institution's state: it holds tokenised records."""
LOOPBACK = ("127.0.0.1", "localhost")
"""Hosts that are reached without a proxy, whatever the environment says."""
NO_PROXY = ("NO_PROXY", "no_proxy")
"""The variables that say so: programs read one or the other."""


def check(settings: Settings) -> None:
    """Refuse settings with which the node cannot start.

    Raises:
        InputError: For a missing setting, a file that others may read or write, or a key that is
            not on P-384.
    """
    for field in ("gateway", "ca", "key"):
        if not getattr(settings, field):
            raise InputError(f"{field} is missing from the institution's settings; add it")
    for field in ("ca", "key"):
        path = Path(getattr(settings, field))
        if not path.is_file():
            raise InputError(f"{field} is {path}, which is not a file; correct the settings")
    if exposed := files.exposed(Path(settings.ca)):  # whoever changes it becomes the gateway
        raise InputError(exposed)
    ledger = Path(settings.ledger)  # without a ledger, orders are refused
    if ledger.parent.is_dir() and (exposed := files.exposed(ledger)):
        raise InputError(exposed)
    mode = Path(settings.key).stat().st_mode
    if mode & 0o077:
        raise InputError(
            f"{settings.key} may be read by others than its owner (mode {mode & 0o777:o}); "
            f"run chmod 600 {settings.key}"
        )
    peers.read_private(Path(settings.key))


def commands(settings: Settings, path: Path, private: Path) -> list[list[str]]:
    """The command lines of the SuperNode and of the executor.

    Args:
        settings: The institution's settings.
        path: The settings' file.
        private: A directory that only this user can read, which lasts as long as the processes.
    """
    secret = private / "superexec.secret"
    secret.touch(0o600)
    secret.write_text(secrets.token_hex(32))
    address = f"127.0.0.1:{_free_port()}"
    supernode = [
        *(sys.executable, "-P", "-m", "deployment.supernode"),
        *("--superlink", settings.gateway, "--root-certificates", settings.ca),
        *("--auth-supernode-private-key", settings.key),
        *("--node-config", f'settings="{path}"'),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", address.rpartition(":")[2]),
    ]
    executor = [sys.executable, "-P", "-m", "deployment.executor", address, str(secret)]
    return [supernode, executor]


def environment(private: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The variables to add for the processes of `commands`.

    Args:
        private: As in `commands`.
        given: The environment of this process; its hosts without a proxy are kept.
    """
    direct = [host for name in NO_PROXY for host in given.get(name, "").split(",")]
    hosts = ",".join(dict.fromkeys(host.strip() for host in (*direct, *LOOPBACK) if host.strip()))
    return {"FLWR_HOME": str(private), "TMPDIR": str(private), **dict.fromkeys(NO_PROXY, hosts)}


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Path]:
    """Lock the institution's state while its node runs; yield a directory for this start only.

    Only the owner may enter the directory. What a killed node left in it is removed at the start.

    Raises:
        InputError: When a node with the same state runs already, or ``state`` or the directory
            cannot be created.
    """
    try:
        Path(settings.state).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"state is {settings.state}, which cannot be created: {error.strerror}; correct state"
        ) from None
    with (Path(settings.state) / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"state is {settings.state}, which another node uses now; stop that node first"
            ) from None
        private = Path(settings.state).resolve() / DIRECTORY
        shutil.rmtree(private, ignore_errors=True)
        try:
            private.mkdir(mode=0o700)
        except OSError as error:
            raise InputError(
                f"{private} cannot be created: {error.strerror}; remove it, and leave state to "
                "the user who runs the node"
            ) from None
        try:
            yield private
        finally:
            shutil.rmtree(private, ignore_errors=True)


def is_running(settings: Settings) -> bool:
    """Whether a node with these settings runs. The kernel drops its lock when it ends."""
    try:
        with (Path(settings.state) / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def forget(settings: Settings, run: str) -> str:
    """Erase an institution's secrets of a run under secure aggregation that ended without it.

    At the end of a run an institution erases them by itself. If the run failed or was stopped, or
    the institution was offline then, they stay until this. The run cannot go on here.

    Returns:
        What was done, for the operator.
    """
    from client import secure_role, secure_store

    store = Path(settings.state) / secure_store.FILE
    known: dict[str, bool] = {}
    if store.exists():
        with secure_store.opened(store) as db:
            known = secure_store.known(db)
    if run not in known:
        left = ", ".join(name for name, ended in known.items() if not ended)
        raise InputError(f"--forget is {run!r}, and {store} has secrets of: {left or 'no run'}")
    if secure_role.erase(store, Path(settings.ledger), run):
        return f"erased the secrets of run {run}"
    return (
        f"erased the secrets of run {run}. The ledger {settings.ledger} has no charge of it: if "
        "another ledger was named then, name that one again and repeat this"
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
