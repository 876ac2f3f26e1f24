"""What `fedlora.exactness` found, kept on disk so that one model is examined once a machine.

An entry holds all that its verdict follows from, and counts only if that is what is asked now, to
the letter: the weights' digest, the configuration, adapter, task and shapes, the versions of the
libraries, the source of this package, the processor's instructions. A damaged entry counts as
absent, and so does one that another user of the machine owns or may write: it would switch the
examination off.
"""

import hashlib
import importlib.metadata
import json
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedlora.exactness import Verdict
from fedlora.files import cache_directory, write_atomic

MOST = 200
"""Entries that are kept: a server that asks for ever other adapters fills no disk."""
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")


def remembered(question: Mapping[str, Any], examine: Callable[[], Verdict]) -> Verdict:
    """The kept verdict for this question, or that of ``examine``, which is kept then.

    Args:
        question: All that the verdict depends on and `environment` does not hold, fit for JSON.
        examine: Finds the verdict.
    """
    asked = json.dumps({**question, **environment()}, sort_keys=True)
    directory = cache_directory() / "verdicts"
    entry = directory / hashlib.sha256(asked.encode()).hexdigest()
    if (known := _read(entry, asked)) is not None:
        return known
    verdict = examine()
    lines = f"{asked}\n{verdict.flaw}\n{json.dumps(verdict.first_position)}\n"
    with suppress(OSError):  # a read-only home costs time, not correctness
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(entry, f"{lines}{_checksum(lines)}".encode())
        entries = sorted(directory.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        for old in entries[:-MOST]:
            old.unlink(missing_ok=True)
    return verdict


@cache
def environment() -> dict[str, str]:
    """Versions of libraries, the source of this package, and the processor's instructions."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    instructions = {
        **torch.cpu.get_capabilities(),
        "level": torch.backends.cpu.get_cpu_capability(),
    }
    return {**found, "code": code.hexdigest(), "processor": json.dumps(instructions, default=str)}


def _read(entry: Path, asked: str) -> Verdict | None:
    """The verdict of an entry that is whole, answers what is asked and is this user's alone."""
    try:
        with entry.open(encoding="utf-8") as file:
            # Nobody else may enter the directory, so a file that a group may write is out of reach.
            held = (
                (os.fstat(file.fileno()), stat.S_IWOTH),
                (entry.parent.stat(), stat.S_IRWXG | stat.S_IRWXO),
            )
            if any(s.st_uid != os.geteuid() or s.st_mode & barred for s, barred in held):
                return None
            lines, _, checksum = file.read().rpartition("\n")
        question, flaw, first = lines.split("\n")
        if checksum != _checksum(f"{lines}\n") or question != asked:
            return None
        return Verdict(flaw=flaw, first_position=json.loads(first))
    except (OSError, ValueError):
        return None


def _checksum(lines: str) -> str:
    return hashlib.sha256(lines.encode()).hexdigest()
