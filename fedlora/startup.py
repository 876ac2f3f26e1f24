"""How processes start: importing fast, and ending when whoever started them does."""

import contextlib
import ctypes
import gc
import os
import signal
from collections.abc import Generator

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # more arenas only hold on to freed memory
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "100",  # batches have many shapes; kept kernels are memory
}
"""What a process that trains for long needs in its environment from its start."""

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


def let_go() -> None:
    """Give memory that this process has freed back to the system."""
    with contextlib.suppress(AttributeError):  # another C library
        _LIBC.malloc_trim(0)


@contextlib.contextmanager
def importing() -> Generator[None]:
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
