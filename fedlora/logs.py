"""fedlora's own log in a process of a deployment."""

import logging
import os

from fedlora.data.text import visible

_VARIABLE = "FEDLORA_LOG"


class OneLine(logging.Formatter):
    """Escapes characters that could begin a new line: messages quote text of the other side."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The message, each control character as Python writes it."""
        return visible(super().formatMessage(record))


class _OneLine(logging.Filter):
    """Makes one line of a message before any handler formats it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = visible(record.getMessage()), ()
        return True


def keep_flower_to_one_line() -> None:
    """Have Flower's own log escape what it quotes of messages, in this process."""
    logging.getLogger("flwr").addFilter(_OneLine())


def want() -> None:
    """Have the apps of this process's children log to stderr."""
    os.environ[_VARIABLE] = "stderr"


def wanted() -> bool:
    """Whether the parent process asked for a log on stderr."""
    return os.environ.get(_VARIABLE) == "stderr"


def to_file(path: str) -> logging.Handler:
    """A handler that appends lines with time and level to a file, made by its first line."""
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    return handler


def to_stderr() -> None:
    """Write the log of ``fedlora`` to stderr, in the form of Flower's own log.

    Only for Flower's processes: afterwards no message propagates to the root logger.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(levelname)s : %(message)s"))
    logger = logging.getLogger("fedlora")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    for name in (
        "fedlora",
        "flwr",
    ):  # libraries give the root logger a handler, which would write all lines twice
        logging.getLogger(name).propagate = False
