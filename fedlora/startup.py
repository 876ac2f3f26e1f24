"""Start of a process: library settings, fast imports, memory, and an end with its parent."""

import contextlib
import ctypes
import gc
import logging
import os
import signal
import warnings
from collections.abc import Generator
from pathlib import Path

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # further arenas keep freed memory and save no time
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "100",  # bounds the memory of kernels for many shapes
    "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes imports torch's compiler otherwise
}
"""Environment variables that a training process needs from its start."""

LIBRARIES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Waiting torch threads spin by default. On shared cores a pass then takes ten times as long.
    "OMP_WAIT_POLICY": "passive",
}
"""Environment variables by which libraries send nothing and wait quietly."""

TRIM_THRESHOLD = 192 * 2**20
"""Growth in bytes since the last trim after which `trim_heap` trims again."""

_ARENA_MAX = -8  # glibc: mallopt(M_ARENA_MAX, ...)
_END_WITH_PARENT = 1  # Linux: prctl(PR_SET_PDEATHSIG, ...)
_LIBC = ctypes.CDLL(None)  # at import, because no library may be loaded between fork and exec


def end_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, also when the parent is killed."""
    _LIBC.prctl(_END_WITH_PARENT, signal.SIGKILL)


_bytes_after_trim = 0  # resident bytes of this process after its last trim


def trim_heap() -> None:
    """Return freed memory to the system if the process has grown by `TRIM_THRESHOLD`.

    Re-acquiring freed memory costs small models about 10 % per step, hence the threshold.
    """
    global _bytes_after_trim
    with contextlib.suppress(AttributeError, OSError):  # another C library, another system
        if _resident() - _bytes_after_trim > TRIM_THRESHOLD:
            _LIBC.malloc_trim(0)
            _bytes_after_trim = _resident()


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def paused_gc() -> Generator[None]:
    """Pause garbage collection in a block of imports.

    torch, transformers, PEFT and Opacus create millions of objects at import and hardly any
    garbage. Each collection scans all of them, which takes a quarter of the import time. A process
    may also call ``gc.freeze`` afterwards: later collections then skip these objects, and forks
    share their memory.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def quiet_libraries() -> None:
    """Set variables that libraries read at import: no telemetry, no banners, no compiler."""
    for name, value in (ENVIRONMENT | LIBRARIES).items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        _LIBC.mallopt(_ARENA_MAX, int(os.environ["MALLOC_ARENA_MAX"]))
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional kernels
    # The hub's client logs each of five retries as a line; our error names the last failure.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
