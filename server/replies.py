"""The answers of one round as they arrive: each is checked by itself, the valid ones go on."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlora import wire
from fedlora.errors import Refusal
from server.exchange import exchange
from strategies import base
from strategies.base import Round, Weighted

log = logging.getLogger("fedlora.server")

OF_RECORDS = ("guard", "failed")
"""Refusals that may depend on an institution's records."""
FLOWER_ERRORS = {
    1: "load-error",
    2: "client-raised",
    3: "message-lost",
    4: "reply-lost",
    5: "node-unavailable",
    8: "client-crashed",
    100: "worker-died",
    101: "timeout",
}


class Replies:
    """Iterate once for the valid updates with their weights; the book of all answers stays.

    Args:
        grid: To the institutions.
        orders: One message each.
        names: Node -> institution.
        round: What the answers must fit.
        epsilon: The most that an institution may have spent; inf: no DP, and none need say.
        timeout: Seconds without any answer after which nobody is waited for.

    Attributes:
        valid: How many updates counted so far.
        invalid: Institutions that answered with something that their records may have decided and
            that does not count: an invalid update, or the news that a guard tripped.
        failed: Institution -> reason.
        received: Institution -> bytes of its adapter.
        privacy: Institution -> what it says it has spent, also where the update does not count.
        reported: Institution -> the figures that the order asked for.
    """

    def __init__(
        self,
        grid: Grid,
        orders: list[Message],
        names: Mapping[int, str],
        round: Round,
        *,
        epsilon: float,
        timeout: float,
    ) -> None:
        self._grid, self._orders, self._names = grid, orders, names
        self._round, self._epsilon, self._timeout = round, epsilon, timeout
        self.valid = 0
        self.invalid: set[str] = set()
        self.failed: dict[str, str] = {}
        self.received: dict[str, int] = {}
        self.privacy: dict[str, dict[str, Any]] = {}
        self.reported: dict[str, dict[str, float]] = {}

    def __iter__(self) -> Iterator[Weighted]:
        for node, reply in exchange(self._grid, self._orders, self._timeout):
            name = self._names[node]
            try:
                update = self._accepted(name, reply)
            except Refusal as refusal:
                self.failed[name] = refusal.code
                log.warning("round %d, %s: %s", self._round.number, name, refusal)
                continue
            del reply  # its adapter is in memory of its own
            yield update, self._round.weight(update)
            del update

    def _accepted(self, name: str, reply: Message | None) -> wire.ClientUpdate:
        message = content(reply)
        self.received[name] = wire.adapter_bytes(message)
        try:
            update = wire.unpack_update(message)
        except Refusal as refusal:
            if refusal.code in OF_RECORDS:
                self.invalid.add(name)
            raise
        self.invalid.add(name)  # until it is found to be valid
        if update.privacy is not None and update.institution == name:
            self.privacy[name] = dataclasses.asdict(self._possible(update.privacy))
        base.validate(update, institution=name, round=self._round)
        if self._epsilon < math.inf and update.privacy is None:
            raise Refusal(
                "no-privacy-record", "DP is on, but the update does not say what was spent"
            )
        self.invalid.discard(name)
        self.valid += 1
        if update.metrics:
            self.reported[name] = dict(update.metrics)
        return update

    def _possible(self, privacy: wire.PrivacySpent) -> wire.PrivacySpent:
        most = self._epsilon * (1 + 1e-6)
        if not (0 <= privacy.epsilon <= most and 0 <= privacy.delta < 1):  # nor NaN
            raise Refusal(
                "invalid-privacy-record",
                f"it says that epsilon {privacy.epsilon:g} at delta {privacy.delta:g} was spent",
            )
        return privacy


def content(reply: Message | None) -> RecordDict:
    """What a node sent.

    Raises:
        Refusal: When it sent nothing, or Flower reports an error in its place.
    """
    if reply is None:
        raise Refusal("no-answer", "nothing arrived in time")
    if reply.has_error():
        # reasons may quote what the institution holds: only the number is kept
        raise Refusal(
            FLOWER_ERRORS.get(reply.error.code, f"error-{reply.error.code}"),
            "Flower reports an error",
        )
    return reply.content
