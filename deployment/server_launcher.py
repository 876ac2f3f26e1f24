"""The server's launcher: it starts each ServerApp, whose output goes to this log."""

import os
import subprocess
import sys
from pathlib import Path

from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

from deployment import tasks
from fedlora import logs


def main() -> None:
    """Start the ServerApps of a SuperLink: its address, the files of CA and secret."""
    address, ca, secret = sys.argv[1:]
    logs.want()
    for token in tasks.acquire(address, Path(secret).read_bytes(), TaskType.SERVER_APP, ca):
        subprocess.Popen(
            [
                *(TASK_TYPE_TO_COMMAND[TaskType.SERVER_APP], "--runtime-api-address", address),
                *("--root-certificates", ca, "--token", token, "--parent-pid", str(os.getpid())),
            ]
        )


if __name__ == "__main__":
    main()
