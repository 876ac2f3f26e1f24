"""The processors that this process may use, which in a container or a batch job are few of many."""

import contextlib
import math
import os
from collections.abc import Generator
from pathlib import Path

_GROUPS = (
    (Path("/sys/fs/cgroup/cpu.max"),),
    (
        Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
        Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ),
)
"""The files that hold quota and period of the container's control group, version 2 and 1."""


def count() -> int:
    """Processors of the process's affinity, and at most the quota of its container, >= 1.

    `os.cpu_count` is the machine's number: with it a container of two processors on a machine of
    64 would start 64 workers.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        allowed = os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota())))


@contextlib.contextmanager
def threads(count: int) -> Generator[None]:
    """Set torch's threads for a while: floating-point sums depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quota() -> float:
    """Processors of the container's control group; infinite: no limit."""
    for files in _GROUPS:
        try:
            quota, period = " ".join(file.read_text(encoding="ascii") for file in files).split()
            allowed = int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue  # no such files, or "max"
        if allowed > 0:  # -1: no limit
            return allowed
    return math.inf
