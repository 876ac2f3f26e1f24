"""The binding of privacy.json to its run: identity, date, versions, digests of the run's files."""

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora.config.config import RunConfig
from fedlora.errors import InputError
from fedlora.files import sha256, write_atomic
from fedlora.runs.run_files import CONFIG, ENVIRONMENT, RESULT, ROUNDS, read_run_file
from fedlora.runs.seal import KEY, Signer

log = logging.getLogger("fedlora.server")

KEYS = "FEDLORA_KEYS"
"""In the environment of a deployment's server: its directory of keys."""
KEY_BYTES = 32
RECORDS_KEY = "records.key"
"""In a simulation's run directory: the key of the fingerprint of records; it stays there."""
FILES = (CONFIG, ENVIRONMENT, ROUNDS, RESULT)
"""Files of a run directory that are bound, beside those in ``adapter``."""


def signer(config: RunConfig) -> Signer | None:
    """The server's key for statements; None in a simulation, and, with a warning, without a key.

    Raises:
        InputError: If the key or its certificate is damaged.
    """
    if not config.deployed:
        return None
    folder = Path(os.environ.get(KEYS, ""))
    try:
        found = Signer.open(folder) if KEYS in os.environ else None
    except (OSError, ValueError) as error:
        raise InputError(
            f"the key for privacy statements in {folder} cannot be used ({error}); make a new one "
            "with `fedlora deploy init`"
        ) from None
    if found is None:
        log.warning(
            "privacy.json will have no signature, and `fedlora verify` will refuse it: there is no "
            "%s in %s; make one with `fedlora deploy init`",
            KEY,
            folder if KEYS in os.environ else f"${KEYS}, which is not set",
        )
    return found


def bind(
    directory: Path, config: RunConfig, *, result: Mapping[str, Any], encoded: bytes, records: str
) -> dict[str, Any]:
    """The part ``run`` of privacy.json. In a simulation it writes `RECORDS_KEY`.

    A plain digest of records would let anyone who knows all records but one try out the last. So
    the fingerprint has a random key, which stays in the run's directory.

    Args:
        directory: The run's directory, with every file but privacy.json and result.json.
        config: The run.
        result: The content of result.json.
        encoded: The same, as the file will hold it.
        records: A simulation's `Population.fingerprint`.
    """
    from fedlora.runs.model_card import base_name  # which loads torch

    environment = read_run_file(directory, ENVIRONMENT)
    fingerprint = None
    if not config.deployed:
        key = secrets.token_hex(KEY_BYTES)
        write_key(directory / RECORDS_KEY, key)
        fingerprint = keyed(key, records)
    return {
        "id": result["run"],
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "mode": mode(config),
        "fedlora": environment["versions"]["fedlora"],
        "commit": environment["git_sha"],
        "uncommitted_changes": environment["git_dirty"],
        "base": {"name": base_name(config), "digest": result["base"]["digest"]},
        "records": fingerprint,
        "files": {**digests(directory), RESULT: hashlib.sha256(encoded).hexdigest()},
    }


def mode(config: RunConfig) -> str:
    """``deployment`` or ``simulation``."""
    return "deployment" if config.deployed else "simulation"


def write_key(file: Path, key: str) -> None:
    """Write a key of `keyed` for its owner only."""
    write_atomic(file, f"{key}\n".encode(), mode=0o600)


def read_key(file: Path) -> str:
    """The key that `write_key` wrote.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds no key.
    """
    key = file.read_text(encoding="utf-8").strip()
    if len(bytes.fromhex(key)) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes")
    return key


def keyed(key: str, fingerprint: str) -> str:
    """A fingerprint of records that says nothing of them without the key."""
    return hmac.new(bytes.fromhex(key), fingerprint.encode(), hashlib.sha256).hexdigest()


def digests(directory: Path) -> dict[str, str]:
    """File -> SHA-256 (hex), for the files of a run directory that are bound."""
    return {str(file.relative_to(directory)): _digest(file) for file in _files(directory)}


def _digest(file: Path) -> str:
    """SHA-256 (hex); of a link to anything but a file that it is one."""
    return sha256(file) if file.is_file() else "a link"


def _files(directory: Path) -> Iterator[Path]:
    """The files, and links to directories: what is in these is not the run's."""
    yield from (directory / name for name in FILES if (directory / name).is_file())
    inside = sorted((directory / "adapter").rglob("*"))
    yield from (file for file in inside if file.is_file() or file.is_symlink())
