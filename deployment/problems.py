"""Problems that last, in the server's log: when their reason changes, and once an hour."""

import logging
import math
import time
from collections.abc import Mapping

REPEAT_SECONDS = 3600.0
"""Seconds after which a problem that lasts is logged again."""
log = logging.getLogger("fedlora.server")


class Problems:
    """The problems of the last pass, each with the time at which it was logged."""

    def __init__(self) -> None:
        self._logged: dict[str, tuple[str, float]] = {}

    def report(self, problems: Mapping[str, str]) -> None:
        """Log what is new among all problems of a pass, or was logged an hour ago.

        Args:
            problems: What has a problem -> the reason. A problem that is not among them is over,
                and is logged at once when it comes back.
        """
        now = time.monotonic()
        before, self._logged = self._logged, {}
        for name, reason in problems.items():
            said, at = before.get(name, ("", -math.inf))
            if reason != said or now - at >= REPEAT_SECONDS:
                log.warning("%s: %s", name, reason)
                at = now
            self._logged[name] = reason, at
