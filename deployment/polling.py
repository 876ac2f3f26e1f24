"""Pauses between two requests for a message."""

import time

PAUSE_FRACTION = 0.1
"""A pause as a fraction of the time since the last message."""


class Pauses:
    """Short pauses while messages arrive, long ones while none does.

    A pause is a tenth of the time since the last message. It adds no more than that to the wait for
    the next message, and requests are rare between runs.

    Args:
        shortest: The pause right after a message, in seconds.
        longest: The pause after a long time without a message, in seconds.
    """

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest, self._longest = shortest, longest
        self._last = float("-inf")

    def message_arrived(self) -> None:
        """Note that a message arrived now."""
        self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """The next pause."""
        quiet = time.monotonic() - self._last
        return min(max(PAUSE_FRACTION * quiet, self._shortest), self._longest)
