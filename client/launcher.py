"""An institution's SuperExec: starts our own executor for each message, and nothing else.

Flower's SuperExec starts ``flwr-clientapp``, ``flwr-agentapp`` and others by the type that the run
has, and these install and run the app that the run's submitter sent. Here the type decides only
between our executor and a refusal.
"""

import subprocess
import sys

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult


class InstalledApp(SubprocessExecutor):
    """Starts ``client.executor`` for a ClientApp's task; refuses every other."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process of one task."""
        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed(f"an institution runs no {spec.task_type}")
        subprocess.Popen(command(spec))
        return LaunchResult.accepted()


def command(spec: ExecutionSpec) -> list[str]:
    """The command line for one message. Flower's own dependency installation stays off."""
    return [
        *(sys.executable, "-P", "-m", "client.executor"),
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
