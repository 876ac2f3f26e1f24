"""Models at home of one institution or of several, own ones under DP among them."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from client import private_home
from client.alone_models import AloneModel
from client.cohort import answer, attempt
from client.home_models import Choice, Home, HomeModels, PrivateOwn, Setting
from client.institution import Institution
from fedlora import processors
from fedlora.config.config import RunConfig
from fedlora.data import records
from fedlora.errors import Refusal
from fedlora.models import trainable
from fedlora.wire.messages import ClientUpdate, EvaluateOrder, Evaluation, TrainOrder

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
    its institution before its first step, and after the model alone is there: no charge is lost to
    a model alone that cannot be trained.

    Args:
        members: Number -> institution.

    Returns:
        Number -> the models, or an error: of a ledger that refuses (``budget-exhausted``,
        ``ledger-*``), of limits (``epsilon-too-large``, ``delta-too-large``), of a guard
        (``guard-*``), or of training.
    """
    if any(one.institution.config.home.private for one in members.values()):
        return _train_privately(members)
    return _together(members, Institution.models_at_home)


def _member(institution: Institution, order: EvaluateOrder) -> Member:
    home = institution.home(institution.released(order))
    return Member(institution=institution, run=order.run, home=home)


def _train_privately(members: Mapping[int, Member]) -> dict[int, HomeModels | Exception]:
    """Models alone, and own models under DP. No record chooses their steps, rate or weight."""
    outcomes: dict[int, HomeModels | Exception] = {}
    calls: dict[int, tuple[Institution, TrainOrder]] = {}
    for number, member in members.items():
        call = attempt(_private_call, member)
        if isinstance(call, Exception):
            outcomes[number] = call
        else:
            calls[number] = call
    alone: dict[int, AloneModel] = {}
    made = _together({number: members[number] for number in calls}, Institution.models_alone)
    for number, model in made.items():
        if isinstance(model, Exception):
            outcomes[number] = model
            del calls[number]
        else:
            alone[number] = model
    for number, update in zip(calls, answer(list(calls.values())), strict=True):
        outcomes[number] = (
            update
            if isinstance(update, Exception)
            else attempt(_private_models, members[number], alone[number], update)
        )
    return outcomes


def _private_models(member: Member, alone: AloneModel, update: ClientUpdate) -> HomeModels:
    """The models, with the ledger's spending of now: a stored answer has that of its day."""
    assert update.privacy is not None
    with member.institution.open_ledger() as ledger:
        privacy = dataclasses.replace(
            update.privacy,
            ledger_epsilon=ledger.spent(),
            ledger_epsilon_alone=ledger.spent_alone(),
            ledger_limit=ledger.max_epsilon,
        )
        charged = member.run in ledger.runs()
    home = member.institution.config.home
    own = PrivateOwn(run=member.run, privacy=privacy, run_charged=charged)
    return HomeModels(
        alone=alone.adapter,
        own=member.home.shared.updated(update.adapter),
        choice=Choice(
            alone=alone.setting,
            own=Setting(home.steps, home.private_learning_rate),
            weight=1.0,
            held_back=alone.held_back,
        ),
        private=own,
    )


def _private_call(member: Member) -> tuple[Institution, TrainOrder]:
    """The institution in the round that trains its own model under DP, and the round's order.

    Raises:
        Refusal: Before anything is trained or charged; ``budget-exhausted`` if too little is left.
    """
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
    private = dataclasses.replace(institution, config=config, rank=config.adapter.rank)
    try:
        planning = private.plan_round(private.accept(order))
    except Refusal as refusal:
        raise _of_own_model(refusal, config) from None
    with planning as planned:
        ledger = planned.ledger
        if not ledger.fits(planned.plan.events, order.run):
            raise Refusal(
                "budget-exhausted",
                f"the ledger allows epsilon {ledger.max_epsilon:g} at delta {ledger.delta:g}; "
                f"{ledger.spent():.4g} is spent, and an own model at epsilon "
                f"{config.privacy.epsilon:g} does not fit beside it; lower home.epsilon "
                "(--epsilon), or train without it",
            )
    return private, order


def _of_own_model(refusal: Refusal, config: RunConfig) -> Refusal:
    """A refusal of an own model's plan, with what the institution can do: the run is over."""
    remedies = {
        "delta-too-large": "its delta is the ledger's; raise max-delta, or train without DP",
        "epsilon-too-large": "lower home.epsilon (--epsilon), or raise max-run-epsilon",
    }
    if refusal.code not in remedies:
        return refusal
    return Refusal(
        refusal.code,
        f"an own model at epsilon {config.privacy.epsilon:g} and delta {config.privacy.delta:g} is "
        f"beyond this institution's limits: {remedies[refusal.code]}",
    )


_Made = TypeVar("_Made")


def _together(
    members: Mapping[int, Member], make: Callable[[Institution, Sequence[Home]], list[_Made]]
) -> dict[int, _Made | Exception]:
    """What ``make`` trains of institutions, each by itself where training together failed."""
    if not members:
        return {}
    first = next(iter(members.values())).institution
    made = attempt(make, first, [one.home for one in members.values()])
    if not isinstance(made, Exception):
        return dict(zip(members, made, strict=True))
    if len(members) == 1:
        return dict.fromkeys(members, made)
    log.error("training %d institutions at home together failed", len(members), exc_info=made)
    found: dict[int, _Made | Exception] = {}
    for number, one in members.items():
        found |= _together({number: one}, make)
    return found
