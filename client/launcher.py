"""An institution's SuperExec: starts our own executor for each message, and nothing else.

Flower's SuperExec starts ``flwr-clientapp``, ``flwr-agentapp`` and others by the type that the run
has, and these install and run the app that the run's submitter sent. Here the type decides only
between our executor and a refusal.

Each message has a process of its own. They are forked from one that has imported torch and our app
and has done nothing else, since these imports take longer than most rounds.
"""

import multiprocessing
import os
from multiprocessing import forkserver

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

from client import executor

IMPORTED = [
    "flwr.supercore.cli.flower_superexec",
    "client.executor",
    "client.app",
    "peft",
    "opacus",
]


class InstalledApp(SubprocessExecutor):
    """Starts our executor for a ClientApp's task; refuses every other."""

    def __init__(self) -> None:
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(IMPORTED)
        # Asking whether there is a GPU would otherwise make CUDA unusable in what is forked.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        forkserver.ensure_running()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process of one task."""
        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed(f"an institution runs no {spec.task_type}")
        self._processes.Process(target=executor.main, args=(arguments(spec),), daemon=True).start()
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Take leave of the processes that have ended."""
        multiprocessing.active_children()


def arguments(spec: ExecutionSpec) -> list[str]:
    """The arguments of one message's executor. Flower's dependency installation stays off."""
    return [
        *("--runtime-api-address", spec.runtime_api_address, "--token", spec.token),
        *(("--insecure",) if spec.insecure else ()),
        *(("--parent-pid", str(spec.parent_pid)) if spec.parent_pid is not None else ()),
    ]


def main() -> None:
    """Run Flower's SuperExec with our executor. Its arguments are Flower's."""
    run_superexec.get_executor = lambda *_, **__: InstalledApp()
    flower_superexec()


if __name__ == "__main__":
    main()
