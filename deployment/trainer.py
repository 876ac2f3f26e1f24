"""An institution's trainer: one process that keeps the base model and answers every message.

Flower starts a process for each message. That process hands its message to the trainer and takes
the answer back (`deployment.executor`). The trainer imports torch, loads the base and opens the
records once.

Both use a socket in the directory of the node's start, which only this user can enter, and each end
refuses another user's process. The trainer ends with its launcher, however the launcher ends. When
the trainer ends by itself, the launcher starts another one: a crash costs one message.
"""

import faulthandler
import gc
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from flwr.app import Context, Message

from client import settings
from fedlora import flower_internals, logs
from fedlora.config import schemes
from fedlora.config.sections import ModelConfig
from fedlora.data import cache, data, records, sources
from fedlora.errors import InputError, place
from fedlora.models import model_files
from fedlora.startup import end_with_parent, paused_gc
from fedlora.wire import wire

log = logging.getLogger("fedlora.client")

GRACE_SECONDS = 30.0
"""Seconds from a refusal after a timeout until the process is ended by force."""

_TITLE = "fedlora-trainer"

App = Callable[[Message, Context], Message]


def installed_app() -> App:
    """The app of this installation, imported late: torch's import takes seconds."""
    with paused_gc():
        from client.app import app

    return app


def max_seconds(context: Context) -> float:
    """The most seconds of one message."""
    try:
        return settings.load(str(context.node_config.get("settings"))).max_seconds
    except InputError:  # the app reports it
        return settings.Settings.max_seconds


def of_this_user(connection: Connection) -> bool:
    """Whether the process at the other end of a local socket belongs to this process's user."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        said = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", said)
    return user == os.getuid()


class Trainer:
    """Answers one message after the other in one worker thread, which first imports the app."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._worker.submit(installed_app)  # the first message meets the same error
        self._loaded_from: tuple[object, object] | None = None

    def serve(self, connection: Connection) -> bool:
        """Answer a connection's message.

        A process that hangs outside Python is ended by faulthandler, with places in the code and no
        values in the log.

        Returns:
            Whether the trainer can continue; false after a timeout, when the reply is ``timed-out``
            and the app still runs.
        """
        if not of_this_user(connection):
            log.error("refused: a process of another user at the trainer's socket")
            return True
        identity, message, context = connection.recv()
        flower_internals.set_identity(*identity)
        seconds = max_seconds(context)
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True)
        answer = self._worker.submit(self._answer, message, context)
        try:
            reply = answer.result(timeout=seconds)
            faulthandler.cancel_dump_traceback_later()
        except TimeoutError:
            log.error("refused: timed-out: no answer after max-seconds (%g s)", seconds)
            reply = Message(wire.pack_refusal("timed-out"), reply_to=message)
        try:
            connection.send(reply)
        except OSError:
            log.warning("the answer was not sent: its receiver has ended")
        if done := answer.done():  # also where it came just after its time
            faulthandler.cancel_dump_traceback_later()
        return done

    def _answer(self, message: Message, context: Context) -> Message:
        try:
            app = installed_app()
            self._forget_changed_files(context)
            try:
                return app(message, context)
            finally:  # a server that asks for many lengths or prompts must not fill the disk
                cache.evict(data.cached_shards())
        except BaseException as error:
            log.error("the app failed: %s", place(error))
            return Message(wire.pack_refusal("failed"), reply_to=message)

    def _forget_changed_files(self, context: Context) -> None:
        """Drop base model and records when their files have changed."""
        try:
            own = settings.load(str(context.node_config.get("settings")))
            name = str(context.run_config.get("model.name", ModelConfig.name))
            if name not in own.models:
                return  # the app refuses; that name is not resolved
            now = _files(name, own, context.run_id)
        except (InputError, OSError):  # the app reports it
            now = object(), object()  # an unknown state is never that of the next message
        before = self._loaded_from or now
        if now[0] != before[0]:
            from fedlora.models import trainable

            trainable.forget()
        if now != before:
            records.forget()
            gc.collect()
        self._loaded_from = now


def _files(name: str, own: settings.Settings, run: int) -> tuple[object, object]:
    """The current states of the base model's files, and of the records' and held-out rows'.

    A function's rows (``python:``) have no file to look at: they are as new as the run.

    Raises:
        InputError: If the base model is missing, or a directory of records is empty or closed.
        OSError: If a file or its directory cannot be read.
    """
    named = [source for source in (own.source, own.test_source) if source]
    rows: list[Path] = []
    for source in named:
        rows += sources.institution_files(source).values() or [Path(source)]
    given = run if any(source.startswith(schemes.PYTHON) for source in named) else None
    return (name, _state(model_files.resolve(name).path.iterdir())), (given, _state(rows))


def _state(files: Iterable[Path]) -> list[tuple[str, int, int, int]]:
    found = sorted((str(file), file.stat()) for file in files if file.is_file())
    return [(path, s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found]


def _listener(path: Path) -> Listener:
    """A socket that only its owner can open, from its creation."""
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        return Listener(str(path), "AF_UNIX", backlog=16)
    finally:
        os.umask(before)


def main() -> None:
    """Serve at the socket that the first argument names, as long as the second's process lives."""
    path, parent = Path(sys.argv[1]), int(sys.argv[2])
    end_with_parent()
    if os.getppid() != parent:
        sys.exit("the launcher has ended")
    Path("/proc/self/comm").write_text(_TITLE)
    # Tokenised records are private: they stay in the node's private directory and go with it.
    os.environ["FEDLORA_CACHE"] = str(path.parent / "cache")
    logs.to_stderr()
    trainer = Trainer()
    with _listener(path) as listener:
        while True:
            with listener.accept() as connection:
                try:
                    goes_on = trainer.serve(connection)
                except (EOFError, OSError):  # the asking process has ended
                    continue
            if not goes_on:
                os._exit(1)  # a normal exit would wait for the worker


if __name__ == "__main__":
    main()
