"""Our own log of a process that serves in a deployment."""

import logging
import os

from fedlora.text import visible

_VARIABLE = "FEDLORA_LOG"


class OneLine(logging.Formatter):
    """Escapes what could begin a line of its own: messages quote what the other side sent."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The message, each control character as Python writes it."""
        return visible(super().formatMessage(record))


def want() -> None:
    """Have the apps that this process starts log to stderr."""
    os.environ[_VARIABLE] = "stderr"


def wanted() -> bool:
    """Whether the process that started this one wants that."""
    return os.environ.get(_VARIABLE) == "stderr"


def to_stderr() -> None:
    """Write what ``fedlora`` logs to stderr, in the form that Flower's own log has.

    For a process of Flower's alone: nothing propagates to the root logger any more.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(levelname)s : %(message)s"))
    logger = logging.getLogger("fedlora")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    for name in ("fedlora", "flwr"):  # libraries give the root logger a handler: else all is twice
        logging.getLogger(name).propagate = False
