"""Flower's SuperNode with shorter pauses while messages arrive."""

import time

from flwr.supernode.cli.flower_supernode import flower_supernode

from deployment.polling import Pauses
from fedlora import flower_internals, logs

MAX_SECONDS = 3.0
"""Flower's pause between two requests for a message. Its other pauses, of half a second, wait for
answers."""

MIN_SECONDS = 0.2
"""The pause while messages arrive. A request costs the SuperLink some 10 ms."""


WAITED_SECONDS = 0.1
"""A request that waited at the SuperLink took longer (`deployment.arrivals`)."""


class Sleep:
    """``time.sleep`` of Flower's loop."""

    def __init__(self) -> None:
        self._pauses = Pauses(MIN_SECONDS, MAX_SECONDS)
        self._last = time.monotonic()

    def __call__(self, seconds: float) -> None:
        """Pause, for this long at most; not at all after a request that waited."""
        if seconds < MAX_SECONDS:
            self._pauses.message_arrived()
        if seconds < MAX_SECONDS or time.monotonic() - self._last < WAITED_SECONDS:
            time.sleep(min(seconds, self._pauses.seconds))
        self._last = time.monotonic()


def main() -> None:
    """Run the SuperNode with Flower's arguments."""
    logs.keep_flower_to_one_line()
    flower_internals.use_supernode_sleep(Sleep())
    flower_supernode()


if __name__ == "__main__":
    main()
