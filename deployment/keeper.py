"""The server's keeper: it registers institutions and continues interrupted runs.

What it cannot do is logged when the reason changes, and once an hour while it lasts.
"""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

from deployment import submissions, superlink_client
from deployment.errors import FlowerError, in_words
from deployment.superlink_client import REGISTERED, Server

REPEAT_SECONDS = 3600.0
"""Seconds after which a problem that lasts is logged again."""
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
        self._outcomes: Mapping[str, str] = {}
        self._logged: dict[str, tuple[str, float]] = {}

    def keep(self) -> None:
        """Look without end."""
        while True:
            self.look()
            time.sleep(submissions.ASK_SECONDS)

    def look(self) -> None:
        """One pass; what fails in it, as while the SuperLink is away, waits for the next one."""
        problems: dict[str, str] = {}
        try:
            problems |= self._register()
        except (FlowerError, OSError) as error:
            problems["institutions are not registered"] = in_words(error)
        try:
            actions, waiting = submissions.proceed(self._server, since=self._since)
            for line in actions:
                log.info("%s", line)
            problems |= waiting
        except (FlowerError, OSError) as error:
            problems["runs are not continued"] = in_words(error)
        self._report(problems)

    def _register(self) -> dict[str, str]:
        """Register institutions once a minute, and at once after a change of their files.

        Returns:
            Institution -> why it is not registered.
        """
        files = superlink_client.key_files(self._server)
        now = time.monotonic()
        if files != self._files or now - self._registered >= REGISTER_SECONDS:
            found = superlink_client.register(self._server)
            for name, outcome in found.items():
                known = self._outcomes.get(name) in REGISTERED
                if outcome == REGISTERED[0] or (outcome in REGISTERED and not known):
                    log.info("institution %s: %s", name, outcome)
            self._files, self._outcomes, self._registered = files, found, now
        return {f"institution {n}": o for n, o in self._outcomes.items() if o not in REGISTERED}

    def _report(self, problems: Mapping[str, str]) -> None:
        """Log what is new among all problems of a pass, or was logged an hour ago.

        A problem that is not among them is over, and is logged at once when it comes back.
        """
        now = time.monotonic()
        before, self._logged = self._logged, {}
        for name, reason in problems.items():
            said, at = before.get(name, ("", -math.inf))
            if reason != said or now - at >= REPEAT_SECONDS:
                log.warning("%s: %s", name, reason)
                at = now
            self._logged[name] = reason, at
