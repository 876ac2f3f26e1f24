"""A launcher like deployment/launcher.py, with a fresh process for each message, as in Flower.

`benchmarks.deployment --fresh` measures the resident trainer against it. Each process imports
fedlora's installed app and everything below it, loads the base model, answers and ends.
"""

import subprocess
import sys

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

from deployment import trainer
from fedlora import flower_internals, logs

ANSWER = "answer"


class FreshProcesses(SubprocessExecutor):
    """Starts this file again for each message."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process of one task."""
        subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "deployment.launcher", ANSWER),
                *("--runtime-api-address", spec.runtime_api_address, "--token", spec.token),
                *("--insecure", "--parent-pid", str(spec.parent_pid)),
            ]
        )
        return LaunchResult.accepted()


def main() -> None:
    """Run the launcher, or answer one message."""
    first = sys.argv.pop(1)
    if first == ANSWER:
        logs.to_stderr()
        flower_internals.use_installed_client_app(trainer.installed_app())
        flwr_clientapp()
    else:  # the trainer's socket, which nobody opens
        flower_internals.use_executor(FreshProcesses)
        flower_superexec()


if __name__ == "__main__":
    main()
