"""An institution's SuperExec: it keeps the trainer running and passes each message to it.

Flower's SuperExec starts ``flwr-clientapp``, ``flwr-agentapp`` and others by the type of the run,
and these install and run the app of the run's submitter. Here the type decides only between
fedlora's executor and a refusal.

The process of a message is forked from a process that has imported Flower, but not torch.
"""

import logging
import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

from deployment import executor
from deployment.polling import Pauses
from fedlora import flower_internals, logs, startup

log = logging.getLogger("fedlora.client")

IMPORTED = ["flwr.supercore.cli.flower_superexec", "deployment.executor", "httpcore"]
MIN_PAUSE, MAX_PAUSE = 0.1, 1.0
"""Seconds between two requests for a message. Flower's own second is a fifth of a small round."""


class InstalledAppExecutor(SubprocessExecutor):
    """Starts fedlora's executor for a ClientApp's task; refuses every other task.

    Args:
        path: The trainer's socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pauses = Pauses(MIN_PAUSE, MAX_PAUSE)
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
        self._trainer = self._start()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process of one task."""
        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed(f"an institution runs no {spec.task_type}")
        self._pauses.message_arrived()
        self._processes.Process(
            target=executor.main, args=(self._path, arguments(spec)), daemon=True
        ).start()
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Join the processes that have ended; start another trainer if the trainer has ended."""
        multiprocessing.active_children()
        if (code := self._trainer.poll()) is not None:
            log.error("the trainer ended (%d); another one is started", code)
            self._trainer = self._start()

    def sleep(self, _: float) -> None:
        """Pause until the next request; replaces ``time.sleep`` in Flower's loop."""
        time.sleep(self._pauses.seconds)

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "deployment.trainer", str(self._path), str(os.getpid())],
            env={**os.environ, **startup.ENVIRONMENT},
            stdin=subprocess.DEVNULL,
        )


def arguments(spec: ExecutionSpec) -> list[str]:
    """The arguments of one message's executor. Flower's dependency installation stays off."""
    return [
        *("--runtime-api-address", spec.runtime_api_address, "--token", spec.token),
        *(("--insecure",) if spec.insecure else ()),
        *(("--parent-pid", str(spec.parent_pid)) if spec.parent_pid is not None else ()),
    ]


def _installed_app(path: Path) -> InstalledAppExecutor:
    """Make the executor, which also sets the pauses of Flower's loop."""
    made = InstalledAppExecutor(path)
    flower_internals.use_superexec_sleep(made.sleep)
    return made


def main() -> None:
    """Run Flower's SuperExec with this executor: the trainer's socket, then Flower's arguments."""
    path = Path(sys.argv.pop(1))
    logs.to_stderr()
    flower_internals.use_executor(lambda: _installed_app(path))
    flower_superexec()


if __name__ == "__main__":
    main()
