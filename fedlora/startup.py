"""Importing fast: torch, transformers, PEFT and Opacus make millions of objects at once."""

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def importing() -> Generator[None]:
    """Put off the collection of garbage, for a block that imports.

    Imports leave next to none, but each collection looks at all that is there: a quarter of the
    time that they take. A process that does nothing but work afterwards may also call
    ``gc.freeze``: what is there then is never looked at again, and forks share it.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
