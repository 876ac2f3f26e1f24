"""Several orders in one call, as an engine of a simulation gives them.

Institutions that follow equal orders under DP train in shared passes. Each has its own records,
ledger, sampling, clipped sum and noise; they share the base model's arithmetic only.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from client.institution import Institution
from client.private_round import PrivateRound, Trained, train_rounds
from fedlora import processors
from fedlora.wire.messages import ClientUpdate, TrainOrder

log = logging.getLogger("fedlora.client")
Outcome = ClientUpdate | Exception
_P = ParamSpec("_P")
_T = TypeVar("_T")


def answer(calls: Sequence[tuple[Institution, TrainOrder]]) -> list[Outcome]:
    """Answer every order exactly as `Institution.answer` would.

    A round whose shared training fails is trained again alone: its charge is in the ledger, so it
    runs under the same key, as the same release. An institution's second order of one call waits
    for the first one's answer.

    Args:
        calls: Institutions and their orders.

    Returns:
        An update or an error for each call.
    """
    outcomes: dict[int, Outcome] = {}
    charged: dict[int, PrivateRound] = {}
    with contextlib.ExitStack() as ledgers:
        begun: set[Path] = set()
        for number, (institution, order) in enumerate(calls):
            started = attempt(_charge, institution, order, begun, ledgers)
            if isinstance(started, PrivateRound):
                charged[number] = started
            elif started is not None:
                outcomes[number] = started
        for number, trained in _train(charged).items():
            institution, _ = calls[number]
            outcomes[number] = attempt(_finish, institution, charged[number], trained)
    for number, (institution, order) in enumerate(calls):
        if number not in outcomes:
            outcomes[number] = attempt(institution.answer, order)
    return [outcomes[number] for number in range(len(calls))]


def _charge(
    institution: Institution,
    order: TrainOrder,
    begun: set[Path],
    ledgers: contextlib.ExitStack,
) -> PrivateRound | ClientUpdate | None:
    """Plan and charge a round that can share passes.

    Args:
        institution: The institution.
        order: Its order.
        begun: Ledgers of the rounds that this call charged.
        ledgers: Closes the round's ledger.

    Returns:
        The charged round, the stored answer of a round that was answered before, or None for a
        round that is answered alone.
    """
    if institution.ledger_path in begun or not institution.can_share(order):
        return None
    planned = ledgers.enter_context(institution.plan_round(institution.accept(order)))
    update = planned.charge()
    if update is not None:
        return institution.store_local_parts(order, update)
    begun.add(institution.ledger_path)
    return planned


def _train(charged: Mapping[int, PrivateRound]) -> dict[int, Trained]:
    """The outcomes of training, equal orders in shared passes; none where training failed."""
    cohorts: dict[str, list[int]] = {}
    for number, planned in charged.items():
        cohorts.setdefault(planned.training_digest, []).append(number)
    outcomes: dict[int, Trained] = {}
    for numbers in cohorts.values():
        cohort = [charged[number] for number in numbers]
        try:
            with processors.threads(cohort[0].config.engine.threads):
                trained = train_rounds(cohort)
        except Exception:  # each institution then trains alone, which shows the one that fails
            log.exception("training %d institutions together failed", len(cohort))
            continue
        outcomes |= zip(numbers, trained, strict=True)
    return outcomes


def _finish(institution: Institution, planned: PrivateRound, trained: Trained) -> ClientUpdate:
    return institution.store_local_parts(planned.order, planned.store_answer(trained))


def attempt(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | Exception:
    """The result of a call, or its error: one institution's error ends no other's round."""
    try:
        return work(*args, **kwargs)
    except Exception as error:
        return error
