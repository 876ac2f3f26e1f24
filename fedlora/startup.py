"""How processes start: importing fast, and ending when whoever started them does."""

import contextlib
import ctypes
import functools
import gc
import logging
import os
import signal
import types
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # more arenas only hold on to freed memory
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "100",  # batches have many shapes; kept kernels are memory
}
"""What a process that trains for long needs in its environment from its start."""

MUCH = 192 * 2**20
"""Bytes that a process may grow by until it gives back what it has freed."""

_ARENA_MAX = -8  # glibc: mallopt(M_ARENA_MAX, ...)
_END_WITH_PARENT = 1  # Linux: prctl(PR_SET_PDEATHSIG, ...)
_LIBC = ctypes.CDLL(None)  # here: between fork and exec nothing may be loaded


def end_with_parent() -> None:
    """Have this process killed when its parent ends, however it does (Linux)."""
    _LIBC.prctl(_END_WITH_PARENT, signal.SIGKILL)


def lean() -> None:
    """Have this process, which imports torch later, as if it had had `ENVIRONMENT` from its start.

    Its children have it too.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(AttributeError):  # another C library
        _LIBC.mallopt(_ARENA_MAX, int(os.environ["MALLOC_ARENA_MAX"]))


_held = 0  # bytes of this process in memory when it last gave some back


def let_go() -> None:
    """Give memory that this process has freed back to the system, if it has grown by much.

    To get it again takes a small model's steps a tenth of their time.
    """
    global _held
    with contextlib.suppress(AttributeError, OSError):  # another C library, another system
        if _resident() - _held > MUCH:
            _LIBC.malloc_trim(0)
            _held = _resident()


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def uncollected() -> Generator[None]:
    """Put off the collection of garbage, for a block that imports.

    torch, transformers, PEFT and Opacus make millions of objects at once. Imports leave next to no
    garbage, but each collection looks at all that is there: a quarter of the time that they take. A
    process that does nothing but work afterwards may also call ``gc.freeze``: what is there then is
    never looked at again, and forks share it.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def importing() -> Generator[None]:
    """`uncollected`, for a block that imports what builds on torch. It waits for less, too.

    bitsandbytes has torch's compiler loaded for a few functions, of which most runs call none. Each
    has it loaded at its first call instead. Not for two threads at once.
    """
    with uncollected():
        import torch

        itself: Any = torch
        real = itself.compile
        itself.compile = functools.partial(_later, real)
        try:
            yield
        finally:
            itself.compile = real


def _later(real: Callable[..., Any], model: Any = None, **options: Any) -> Any:
    """``torch.compile``, which makes what it gives for a function at its first call."""
    if model is None:
        return functools.partial(_later, real, **options)
    if not isinstance(model, types.FunctionType):
        return real(model, **options)

    @functools.cache
    def made() -> Any:
        return real(model, **options)

    @functools.wraps(model)
    def calling(*args: Any, **kwargs: Any) -> Any:
        return made()(*args, **kwargs)

    return calling


def quiet_libraries() -> None:
    """Settings that libraries read when they are imported."""
    lean()
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it warns of optional kernels at import
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else bitsandbytes imports a compiler
    # Torch's threads spin while they wait, and beside other work on the same cores a pass then
    # takes up to ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
