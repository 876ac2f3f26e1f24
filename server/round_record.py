"""A round's orders and outcome, and its line of ``rounds.jsonl``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from server.aggregation import Aggregated, Aggregation, Report
from server.run_directory import RunState
from strategies.base import Round


@dataclass(frozen=True, kw_only=True)
class Orders:
    """The orders of one round, which were sent.

    Args:
        started: When the round began, by ``time.monotonic``.
        this_round: The round.
        names: Node -> institution.
        report: The figures that the orders ask for.
        waiting: Message id -> message without content, of those sent.
        sent: Institution -> bytes of the adapter in its order.
        all_asked: Whether all that are online were asked.
        under_dp: Whether records have a budget.
    """

    started: float
    this_round: Round
    names: Mapping[int, str]
    report: Sequence[str]
    waiting: dict[str, Message]
    sent: Mapping[str, int]
    all_asked: bool
    under_dp: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a round's aggregation.

    Args:
        aggregated: The aggregated adapter.
        report: What may be said of the replies.
        skipped: Whether the round changes nothing.
        refused: The code of the reason why the aggregate was refused; empty where it was not.
        privacy: Institution -> the spending that it reported.
        reported: Institution -> the figures that the orders asked for.
    """

    aggregated: Aggregated
    report: Report
    skipped: bool
    refused: str
    privacy: Mapping[str, Mapping[str, Any]]
    reported: Mapping[str, Mapping[str, float]]


def line(
    orders: Orders,
    outcome: Outcome,
    state: RunState,
    aggregation: Aggregation,
    measured: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """A round's line of ``rounds.jsonl``.

    Args:
        orders: Its orders.
        outcome: Its outcome.
        state: The state after it.
        aggregation: Decides which figures of institutions may be recorded.
        measured: The figures on held-out rows; empty where the round was not evaluated.
        seconds: The time that it took.
    """
    report = outcome.report
    rejected = {**report.rejected, **outcome.aggregated.rejected}
    aggregated: dict[str, Any] = {"rejected": dict(sorted(rejected.items()))}
    if outcome.refused:
        aggregated["refused"] = outcome.refused
    known = {"epsilon": aggregation.epsilons(state), "accuracy": measured.get("institutions", {})}
    return {
        "round": state.round,
        "seconds": round(seconds, 4),
        "asked": len(orders.names),
        "updates": report.updates,
        "skipped": outcome.skipped,
        "aggregation": aggregated,
        "metrics": {k: v for k, v in measured.items() if k != "institutions"},
        "epsilon_max": aggregation.largest_epsilon(state) if orders.under_dp else "inf",
        **aggregation.round_record(state),
        "institutions": {
            name: {"sent": orders.sent[name], "received": report.received.get(name, 0)}
            | {key: of[name] for key, of in known.items() if name in of}
            for name in orders.names.values()
        },
        "reported": dict(sorted(outcome.reported.items())),
        "all_asked": orders.all_asked,
    }
