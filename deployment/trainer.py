"""An institution's trainer: one process that keeps the base model and answers every message.

It imports torch, loads the base and opens the records once. It ends with its executor, however the
executor ends (`deployment.executor`).
"""

import gc
import logging
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Message

from client import settings
from fedlora import logs
from fedlora.config import schemes
from fedlora.config.sections import ModelConfig
from fedlora.data import records, sources
from fedlora.errors import InputError, place
from fedlora.models import model_files
from fedlora.startup import paused_gc
from fedlora.wire import wire

log = logging.getLogger("fedlora.client")

TITLE = "fedlora-trainer"
"""The name of this process in lists of processes."""

App = Callable[[Message, Context], Message]


def installed_app() -> App:
    """The app of this installation, imported late: torch's import takes seconds."""
    with paused_gc():
        from client.app import app

    return app


class Trainer:
    """Answers messages, and keeps base and records as long as their files are the same."""

    def __init__(self) -> None:
        self._loaded_from: tuple[object, object] | None = None

    def answer(self, message: Message, context: Context) -> Message:
        """The app's answer; an error of the app leaves as a code."""
        try:
            app = installed_app()
            self._forget_changed_files(context)
            return app(message, context)
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


def work(connection: Connection) -> None:
    """Answer each message of a connection with its context, until the other end is closed."""
    Path("/proc/self/comm").write_text(TITLE)
    logs.to_stderr()
    installed_app()
    trainer = Trainer()
    while True:
        try:
            message, context = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(trainer.answer(message, context))
