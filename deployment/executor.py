"""One message at an institution: it is handed to the institution's trainer, and so is the answer.

Flower's ``flwr-clientapp`` installs and runs the app that came with the run. Whoever submits runs
would then decide what an institution does, and each of its limits would be moot. This is the same
process with two things changed: nothing that was sent is installed, and the app is the one that is
installed here, in the process that keeps its base model (`deployment.trainer`).
"""

import functools
import logging
import sys
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

from deployment import trainer
from fedlora import flower_internals, logs

log = logging.getLogger("fedlora.client")

START = 120.0
"""Seconds that a trainer may take until there is one."""

TITLE = "fedlora-answer"
"""The name that the process of a message has in lists of processes."""


def answer(path: Path, message: Message, context: Context) -> Message:
    """The trainer's answer; where it ended without one, what Flower says of an app that crashed.

    Args:
        path: The trainer's socket.
        message: What the app is to answer.
        context: Of the run at this institution.
    """
    identity = flower_internals.identity()
    try:
        with _connected(path) as connection:
            connection.send((identity, message, context))
            return connection.recv()
    except (OSError, EOFError) as error:
        log.error("the trainer ended without an answer (%s)", type(error).__name__)
        crashed = Error(ErrorCode.CLIENT_APP_CRASHED, "the app's process ended")
        return Message(crashed, reply_to=message)


def _connected(path: Path) -> Connection:
    """A connection to the trainer, which may be about to start.

    Raises:
        OSError: When there is none in time, or what listens is another user's.
    """
    deadline = time.monotonic() + START
    while True:
        try:
            connection = Client(str(path), "AF_UNIX")
            break
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    if not trainer.of_this_user(connection):
        connection.close()
        raise PermissionError("the trainer's socket is another user's")
    return connection


def main(path: Path, arguments: list[str]) -> None:
    """Have one message answered.

    Args:
        path: The trainer's socket.
        arguments: Those of ``flwr-clientapp``.
    """
    sys.argv = ["flwr-clientapp", *arguments]
    Path("/proc/self/comm").write_text(TITLE)
    logs.to_stderr()
    flower_internals.use_installed_client_app(functools.partial(answer, path))
    flwr_clientapp()
