"""The processors that this process may use, which in a container or a batch job are few of many."""

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_OLD_QUOTA, _OLD_PERIOD = (
    Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
    Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


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


def _quota() -> float:
    """Processors of the container's control group, version 2 or 1; infinite: no limit."""
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota = _OLD_QUOTA.read_text(encoding="ascii").strip()
            period = _OLD_PERIOD.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return math.inf
    if not quota.isdecimal() or not period.isdecimal() or int(quota) == 0 or int(period) == 0:
        return math.inf  # "max", or -1
    return int(quota) / int(period)
