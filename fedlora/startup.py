"""How processes start: importing fast, and ending when whoever started them does."""

import contextlib
import ctypes
import gc
import signal
from collections.abc import Generator

_END_WITH_PARENT = 1  # Linux: prctl(PR_SET_PDEATHSIG, ...)
_LIBC = ctypes.CDLL(None)  # here: between fork and exec nothing may be loaded


def end_with_parent() -> None:
    """Have this process killed when its parent ends, however it does (Linux)."""
    _LIBC.prctl(_END_WITH_PARENT, signal.SIGKILL)


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
