"""Files that are whole or absent: written beside their place, synced, then renamed."""

import contextlib
import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from fedlora.errors import InputError

_UMASK = threading.Lock()


def expanded(path: str) -> Path:
    """A path with ``~`` as the home directory.

    Raises:
        InputError: If it begins with ``~NAME``, and no user here has that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(
            f"{path!r} begins with the home directory of a user whom this machine does not know; "
            "write the whole path"
        ) from None


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest(*packages: Path) -> str:
    """SHA-256 (hex) of the .py files of packages: of their places and contents."""
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted(package.rglob("*.py")):
            if file.is_file():  # and no dangling link, as an editor's lock is
                place, content = file.relative_to(package.parent), file.read_bytes()
                digest.update(f"{place} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def write_atomic(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write ``content`` to ``path`` as `replacing` does."""
    with replacing(path, mode) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Generator[BinaryIO]:
    """Write a file so that a crash or an error leaves either the old file or the new one.

    Args:
        path: The file.
        mode: Its permissions, less those that the process masks.

    Yields:
        An open file for the new content.

    Raises:
        OSError: If the disk is full or the directory cannot be written; the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with _UMASK:
            umask = os.umask(0o077)  # it can only be read by setting it, for all threads
            os.umask(umask)
        temporary.chmod(mode & ~umask)  # mkstemp's 0600 is for secrets
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def new_path(path: Path) -> Path:
    """Check that a file or directory can be created; its parent.

    Raises:
        InputError: If it exists, or its parent cannot be written to.
    """
    if path.exists():
        raise InputError(f"{path} exists; give a path that does not exist")
    parent = path.absolute().parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"{parent} is no directory that can be written to; give another directory")
    return parent


@contextlib.contextmanager
def new_directory(path: Path) -> Generator[Path]:
    """Write a directory that is whole or absent: an empty one beside its place, then renamed.

    Args:
        path: The directory; it must not exist (`new_path`).
    """
    with tempfile.TemporaryDirectory(dir=new_path(path), prefix=f".{path.name}-") as scratch:
        new = Path(scratch) / path.name  # with the usual permissions; those of scratch are 0700
        new.mkdir()
        yield new
        for place in (*new.rglob("*"), new):
            sync(place)
        new.rename(path)
    sync(path.absolute().parent)


def existing_parent(path: Path) -> Path:
    """The nearest existing directory at or above ``path``, in which creation would begin.

    Raises:
        NotADirectoryError: If a file is in the way.
        PermissionError: If that directory cannot be written.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{place} is not writable")
    return place


def sync(path: Path) -> None:
    """Make a file's content, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exposed(file: Path) -> str:
    """The reason why other users could change or replace a file, in words; empty if they could not.

    The file, if it exists, and its directory (both directories for a link) must
    belong to this user or root, and group and others must not be able to write to them. If this
    process runs as root, the owner does not matter: root acts for others, as in a container.

    Raises:
        OSError: If the directory does not exist or cannot be read.
    """
    me = os.geteuid()
    places = [file.absolute().parent, file.resolve().parent, *([file] if file.exists() else [])]
    for place in places:
        status = place.stat()
        mode = stat.S_IMODE(status.st_mode)
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            return (
                f"{place} may be written by others than its owner (mode {mode:o}); "
                f"run chmod go-w {place}"
            )
        if me != 0 and status.st_uid not in (me, 0):
            return (
                f"{place} belongs to user {status.st_uid}, not to user {me} who runs this, nor to "
                f"root; run chown {me} {place}"
            )
    return ""
