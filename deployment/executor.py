"""An institution's executor: it passes each message to the trainer, and the answer back.

Flower's executor installs and runs the app that is sent with the run. A run's submitter could then
run any code at an institution, and none of its limits would hold. This one installs nothing: the
trainer, a process that keeps the base model, calls the app that is installed here.

The executor is also the trainer's watchdog. A trainer that gives no answer in ``max-seconds``, or
that ends, costs one message: another trainer is started.
"""

import logging
import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from client import settings
from deployment import tasks
from fedlora import logs, startup
from fedlora.errors import InputError, place
from fedlora.wire import wire

log = logging.getLogger("fedlora.client")


def max_seconds(context: Context) -> float:
    """The most seconds of one message."""
    try:
        return settings.load(str(context.node_config.get("settings"))).max_seconds
    except InputError:  # the app reports it
        return settings.Settings.max_seconds


class Trainer:
    """The trainer's process, which answers one message after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spawn = multiprocessing.get_context("spawn")
        self._start()

    def answer(self, message: Message, context: Context) -> Message:
        """The app's answer; its refusal ``timed-out``, or Flower's error for a crashed app."""
        with self._lock:
            return self._answer(message, context)

    def _answer(self, message: Message, context: Context) -> Message:
        seconds = max_seconds(context)
        try:
            self._connection.send((message, context))
            if self._connection.poll(seconds):
                return self._connection.recv()
            log.error("refused: timed-out: no answer after max-seconds (%g s)", seconds)
            reply = Message(wire.pack_refusal("timed-out"), reply_to=message)
        except (EOFError, OSError) as error:
            log.error("the trainer ended without an answer (%s)", type(error).__name__)
            crashed = Error(ErrorCode.CLIENT_APP_CRASHED, "the app's process ended")
            reply = Message(crashed, reply_to=message)
        self.kill()
        self._start()
        return reply

    def kill(self) -> None:
        """End the process, also one that hangs outside Python."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _start(self) -> None:
        self._connection, theirs = self._spawn.Pipe()
        self._process = self._spawn.Process(target=_train, args=(theirs,))
        self._process.start()
        theirs.close()


def _train(connection: Connection) -> None:
    """The trainer's process; this one does not import the trainer, which may load torch."""
    startup.end_with_parent()
    from deployment import trainer

    trainer.work(connection)


def serve(client: RuntimeHttpClient, trainer: Trainer) -> None:
    """Answer one task's message. The run's app, which comes with it, is not looked at.

    Where that fails, the task's heartbeat ends, and the SuperNode reports a crashed app.
    """
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    try:
        message, context, *_ = pull_task_input(client)
        push_message(client, trainer.answer(message, context), context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
    except Exception as error:
        log.error("the message was not answered: %s", place(error))
    finally:
        heartbeat.stop()
        client.close()


def main() -> None:
    """Answer the messages of the SuperNode at an address; its secret is in a file."""
    address, secret = sys.argv[1], Path(sys.argv[2])
    os.environ.update(startup.ENVIRONMENT)
    logs.to_stderr()
    trainer = Trainer()
    try:
        for token in tasks.acquire(address, secret.read_bytes(), TaskType.CLIENT_APP):
            # a thread a task: the parts of a message of a run that has ended may never arrive
            arguments = (tasks.connect(address, token), trainer)
            threading.Thread(target=serve, args=arguments, daemon=True).start()
    finally:
        trainer.kill()


if __name__ == "__main__":
    main()
