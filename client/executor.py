"""One message at an institution: its own installed app answers, within its own time.

Flower's ``flwr-clientapp`` installs and runs the app that came with the run. Whoever submits runs
would then decide what an institution does, and each of its limits would be moot. This is the same
process with two things changed: nothing that was sent is installed, and the app is the one that is
installed here.
"""

import faulthandler
import logging
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

from client import settings
from fedlora import logs, wire
from fedlora.errors import InputError, place

log = logging.getLogger("fedlora.client")

GRACE = 30.0
"""Seconds from a refusal for lack of time to the hard end of a process that did not end."""

TITLE = "fedlora-answer"
"""The name that the process of a message has in lists of processes."""

App = Callable[[Message, Context], Message]


def installed_app() -> App:
    """The app of this installation. It is imported here: torch's import takes seconds."""
    from client.app import app

    return app


def limit(context: Context) -> float:
    """Seconds that one message may take."""
    try:
        return settings.load(str(context.node_config.get("settings"))).max_seconds
    except InputError:  # the app says so itself
        return settings.Settings.max_seconds


def answer(message: Message, context: Context) -> Message:
    """The app's answer, or ``timed-out`` when it takes longer than the institution allows.

    A process that even then does not end, since it hangs where no Python runs, is ended from
    outside Python, with a list of places (no values) in the log.
    """
    seconds = limit(context)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
    answers: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(installed_app()(message, context))
        except BaseException as error:
            log.error("the app failed: %s", place(error))
            answers.put(Message(wire.pack_refusal("failed"), reply_to=message))

    threading.Thread(target=work, daemon=True).start()
    try:
        answered = answers.get(timeout=seconds)
    except queue.Empty:
        log.error("refused: timed-out: no answer after max-seconds (%g s)", seconds)
        return Message(wire.pack_refusal("timed-out"), reply_to=message)
    faulthandler.cancel_dump_traceback_later()
    return answered


def use_installed_app() -> None:
    """Put the installed app in the place of whatever a run brings."""
    run_clientapp.install_from_fab = _installs_nothing
    run_clientapp.get_project_dir = _no_directory
    run_clientapp.get_load_client_app_fn = _loads_ours


def _installs_nothing(*_: object, **__: object) -> Path:
    return Path()


def _no_directory(*_: object) -> Path:
    return Path()


def _loads_ours(*_: object, **__: object) -> Callable[..., App]:
    return lambda *_: answer


def main(arguments: list[str]) -> None:
    """Answer one message.

    Args:
        arguments: Those of ``flwr-clientapp``.
    """
    sys.argv = ["flwr-clientapp", *arguments]
    Path("/proc/self/comm").write_text(TITLE)
    logs.to_stderr()
    use_installed_app()
    flwr_clientapp()
