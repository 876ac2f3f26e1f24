"""The replies of one round, in the order of arrival; each is checked on its own."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import Refusal
from fedlora.wire import wire
from fedlora.wire.messages import ClientUpdate
from server.exchange import MALFORMED_REPLY, TIMEOUT, WORKER_DIED, receive
from server.spending import Spending
from strategies import base
from strategies.base import Round, Weighted

log = logging.getLogger("fedlora.server")

AWAY = "node-unavailable"
"""The code of an institution that went offline before it answered."""
NO_ANSWER = "no-answer"
SILENT = ("message-lost", "reply-lost", NO_ANSWER)
"""The codes of an institution that is online and let an order's time pass."""
RECORD_DEPENDENT = (
    *("guard", "failed", "timed-out", "client-raised", "client-crashed", "worker-died", "timeout"),
    *SILENT,
)
"""Codes of failures that may depend on an institution's records: what the training met, how long it
took, whether it ended."""
FLOWER_ERRORS = {
    1: "load-error",
    2: "client-raised",
    3: "message-lost",
    4: "reply-lost",
    5: AWAY,
    8: "client-crashed",
    WORKER_DIED: "worker-died",
    TIMEOUT: "timeout",
    MALFORMED_REPLY: "malformed-message",
}


class Replies:
    """The valid updates of a round with their weights, for one iteration, and notes on all replies.

    Args:
        grid: The Grid that reaches the institutions.
        orders: What `exchange.send` returned for the round's orders.
        names: Node -> institution.
        this_round: The round that the replies must fit.
        report: The figures that the orders ask for.
        spending: The possible spending of an institution; None without DP.
        timeout: Seconds without any reply after which the server stops waiting.

    Attributes:
        valid: The number of valid updates so far.
        invalid: Institutions whose reply does not count for a reason that may depend on their
            records: an invalid update, or one of `RECORD_DEPENDENT`.
        failed: Institution -> reason.
        received: Institution -> bytes of its adapter.
        privacy: Institution -> the spending that it reported, also with an invalid update.
        reported: Institution -> the figures that the order asked for.
    """

    def __init__(
        self,
        grid: Grid,
        orders: dict[str, Message],
        names: Mapping[int, str],
        this_round: Round,
        *,
        report: Sequence[str],
        spending: Spending | None,
        timeout: float,
    ) -> None:
        self._grid, self._orders, self._names = grid, orders, names
        self._round, self._report = this_round, frozenset(report)
        self._spending, self._timeout = spending, timeout
        self.valid = 0
        self.invalid: set[str] = set()
        self.failed: dict[str, str] = {}
        self.received: dict[str, int] = {}
        self.privacy: dict[str, dict[str, Any]] = {}
        self.reported: dict[str, dict[str, float]] = {}

    def __iter__(self) -> Iterator[Weighted]:
        for node, reply in receive(self._grid, self._orders, self._timeout):
            name = self._names[node]
            try:
                update = self._accepted(name, reply)
            except Refusal as refusal:
                if refusal.code in RECORD_DEPENDENT:
                    self.invalid.add(name)
                self.failed[name] = refusal.code
                log.warning("round %d, %s: %s", self._round.number, name, refusal)
                continue
            del reply  # the update holds the adapter, or a view of its file
            yield update, self._round.weight(update)
            del update

    def restore(self, valid: int, privacy: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the notes of an earlier process of the run, which had these replies."""
        self.valid = valid
        self.privacy |= {name: dict(spent) for name, spent in privacy.items()}

    def _accepted(self, name: str, reply: Message | None) -> ClientUpdate:
        message = content(reply)
        self.received[name] = wire.adapter_bytes(message)
        try:
            update = wire.unpack_update(message)
        finally:
            wire.drop_arrays(message)
        self.invalid.add(name)  # until the update is found to be valid
        base.check_header(update, institution=name, this_round=self._round)
        self._record_privacy(name, update)
        base.validate(update, institution=name, this_round=self._round)
        self._check_figures(update.metrics)
        self.invalid.discard(name)
        self.valid += 1
        if update.metrics:
            self.reported[name] = dict(update.metrics)
        return update

    def _record_privacy(self, name: str, update: ClientUpdate) -> None:
        """Keep the reported spending if it is possible, also with an invalid update."""
        if self._spending is None:
            if update.privacy is not None:
                raise Refusal("invalid-privacy-record", "DP is off, so nothing was spent")
            return
        if update.privacy is None:
            raise Refusal(
                "no-privacy-record", "DP is on, but the update does not state its spending"
            )
        by_class = self._round.weighting == "public-size"
        size = self._round.sizes.get(name, update.size)
        self._spending.checked(update.privacy, size if by_class else None)
        self.privacy[name] = dataclasses.asdict(update.privacy)

    def _check_figures(self, figures: Mapping[str, float]) -> None:
        if extra := sorted(set(figures) - self._report):
            raise Refusal(
                "invalid-metrics",
                f"it sends {extra[0][:80]!r} ({len(extra)} in all), which no order asked for",
            )
        for name, value in figures.items():
            if not math.isfinite(value):
                raise Refusal("invalid-metrics", f"{name} is {value}, not a finite number")


def content(reply: Message | None) -> RecordDict:
    """The records of a reply.

    Raises:
        Refusal: When no reply arrived, or Flower reports an error in its place.
    """
    if reply is None:
        raise Refusal(NO_ANSWER, "nothing arrived in time")
    if reply.has_error():
        # A reason may quote an institution's records: only the number is kept.
        raise Refusal(
            FLOWER_ERRORS.get(reply.error.code, f"error-{reply.error.code}"),
            "Flower reports an error",
        )
    return reply.content
