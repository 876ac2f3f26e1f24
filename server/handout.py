"""The released adapter of a deployed run, for the institutions' own use."""

import logging
from collections.abc import Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora import wire
from fedlora.errors import Refusal
from fedlora.messages import Release
from server.exchange import exchange
from server.replies import content

log = logging.getLogger("fedlora.server")


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
    packed = wire.pack_order(release, wire.pack_adapter(release.adapter))
    messages = [
        Message(packed, node, wire.RELEASED, group_id="released", ttl=timeout) for node in nodes
    ]
    outcomes: dict[str, str] = {}
    for node, reply in exchange(grid, messages, patience):
        name = nodes[node]
        try:
            answer = wire.unpack_evaluation(content(reply))
            if answer.institution != name:
                raise Refusal("wrong-institution", f"{name} answered as {answer.institution}")
            outcomes[name] = "stored"
        except Refusal as refusal:
            outcomes[name] = refusal.code
            log.warning("%s did not store the released adapter: %s", name, refusal)
    return outcomes
