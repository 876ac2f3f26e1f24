"""One order to several institutions outside of rounds, and an answer from each."""

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlora.config.config import RunConfig
from fedlora.errors import Refusal
from fedlora.wire import wire
from fedlora.wire.messages import EvaluateOrder, Evaluation, Release
from server.exchange import exchange
from server.replies import content
from server.roster import patience

log = logging.getLogger("fedlora.server")
_T = TypeVar("_T")
FAILURES = {
    MessageType.EVALUATE: "was not evaluated",
    wire.HOME: "trained no model at home",
    wire.RELEASED: "did not store the released adapter",
}
"""What a refused answer to a message of each type means for the institution."""


def ask(
    grid: Grid,
    config: RunConfig,
    order: EvaluateOrder | Release,
    message_type: str,
    nodes: Mapping[int, str],
    read: Callable[[str, Evaluation], _T],
    *,
    timeout: float = 0.0,
    rows: int = 0,
) -> tuple[dict[str, _T], dict[str, str]]:
    """Send an order to institutions and read their answers. One bad answer spoils no other.

    Args:
        grid: The Grid that reaches the institutions.
        config: The run.
        order: The order; its adapter is packed once.
        message_type: Flower's type of the messages.
        nodes: Node -> institution.
        read: Makes the result of an institution's name and answer; may raise `Refusal`.
        timeout: Seconds that one institution may take; 0: those of a round.
        rows: The most rows of which an answer has the predictions.

    Returns:
        Institution -> its result, and institution -> the code of its refusal.
    """
    packed = wire.pack_order(order, wire.pack_adapter(order.adapter))
    group, ttl = str(order.round), timeout or config.federation.timeout
    messages = [Message(packed, node, message_type, group_id=group, ttl=ttl) for node in nodes]
    del packed  # `exchange` drops the messages once they are sent
    results: dict[str, _T] = {}
    failed: dict[str, str] = {}
    for node, reply in exchange(grid, messages, patience(config, ttl)):
        name = nodes[node]
        try:
            answer = wire.unpack_evaluation(content(reply), rows)
            if answer.institution != name:
                raise Refusal("wrong-institution", f"{name} answered as {answer.institution}")
            results[name] = read(name, answer)
        except Refusal as refusal:
            failed[name] = refusal.code
            log.warning("%s %s: %s", name, FAILURES[message_type], refusal)
    return results, dict(sorted(failed.items()))
