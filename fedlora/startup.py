"""Importing fast: torch, transformers, PEFT and Opacus make millions of objects at once."""

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def importing() -> Generator[None]:
    """Put off the collection of garbage, for a block that imports.

    Imports leave next to none, but each collection looks at all that is there: a quarter of the
    time that they take. What is there at the end of the block is never looked at again, which also
    spares the interpreter over a second when it ends, and lets forked processes share it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
