"""The operator's server: it starts ServerApps, registers institutions, continues interrupted runs.

What it cannot do is logged when the reason changes.
"""

import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

from deployment import submissions, superlink_client, tasks
from deployment.errors import FlowerError, in_words
from deployment.superlink_client import REGISTERED, Server
from fedlora import logs
from fedlora.errors import InputError, place

REGISTER_SECONDS = 60.0
"""Seconds after which institutions are registered again: a SuperLink may have lost its database."""
log = logging.getLogger("fedlora.server")


class Keeper:
    """Looks after institutions and runs, pass by pass.

    Args:
        server: The server.
        since: When the server was started (monotonic clock).
    """

    def __init__(self, server: Server, since: float) -> None:
        self._server, self._since = server, since
        self._files: Mapping[Path, int] | None = None  # at the last registration
        self._registered = -math.inf  # its time
        self._problems: dict[str, str] = {}

    def keep(self) -> None:
        """Look without end; an error that is none of a file or the SuperLink ends the process."""
        while True:
            try:
                self.look()
            except Exception as error:
                log.error("the server ends: %s", place(error))
                os._exit(1)
            time.sleep(submissions.ASK_SECONDS)

    def look(self) -> None:
        """One pass; what fails in it, as while the SuperLink is away, waits for the next one."""
        problems: dict[str, str] = {}
        try:
            self._register()
        except (FlowerError, OSError) as error:
            problems["institutions are not registered"] = in_words(error)
        try:
            actions, waiting = submissions.proceed(self._server, since=self._since)
            for line in actions:
                log.info("%s", line)
            problems |= waiting
        except (FlowerError, OSError) as error:
            problems["runs are not continued"] = in_words(error)
        for name, reason in problems.items():
            if self._problems.get(name) != reason:
                log.warning("%s: %s", name, reason)
        self._problems = problems

    def _register(self) -> None:
        """Register institutions once a minute, and at once after a change of their files."""
        files, now = superlink_client.key_files(self._server), time.monotonic()
        if files == self._files and now - self._registered < REGISTER_SECONDS:
            return
        found = superlink_client.register(self._server)
        for name, outcome in found.items():
            if outcome not in REGISTERED:
                log.warning("institution %s: %s", name, outcome)
            elif outcome == REGISTERED[0] or self._files is None:
                log.info("institution %s: %s", name, outcome)
        self._files, self._registered = files, now


def main() -> None:
    """Run the server of this environment."""
    since = time.monotonic()  # before the first ServerApp can run
    try:
        here = superlink_client.server()
        os.environ["TMPDIR"] = str(here.scratch())
    except (InputError, OSError) as error:
        sys.exit(f"ERROR : {in_words(error)}")
    logs.want()
    logs.to_stderr()
    threading.Thread(target=Keeper(here, since).keep, daemon=True).start()
    ca, address = str(here.ca), here.superlink
    for token in tasks.acquire(address, here.secret.read_bytes(), TaskType.SERVER_APP, ca):
        subprocess.Popen(
            [
                *(TASK_TYPE_TO_COMMAND[TaskType.SERVER_APP], "--runtime-api-address", address),
                *("--root-certificates", ca, "--token", token, "--parent-pid", str(os.getpid())),
            ]
        )


if __name__ == "__main__":
    main()
