"""Bounds beyond which a run does not start or does not continue."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.models.adapters import PARTS, AdapterState
from server.replies import AWAY, SILENT
from server.roster import LEAST, RunFailed, reasons
from strategies import base
from strategies.base import Round

MAX_IDLE_ROUNDS = 3
"""Rounds in a row that change nothing, and are charged, after which a run ends."""
OTHER_REPLY_BYTES = 16 * 2**20
"""The most bytes of a reply beside its vector: names, shapes, figures."""


def most_reply_bytes(adapter: AdapterState) -> int:
    """The most bytes of a reply in a deployment: a 64-bit word for each value, and the rest."""
    return 8 * sum(tensor.numel() for tensor in adapter.values()) + OTHER_REPLY_BYTES


def check_online(online: Mapping[str, int], least: int, left_out: Mapping[int, str]) -> None:
    """End a run, before any institution pays for a round, when too few are there to change it.

    Args:
        online: Institution -> node.
        least: The least number of institutions with which a round can count.
        left_out: Node -> the code why it takes no part.

    Raises:
        RunFailed: Naming both numbers.
    """
    if len(online) < least:
        others = f"; of others: {reasons(left_out)}"
        raise RunFailed(
            f"{len(online)} institutions are online and take part, and a round needs {least} "
            f"({LEAST}){others * bool(left_out)}; resume the run when more are back. The last "
            "checkpoint is kept"
        )


def check_adapter(adapter: AdapterState, this_round: Round, *, residuals: bool) -> None:
    """Refuse a global adapter of a server optimizer on which no update can be valid.

    Args:
        adapter: The new global adapter.
        this_round: The round of the adapter.
        residuals: Whether the strategy puts residuals into it.

    Raises:
        RunFailed: If its shapes changed, or a value is beyond the limit of updates.
    """
    number = this_round.number
    if problem := adapter.validate_against(this_round.before, residual=residuals):
        raise RunFailed(
            f"round {number}: the server optimizer left {problem}; lower "
            "federation.server-learning-rate. The last checkpoint is kept"
        )
    if (largest := base.largest(adapter.only(PARTS))) > base.MAX_VALUE:
        raise RunFailed(
            f"round {number}: the global adapter reached {largest:g}, and above "
            f"{base.MAX_VALUE:g} no update counts; lower federation.server-learning-rate, or "
            "training.learning-rate. The last checkpoint is kept"
        )


def is_idle(record: Mapping[str, Any]) -> bool:
    """Whether a round changed nothing, and the next one could do no better by asking others.

    Args:
        record: The round's line of ``rounds.jsonl``.
    """
    return record["skipped"] and (record["all_asked"] or not record["updates"])


def idle_rounds(records: Sequence[Mapping[str, Any]]) -> int:
    """The number of idle rounds at the end of a run that goes on.

    Institutions were charged for them, so a new process of the server must not begin to count anew.

    Args:
        records: The lines of ``rounds.jsonl``.
    """
    return sum(1 for _ in itertools.takewhile(is_idle, reversed(records)))


def check_progress(record: Mapping[str, Any], idle_rounds: int, *, last: bool) -> None:
    """End a run whose rounds change nothing.

    The first round that nobody answered, not even with a refusal, ends no run: the next one waits
    until institutions are back.

    Args:
        record: The round's line of ``rounds.jsonl``.
        idle_rounds: Rounds in a row that changed nothing, with this one. Where a run samples
            institutions, rounds with a valid update do not count: the next one asks others.
        last: Whether the run has no further round.

    Raises:
        RunFailed: After `MAX_IDLE_ROUNDS`, unless updates arrived and no round is left to save;
            after one round that asked all institutions and has no valid update.
    """
    aggregation, updates = record["aggregation"], record["updates"]
    rejected: dict[str, str] = aggregation["rejected"]
    refused = aggregation.get("refused", "")
    away = bool(rejected) and {AWAY, *SILENT}.issuperset(rejected.values())
    hopeless = record["all_asked"] and not updates and not away
    tired = idle_rounds >= MAX_IDLE_ROUNDS and not (updates and last)
    if not idle_rounds or not (hopeless or tired):
        return
    diverged = "too-large" in {refused, *rejected.values()}
    if updates:
        why = f"their aggregate was refused: {refused}" if refused else "a round needs more"
        what = (
            f"{idle_rounds} rounds in a row changed nothing, here {updates} of {record['asked']} "
            f"updates counted ({why})" + f"; others: {reasons(rejected)}" * bool(rejected)
        )
    else:
        what = f"no institution sent a valid update ({reasons(rejected)})"
    raise RunFailed(
        f"round {record['round']}: {what}; "
        + ("training diverged: lower the learning rates; " if diverged else "")
        + "the last checkpoint is kept"
    )
