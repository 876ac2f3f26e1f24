"""Files of a run that every room reads: rounds, environment, names of files, the lock.

Importing this module and reading a run's rounds load no torch.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

SUBMISSION = "submission.json"
"""What a deployment knows of a run that it submitted."""
NODES = "nodes.json"
"""Beside a deployment's runs: Flower's node id -> the institution whose public key it has."""
SIZES = "sizes.json"
"""Beside it: institution -> the most records that the server believes it has."""


@contextlib.contextmanager
def alone(path: Path) -> Generator[None]:
    """Wait until no other process runs in this directory, and keep others out.

    A run that goes on after its server was killed may start before the old process is gone. A
    directory that is not there yet is nobody's.
    """
    if not path.is_dir():
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a run directory's ``rounds.jsonl``; a half-written last one is left out."""
    try:
        text = (path / "rounds.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def environment() -> dict[str, Any]:
    """Versions, source revision and device of this process."""
    import torch

    packages = (
        "fedlora",
        "torch",
        "flwr",
        "peft",
        "transformers",
        "opacus",
        "ray",
        "bitsandbytes",
        "numpy",
    )
    versions: dict[str, str] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    sha = _project_git("rev-parse", "HEAD")
    return {
        "versions": versions,
        "python": platform.python_version(),
        "git_sha": sha or None,
        "git_dirty": bool(_project_git("status", "--porcelain")) if sha else None,
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": command(),
    }


def command() -> list[str]:
    """How this process was called, without the place of the program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _project_git(*arguments: str) -> str:
    """The output of git in the project's own repository; empty where the code is in none.

    A virtual environment inside another repository must not report that repository's commit.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def finite(value: Any) -> Any:
    """JSON has no inf or nan: inf becomes the text "inf", nan becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value
