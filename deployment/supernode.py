"""The SuperNode: Flower's, which polls more often while messages arrive."""

import time

from flwr.supernode.cli.flower_supernode import flower_supernode

from deployment.polling import Pauses
from fedlora import flower_internals

LOOK = 3.0
"""Seconds that Flower's SuperNode pauses between two polls for a message. In its other pauses, of
half a second, it waits for the answer to a message."""

SHORTEST = 0.2
"""The shortest pause in seconds. A poll costs the SuperLink some 8 ms."""


class Sleep:
    """``time.sleep`` of Flower's loop."""

    def __init__(self) -> None:
        self._pauses = Pauses(SHORTEST, LOOK)

    def __call__(self, seconds: float) -> None:
        """Pause for at most this time."""
        if seconds < LOOK:
            self._pauses.message_arrived()
        time.sleep(min(seconds, self._pauses.seconds))


def main() -> None:
    """Run the SuperNode with Flower's arguments."""
    flower_internals.use_supernode_sleep(Sleep())
    flower_supernode()


if __name__ == "__main__":
    main()
