"""How long to wait between two looks for a message."""

import time

PART = 0.1
"""Of the time that nothing came."""


class Pauses:
    """Short pauses while messages come, long ones while none does.

    A pause is a tenth of the time since the last message, so that looking adds no more than that to
    a wait for the next one, and costs nobody much between runs.

    Args:
        shortest: Seconds, right after a message.
        longest: Seconds, when none has come for long.
    """

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest, self._longest = shortest, longest
        self._last = float("-inf")

    def came(self) -> None:
        """A message is there."""
        self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """The next pause."""
        quiet = time.monotonic() - self._last
        return min(max(PART * quiet, self._shortest), self._longest)
