"""Models at home of one institution or of several: own ones under DP first, then all others."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from client import private_home
from client.cohort import answer, attempt
from client.home_models import Home, HomeModels, PrivateOwn
from client.institution import Institution
from fedlora import processors, records, trainable
from fedlora.messages import ClientUpdate, EvaluateOrder, Evaluation, TrainOrder

log = logging.getLogger("fedlora.client")


@dataclass(frozen=True, kw_only=True)
class Member:
    """An institution whose models are trained.

    Args:
        institution: The institution.
        run: The run that released the shared adapter.
        home: Its records and the shared adapter.
    """

    institution: Institution
    run: str
    home: Home


def compare_at_home(
    calls: Sequence[tuple[Institution, EvaluateOrder]],
) -> list[Evaluation | Exception]:
    """Train the models of institutions at home, in shared passes, and evaluate them.

    Args:
        calls: Institutions of one run and their orders.

    Returns:
        An evaluation or an error for each call.
    """
    outcomes: dict[int, Evaluation | Exception] = {}
    members: dict[int, Member] = {}
    for number, (institution, order) in enumerate(calls):
        found = attempt(_member, institution, order)
        if isinstance(found, Exception):
            outcomes[number] = found
        else:
            members[number] = found
    for number, made in train(members).items():
        one = members[number]
        outcomes[number] = (
            made
            if isinstance(made, Exception)
            else attempt(one.institution.compare, one.home.shared, made)
        )
    return [outcomes[number] for number in range(len(calls))]


def train(members: Mapping[int, Member]) -> dict[int, HomeModels | Exception]:
    """Train the models of institutions of one run.

    With a finite ``home.epsilon`` own models are trained under DP. Each is charged to the ledger of
    its institution before its first step.

    Args:
        members: Number -> institution.

    Returns:
        Number -> the models, or an error: of a ledger that refuses (``budget-exhausted``,
        ``ledger-*``), of limits (``epsilon-too-large``, ``delta-too-large``), of a guard
        (``guard-*``), or of training.
    """
    failed: dict[int, HomeModels | Exception] = {}
    ready = dict(members)
    private = {n: one for n, one in members.items() if one.institution.config.home.private}
    for number, own in _train_privately(private).items():
        if isinstance(own, Exception):
            failed[number] = own
            del ready[number]
        else:
            one = members[number]
            ready[number] = dataclasses.replace(one, home=dataclasses.replace(one.home, own=own))
    return failed | _train_without_dp(ready)


def _member(institution: Institution, order: EvaluateOrder) -> Member:
    home = institution.home(institution.released(order))
    return Member(institution=institution, run=order.run, home=home)


def _train_privately(members: Mapping[int, Member]) -> dict[int, PrivateOwn | Exception]:
    """Own models under DP. No record chooses steps, rate or weight."""
    outcomes: dict[int, PrivateOwn | Exception] = {}
    calls: dict[int, tuple[Institution, TrainOrder]] = {}
    for number, member in members.items():
        call = attempt(_private_call, member)
        if isinstance(call, Exception):
            outcomes[number] = call
        else:
            calls[number] = call
    for number, update in zip(calls, answer(list(calls.values())), strict=True):
        if isinstance(update, Exception):
            outcomes[number] = update
            continue
        outcomes[number] = attempt(_private_own, members[number], update)
    return outcomes


def _private_own(member: Member, update: ClientUpdate) -> PrivateOwn:
    """The trained model, with the ledger's spending of now: a stored answer has that of its day."""
    assert update.privacy is not None
    with member.institution.open_ledger() as ledger:
        privacy = dataclasses.replace(
            update.privacy, ledger_epsilon=ledger.spent(), ledger_limit=ledger.max_epsilon
        )
        alone, charged = ledger.spent_alone(), member.run in ledger.runs()
    return PrivateOwn(
        run=member.run,
        adapter=member.home.shared.updated(update.adapter),
        privacy=privacy,
        ledger_alone=alone,
        run_charged=charged,
    )


def _private_call(member: Member) -> tuple[Institution, TrainOrder]:
    """The institution in the round that trains its own model under DP, and the round's order."""
    institution, shared = member.institution, member.home.shared
    with institution.open_ledger() as ledger:
        delta, accountant = ledger.delta, ledger.accountant
    config = private_home.config_at_home(
        institution.config,
        delta=delta,
        accountant=accountant,
        residual_rank=private_home.residual_rank(shared),
    )
    with processors.threads(config.engine.threads):
        labels = records.load(institution.config).labels
        work = trainable.load(institution.config, labels)
    order = private_home.order_at_home(config, member.run, work.base.digest, shared)
    return dataclasses.replace(institution, config=config, rank=config.adapter.rank), order


def _train_without_dp(members: Mapping[int, Member]) -> dict[int, HomeModels | Exception]:
    """The other models, each institution's alone where training together failed."""
    if not members:
        return {}
    together = next(iter(members.values())).institution
    made = attempt(together.models_at_home, [one.home for one in members.values()])
    if not isinstance(made, Exception):
        return dict(zip(members, made, strict=True))
    if len(members) == 1:
        return dict.fromkeys(members, made)
    log.error("training %d institutions at home together failed", len(members), exc_info=made)
    found: dict[int, HomeModels | Exception] = {}
    for number, one in members.items():
        found |= _train_without_dp({number: one})
    return found
