"""Flower's SuperNode, whose end ends the process.

Flower's SuperNode returns when it gives up, such as at an expired certificate, while the thread of
its own API keeps the process alive; and it goes on without heartbeats when their thread dies. No
order would then reach the institution until a restart.
"""

import os
import threading
from logging import ERROR
from typing import NoReturn

from flwr.supercore import log
from flwr.supernode.cli.flower_supernode import flower_supernode

from fedlora import flower_internals, logs
from fedlora.errors import place


def main() -> None:
    """Run the SuperNode with Flower's arguments, until it ends in any way."""
    logs.keep_flower_to_one_line()
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
