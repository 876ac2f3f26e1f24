"""The SuperNode: Flower's, which looks more often for messages while they come."""

import time

from flwr.supernode.cli.flower_supernode import flower_supernode

from deployment.polling import Pauses
from fedlora import flower_internals

LOOK = 3.0
"""Seconds that Flower's SuperNode pauses between two looks for a message. Its other pauses, of half
a second, are those in which it waits for the answer of a message that came."""

SHORTEST = 0.2
"""Seconds. A look costs the SuperLink some 8 ms."""


class Sleep:
    """``time.sleep`` of Flower's loop."""

    def __init__(self) -> None:
        self._pauses = Pauses(SHORTEST, LOOK)

    def __call__(self, seconds: float) -> None:
        """Pause, for this long at most."""
        if seconds < LOOK:
            self._pauses.message_arrived()
        time.sleep(min(seconds, self._pauses.seconds))


def main() -> None:
    """Run it. Its arguments are Flower's."""
    flower_internals.use_supernode_sleep(Sleep())
    flower_supernode()


if __name__ == "__main__":
    main()
