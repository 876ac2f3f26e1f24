"""The released adapter of a deployed run, for the institutions' own use."""

from collections.abc import Mapping

from flwr.serverapp import Grid

from fedlora import wire
from fedlora.messages import Release
from server.answers import ask


def send(
    grid: Grid, release: Release, nodes: Mapping[int, str], timeout: float, patience: float
) -> dict[str, str]:
    """Send the released adapter to the institutions that are online.

    Args:
        grid: To the institutions.
        release: The adapter and its run.
        nodes: Node -> institution.
        timeout: Seconds that one institution may take.
        patience: Seconds without any reply after which the server stops waiting.

    Returns:
        Institution -> ``stored``, or the code of the reason why it has no adapter.
    """
    stored, failed = ask(
        grid,
        release,
        wire.RELEASED,
        nodes,
        lambda name, answer: "stored",
        failure="did not store the released adapter",
        timeout=timeout,
        patience=patience,
    )
    return stored | failed
