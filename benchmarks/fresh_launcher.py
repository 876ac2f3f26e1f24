"""In the place of deployment/launcher.py: a fresh process for each message, as Flower starts one.

What `benchmarks.deployment --fresh` measures the resident trainer against. Each process imports
our installed app and everything below it, loads the base model, answers and ends.
"""

import subprocess
import sys
from pathlib import Path

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

from deployment import executor, trainer
from fedlora import logs

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
    """Be the launcher, or answer one message."""
    first = sys.argv.pop(1)
    if first == ANSWER:
        logs.to_stderr()
        executor.use_trainer(Path())
        run_clientapp.get_load_client_app_fn = lambda *_, **__: lambda *_: trainer.installed_app()
        flwr_clientapp()
    else:  # the trainer's socket, which nobody opens
        run_superexec.get_executor = lambda *_, **__: FreshProcesses()
        flower_superexec()


if __name__ == "__main__":
    main()
