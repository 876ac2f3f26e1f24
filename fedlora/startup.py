"""How processes start: importing fast, and ending when whoever started them does."""

import contextlib
import ctypes
import functools
import gc
import os
import signal
from collections.abc import Callable, Generator
from typing import Any, ClassVar

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # more arenas only hold on to freed memory
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "100",  # batches have many shapes; kept kernels are memory
}
"""What a process that trains for long needs in its environment from its start."""

MUCH = 192 * 2**20
"""Bytes of freed memory that a process may keep."""

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


class _Memory(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_: ClassVar = [
        ("others", ctypes.c_size_t * 8),
        ("fordblks", ctypes.c_size_t),  # bytes of freed blocks
        ("keepcost", ctypes.c_size_t),
    ]


def let_go() -> None:
    """Give memory that this process has freed back to the system, if it is much.

    To get it again takes a small model's steps a tenth of their time.
    """
    with contextlib.suppress(AttributeError):  # another C library
        look = _LIBC.mallinfo2
        look.restype = _Memory
        if look().fordblks > MUCH:
            _LIBC.malloc_trim(0)


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
    has it loaded at its first call instead.
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


def _later(real: Callable[..., Any], function: Any = None, /, **options: Any) -> Any:
    """What ``torch.compile`` gives, made at its first call."""
    if function is None:
        return functools.partial(_later, real, **options)

    @functools.cache
    def made() -> Any:
        return real(function, **options)

    @functools.wraps(function)
    def calling(*args: Any, **kwargs: Any) -> Any:
        return made()(*args, **kwargs)

    return calling
