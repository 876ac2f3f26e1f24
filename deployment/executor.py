"""One message at an institution: it goes to the institution's trainer, whose answer goes back.

Flower's ``flwr-clientapp`` installs and runs the app that is sent with the run. A run's submitter
could then run any code at an institution, and none of its limits would hold. This is the same
process with two changes: it installs no code from the run, and it runs the app that is installed
here, in the process that keeps the base model (`deployment.trainer`).
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

START_SECONDS = 120.0
"""Time for a trainer to start listening."""

TITLE = "fedlora-answer"
"""The name of a message's process in lists of processes."""


def answer(path: Path, message: Message, context: Context) -> Message:
    """The trainer's answer, or Flower's error for a crashed app where the trainer gave no answer.

    Args:
        path: The trainer's socket.
        message: A message of the server.
        context: The run's context at this institution.
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
    """A connection to the trainer, which may still be starting.

    Raises:
        OSError: When no trainer listens in time, or another user's process does.
    """
    deadline = time.monotonic() + START_SECONDS
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
        raise PermissionError("the trainer's socket belongs to another user")
    return connection


def main(path: Path, arguments: list[str]) -> None:
    """Answer one message.

    Args:
        path: The trainer's socket.
        arguments: Arguments of ``flwr-clientapp``.
    """
    sys.argv = ["flwr-clientapp", *arguments]
    Path("/proc/self/comm").write_text(TITLE)
    logs.to_stderr()
    flower_internals.use_installed_client_app(functools.partial(answer, path))
    flwr_clientapp()
