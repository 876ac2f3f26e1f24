"""Flower's SuperNode with shorter pauses while messages arrive, and an end that ends the process.

Flower's SuperNode returns when it gives up, such as at an expired certificate, while the thread of
its own API keeps the process alive; and it goes on without heartbeats when their thread dies. No
order would then reach the institution until a restart.
"""

import os
import threading
import time
from logging import ERROR
from typing import NoReturn

from flwr.supercore import log
from flwr.supernode.cli.flower_supernode import flower_supernode

from deployment.polling import Pauses
from fedlora import flower_internals, logs
from fedlora.errors import place

MAX_SECONDS = 3.0
"""Flower's pause between two requests for a message. Its other pauses, of half a second, wait for
answers."""

MIN_SECONDS = 0.2
"""The pause while messages arrive. A request costs the SuperLink some 10 ms."""


WAITED_SECONDS = 0.1
"""A request that waited at the SuperLink took longer (`deployment.arrivals`)."""


class Sleep:
    """``time.sleep`` of Flower's loop."""

    def __init__(self) -> None:
        self._pauses = Pauses(MIN_SECONDS, MAX_SECONDS)
        self._last = time.monotonic()

    def __call__(self, seconds: float) -> None:
        """Pause, for this long at most; not at all after a request that waited."""
        if seconds < MAX_SECONDS:
            self._pauses.message_arrived()
        if seconds < MAX_SECONDS or time.monotonic() - self._last < WAITED_SECONDS:
            time.sleep(min(seconds, self._pauses.seconds))
        self._last = time.monotonic()


def main() -> None:
    """Run the SuperNode with Flower's arguments, until it ends in any way."""
    logs.keep_flower_to_one_line()
    flower_internals.use_supernode_sleep(Sleep())
    flower_internals.hide_processing_time()
    threading.excepthook = _end_with_thread
    try:
        flower_supernode()
    except Exception as error:
        _end(f"the SuperNode failed: {place(error)}")
    _end("the SuperNode gave up; the line before says why")


def _end_with_thread(died: threading.ExceptHookArgs) -> None:
    if died.exc_value is not None and not isinstance(died.exc_value, SystemExit):
        _end(f"a thread of the SuperNode failed: {place(died.exc_value)}")


def _end(reason: str) -> NoReturn:
    """End the process at once: a normal exit would wait for other threads."""
    log(ERROR, "%s; it must be started again", reason)
    os._exit(1)


if __name__ == "__main__":
    main()
