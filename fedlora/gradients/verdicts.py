"""A cache of verdicts of `fedlora.gradients.exactness`, so that a machine examines a model once.

An entry holds its verdict and everything that the verdict depends on: the weights' digest, the
configuration, adapter, task and shapes, the versions of the libraries, the source of this package,
the processor's instructions. An entry counts only if all of these equal the present ones. Damaged
entries do not count, nor do entries that another user of the machine owns or may write, because
they could switch the examination off.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedlora.extras import version
from fedlora.files import cache_directory, code_digest, write_atomic
from fedlora.gradients.exactness import Verdict

MAX_ENTRIES = 200
"""The most entries on disk. The oldest are deleted, so that no server can fill the disk."""
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")


def remembered(question: Mapping[str, Any], examine: Callable[[], Verdict]) -> Verdict:
    """The cached verdict for this question, or the verdict of ``examine``, which is then cached.

    Args:
        question: Everything that the verdict depends on beside `environment`, fit for JSON.
        examine: Examines the model.
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
        for old in entries[:-MAX_ENTRIES]:
            old.unlink(missing_ok=True)
    return verdict


# at import: a file may change while the code that runs does not
_CODE = code_digest(Path(__file__).parents[1])


@cache
def environment() -> dict[str, str]:
    """Versions of libraries, the source of this package, and the processor's instructions."""
    found = {name: version(name) for name in LIBRARIES}
    instructions = {
        **torch.cpu.get_capabilities(),
        "level": torch.backends.cpu.get_cpu_capability(),
    }
    return {**found, "code": _CODE, "processor": json.dumps(instructions, default=str)}


def _read(entry: Path, asked: str) -> Verdict | None:
    """The verdict of an entry that is whole, answers this question and is this user's only."""
    try:
        with entry.open(encoding="utf-8") as file:
            # No other user may enter the directory, so a group-writable file in it is out of reach.
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
