"""How an institution answers an order: its own records, its own budget, its own refusals.

The order of events is what the privacy claim rests on: plan, *charge*, train, *store the answer*,
send. Whatever is killed in between, the ledger never says less than what was released
(docs/threat-model.md).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from client import training
from client.ledger import Ledger
from client.personal import Personal
from client.settings import Settings
from fedlora import accounting, trainable, wire
from fedlora.adapters import RESIDUAL_A, AdapterState
from fedlora.budget import Budget, budget, delta_of
from fedlora.config import RunConfig
from fedlora.errors import Refusal
from fedlora.shards import Shard
from fedlora.streams import RandomSource

ADAM_EPS = 1e-8
"""What torch's Adam adds to the root of its second moment."""


@dataclass(frozen=True, kw_only=True)
class Institution:
    """One institution as its own machine knows it.

    Args:
        name: Its name in the federation.
        index: Its number in the partition.
        ledger: Path of its privacy ledger.
        own: Directory of what it keeps of its adapter.
        rank: Of its factors.
        report: Figures that may leave where DP is off.
        max_delta: Largest delta of a run.
        max_run_epsilon: Most epsilon of a run, at the ledger's delta.
        simulated: Whether one experimenter is every institution.
    """

    name: str
    index: int
    ledger: Path
    own: Path
    rank: int
    report: tuple[str, ...] = ("loss", "records")
    max_delta: float = 1.0
    max_run_epsilon: float = math.inf
    simulated: bool = True


def locate(config: RunConfig, index: int) -> Institution:
    """The institution with this number in a simulation."""
    name = trainable.records(config).names[index]
    directory = Path(config.privacy.ledger or Path(config.run_dir) / "ledgers")
    return Institution(
        name=name,
        index=index,
        ledger=directory / f"{name}.db",
        own=Path(config.run_dir) / "institutions" / name,
        rank=_ranks(config)[index],
    )


def deployed(settings: Settings, config: RunConfig) -> Institution:
    """The institution of these settings on its own machine."""
    return Institution(
        name=settings.name,
        index=0,
        ledger=Path(settings.ledger),
        own=Path(settings.state) / "kept",
        rank=settings.rank or config.adapter.rank,
        report=settings.report,
        max_delta=settings.max_delta,
        max_run_epsilon=settings.max_run_epsilon,
        simulated=False,
    )


@functools.lru_cache(maxsize=1)
def _ranks(config: RunConfig) -> list[int]:
    federation = trainable.records(config)
    units = (federation.train(i).num_units for i in range(len(federation.names)))
    return config.adapter.ranks_of([accounting.public_size(count) for count in units])


def open_ledger(
    institution: Institution, config: RunConfig, shard: Shard, *, create: bool
) -> Ledger:
    """The institution's ledger, bound to its records.

    Args:
        institution: Whose.
        config: The run; a new ledger takes its limit and delta from it.
        shard: The records that the ledger is about.
        create: Make it when there is none. Only a simulation does, and only when a run first
            starts.

    Raises:
        Refusal: ``ledger-*`` when it is missing, locked, corrupt, about other records, or reckons
            at a delta that means nothing for so many units.
    """
    units = shard.num_units
    if create and not institution.ledger.exists():
        institution.ledger.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        Ledger.create(
            institution.ledger,
            max_epsilon=config.privacy.max_epsilon or config.privacy.epsilon,
            delta=delta_of(config.privacy, units),
            accountant=config.privacy.accountant,
        )
    ledger = Ledger.open(institution.ledger)
    try:
        most = accounting.most_of_class(units)
        if ledger.delta >= 1 / most:
            raise Refusal(
                "ledger-delta",
                f"{institution.ledger} reckons at delta {ledger.delta:g}; it must be below 1 / "
                f"units ({1 / most:g} for this size class): make another with a smaller --delta",
            )
        ledger.bind(shard.fingerprint(), config.privacy.unit)
    except BaseException:
        ledger.close()
        raise
    return ledger


def check_limits(institution: Institution, ledger: Ledger, plan: Budget) -> None:
    """Refuse a run that promises less than the institution's own limits.

    A run's epsilon means something at its delta only, and the run's delta and accountant are the
    server's choice. So what the whole run may release is converted to epsilon at the ledger's delta
    with the ledger's accountant, which are the institution's choice.

    Raises:
        Refusal: ``delta-too-large`` or ``epsilon-too-large``.
    """
    if plan.plan.delta > institution.max_delta:
        raise Refusal(
            "delta-too-large",
            f"the run has delta {plan.plan.delta:g}, above max-delta ({institution.max_delta:g}); "
            "ask for a smaller privacy.delta, or raise max-delta",
        )
    spent = accounting.epsilon(plan.events, ledger.delta, ledger.accountant)
    if spent > institution.max_run_epsilon:
        raise Refusal(
            "epsilon-too-large",
            f"the run spends epsilon {plan.plan.epsilon:g} at its delta {plan.plan.delta:g}, which "
            f"is {spent:.4g} at the ledger's delta {ledger.delta:g}, above max-run-epsilon "
            f"({institution.max_run_epsilon:g}); ask for a smaller privacy.epsilon or "
            "privacy.delta, or raise max-run-epsilon",
        )


def fits(ledger: Ledger, plan: Budget) -> bool:
    """Whether the whole run fits into what the ledger has left."""
    planned = accounting.epsilon((*ledger.history(), *plan.events), ledger.delta, ledger.accountant)
    return planned <= ledger.max_epsilon


def answer(
    institution: Institution, order: wire.TrainOrder, config: RunConfig
) -> wire.ClientUpdate:
    """Train one round and account for it.

    Raises:
        Refusal: With the code that may leave.
    """
    order = accept(institution, order, config)
    if not config.privacy.enabled:
        return _plain(institution, order, config)
    started = charge(institution, order, config)
    if isinstance(started, wire.ClientUpdate):
        return started
    with started.ledger:
        (trained,) = train_charged([started])
        return release(started, trained)


def accept(institution: Institution, order: wire.TrainOrder, config: RunConfig) -> wire.TrainOrder:
    """Check an order, and put what the institution keeps in the place of what came.

    Returns:
        The order whose adapter is what training starts from: its digest decides the release.

    Raises:
        Refusal: If the order does not fit this configuration, or asks for what may not leave;
            ``kept-part-unreadable``.
    """
    work = _load(config)
    if order.base != work.base.digest:
        raise Refusal(
            "base-mismatch", "the server trains another base model than model.name gives here"
        )
    _check_adapter(institution, order.adapter, config, work)
    check_order(order, config)
    may_leave = () if config.privacy.enabled else institution.report
    if not set(order.report) <= set(may_leave):
        raise Refusal(
            "metrics-not-allowed",
            f"the server asks for {_listed(order.report)}; what may leave is {_listed(may_leave)}",
        )
    if not order.kept:
        return order
    kept = order.adapter.only(order.kept)
    own = _own(institution, order.run, config).latest(order.round, kept)
    return dataclasses.replace(order, adapter=order.adapter.updated(own))


def check_order(order: wire.TrainOrder, config: RunConfig) -> None:
    """Refuse rounds that the run does not have, and parts that its strategy does not train.

    Raises:
        Refusal: ``malformed-message`` or ``strategy-mismatch``.
    """
    rounds, strategy = config.federation.rounds, config.federation.strategy
    traits = config.federation.traits
    for name, value in (("round", order.round), ("participations", order.participations)):
        if not 1 <= value <= rounds:
            raise Refusal(
                "malformed-message",
                f"the order's {name} is {value}; it must be from 1 to federation.rounds ({rounds})",
            )
    parts, kept = traits.parts_sent(order.round), traits.local_parts
    if (order.parts, order.kept) != (parts, kept):
        raise Refusal(
            "strategy-mismatch",
            f"the order asks for {_listed(order.parts)} and lets the institution keep "
            f"{_listed(order.kept)}; under {strategy} an institution sends {_listed(parts)} in "
            f"round {order.round} and keeps {_listed(kept)}",
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _check_adapter(
    institution: Institution,
    adapter: AdapterState,
    config: RunConfig,
    work: trainable.Trainable,
) -> None:
    fitting = work.start.cut(institution.rank)
    problem = adapter.validate_against(fitting, residual=config.federation.traits.residuals)
    most = max((len(t) for name, t in adapter.items() if name.endswith(RESIDUAL_A)), default=0)
    if not problem and most > config.federation.residual_rank:
        problem = f"a residual has rank {most}, above {config.federation.residual_rank}"
    if problem:
        raise Refusal(
            "adapter-mismatch", f"the order's adapter does not fit this configuration: {problem}"
        )


def _load(config: RunConfig) -> trainable.Trainable:
    return trainable.load(config, trainable.records(config).labels)


def _own(institution: Institution, run: str, config: RunConfig) -> Personal:
    return Personal(institution.own, run, config.fingerprint())


def _leaving(
    institution: Institution, order: wire.TrainOrder, config: RunConfig, update: wire.ClientUpdate
) -> wire.ClientUpdate:
    """Keep what stays of a finished round; what is returned may leave."""
    if order.kept:
        _own(institution, order.run, config).keep(order.round, update.adapter.only(order.kept))
    return dataclasses.replace(update, adapter=update.adapter.only(order.parts))


def evaluate(
    institution: Institution, order: wire.EvaluateOrder, config: RunConfig
) -> wire.Evaluation:
    """Judge the institution's own adapter on its held-out rows; save it for PEFT if asked to.

    This is the experimenter's measurement on rows that are set aside, in simulations only.

    Raises:
        Refusal: If the order's adapter does not fit; ``kept-part-unreadable``.
    """
    if not institution.simulated:
        raise Refusal("metrics-not-allowed", "the server asks for metrics of held-out rows")
    work = _load(config)
    _check_adapter(institution, order.adapter, config, work)
    kept = order.adapter.only(config.federation.traits.local_parts)
    own = _own(institution, order.run, config).latest(order.round + 1, kept)
    adapter = order.adapter.updated(own)
    adapter.load_into(work.model)
    if order.save:
        adapter.save(institution.own / "adapter", work.model)
    shard = trainable.records(config).held_out(institution.index)
    measured = work.task.evaluate(work.model, shard, work.labels) if len(shard) else {}
    return wire.Evaluation(institution=institution.name, metrics=measured)


def _plain(
    institution: Institution,
    order: wire.TrainOrder,
    config: RunConfig,
) -> wire.ClientUpdate:
    """A round without DP."""
    work = _load(config)
    shard = trainable.records(config).train(institution.index)
    work.train_only((*order.parts, *order.kept))
    order.adapter.load_into(work.model)
    rate = config.training.sample_rate
    loss = training.train(
        work,
        shard,
        _local_plan(config),
        max(1, round(rate * len(shard))) if rate else config.training.batch_size,
        RandomSource.seeded("train", config.seed, order.round, institution.name),
    )
    known = {"loss": loss, "records": float(len(shard))}
    size = {
        "uniform": 0.0,
        "records": float(len(shard)),
        "public-size": float(accounting.public_size(len(shard))),
    }[config.federation.weighting]
    update = wire.ClientUpdate(
        institution=institution.name,
        round=order.round,
        run=order.run,
        adapter=AdapterState.read(work.model),
        size=size,
        metrics={name: known[name] for name in order.report if name in known},
    )
    return _leaving(institution, order, config, update)


@dataclass(frozen=True, kw_only=True)
class ChargedRound:
    """A private round that is paid for: what trains it and what its answer says.

    Args:
        institution: Whose.
        order: What the server asked for, accepted.
        config: The run.
        shard: Its records.
        budget: Its plan for the run.
        ledger: Open; whoever holds this closes it.
        digest: Of order and configuration, as the ledger knows them.
        key: From which the round's noise and sampling are drawn.
    """

    institution: Institution
    order: wire.TrainOrder
    config: RunConfig
    shard: Shard
    budget: Budget
    ledger: Ledger
    digest: str
    key: bytes


def charge(
    institution: Institution, order: wire.TrainOrder, config: RunConfig
) -> ChargedRound | wire.ClientUpdate:
    """Plan a private round and charge the ledger for it; a round that was answered is not charged.

    Returns:
        The round with its ledger open, or the answer that is stored for it.

    Raises:
        Refusal: When the run is beyond the institution's limits (`check_limits`), a step would
            change nothing (``step-too-small``), or the ledger says no (``budget-exhausted``,
            ``ledger-*`` and others).
    """
    shard = trainable.records(config).train(institution.index)
    plan = budget(config, shard.num_units, order.participations)
    _check_step(order, config, plan)
    ledger = open_ledger(institution, config, shard, create=False)
    try:
        check_limits(institution, ledger, plan)
        digest = order.digest(config.fingerprint())
        charged = ledger.charge(
            run_id=order.run,
            round=order.round,
            order_digest=digest,
            event=plan.round_event,
            planned=plan.events,
            max_steps_of_run=plan.plan.max_steps,
            key=_key(config, institution, order),
            extra_events=plan.size_events,
        )
    except BaseException:
        ledger.close()
        raise
    if charged.answer is not None:
        ledger.close()
        return _leaving(institution, order, config, wire.update_from_bytes(charged.answer))
    return ChargedRound(
        institution=institution,
        order=order,
        config=config,
        shard=shard,
        budget=plan,
        ledger=ledger,
        digest=digest,
        key=charged.key,
    )


def _check_step(order: wire.TrainOrder, config: RunConfig, plan: Budget) -> None:
    """Refuse an adapter that a step cannot change: training would end in a guard, and be charged.

    The noise alone moves every value by about the deviation of the noise on the averaged gradient
    times the learning rate (by the learning rate itself under Adam). Where that is less than the
    distance between the smallest value of a tensor and the next float32, the tensor stays as it is.
    """
    noise = plan.plan.noise_multiplier * config.privacy.max_grad_norm / plan.normaliser
    if config.training.optimizer != "sgd":
        noise /= noise + ADAM_EPS
    step = config.training.learning_rate * noise
    for name, tensor in order.adapter.only((*order.parts, *order.kept)).items():
        smallest = tensor.abs().min()
        distance = float(torch.nextafter(smallest, torch.tensor(math.inf)) - smallest)
        if not step >= distance:
            raise Refusal(
                "step-too-small",
                f"a step moves a value by about {step:.2g}, and float32 cannot tell {name} from "
                f"itself by less than {distance:.2g}; raise training.learning-rate (now "
                f"{config.training.learning_rate:g}), or start from a smaller adapter",
            )


def can_share(config: RunConfig) -> bool:
    """Whether institutions that follow equal orders of this run can share passes under DP."""
    return training.can_share(_load(config), config.training.local_steps)


def train_charged(rounds: Sequence[ChargedRound]) -> list[AdapterState]:
    """The trained adapter of each round; several must follow equal orders, and `can_share`.

    Raises:
        Refusal: When a guard trips; nothing may be released then.
    """
    order = rounds[0].order
    work = _load(rounds[0].config)
    work.train_only((*order.parts, *order.kept))
    order.adapter.load_into(work.model)
    privacy = rounds[0].config.privacy
    participants = [
        training.Participant(
            shard=each.shard,
            mechanism=training.PrivacyMechanism(
                noise_multiplier=each.budget.plan.noise_multiplier,
                sample_rate=each.budget.plan.sample_rate,
                normaliser=each.budget.normaliser,
                max_grad_norm=privacy.max_grad_norm,
                clipping=privacy.clipping,
            ),
            source=RandomSource(each.key),
        )
        for each in rounds
    ]
    return training.train_privately(work, participants, _local_plan(rounds[0].config))


def release(done: ChargedRound, trained: AdapterState) -> wire.ClientUpdate:
    """Store a round's answer in the ledger; what is returned may leave."""
    order, config, plan = done.order, done.config, done.budget
    update = wire.ClientUpdate(
        institution=done.institution.name,
        round=order.round,
        run=order.run,
        adapter=trained.only((*order.parts, *order.kept)),
        size=_released_size(done),
        privacy=_spent(config, done.ledger, order.run, plan),
    )
    done.ledger.store_answer(order.run, order.round, done.digest, wire.update_to_bytes(update))
    return _leaving(done.institution, order, config, update)


def _key(config: RunConfig, institution: Institution, order: wire.TrainOrder) -> bytes | None:
    """The round's key: the ledger draws it from the operating system unless the run is seeded."""
    if config.privacy.noise == "secure":
        return None
    return RandomSource.seeded("privacy", config.seed, order.round, institution.name).key


def _released_size(done: ChargedRound) -> float:
    weighting = done.config.federation.weighting
    if weighting == "public-size":
        return float(done.budget.public_size)
    if weighting == "noised-size":
        draw = float(RandomSource(done.key).child("size").normal(1)[0])
        noised = max(1.0, done.shard.num_units + done.budget.plan.size_noise * draw)
        return done.ledger.released_size(done.order.run, noised)
    return 0.0


def _spent(config: RunConfig, ledger: Ledger, run: str, plan: Budget) -> wire.PrivacySpent:
    events = ledger.history(run)
    return wire.PrivacySpent(
        unit=config.privacy.unit,
        epsilon=accounting.epsilon(events, plan.plan.delta, plan.plan.accountant),
        delta=plan.plan.delta,
        noise_multiplier=plan.plan.noise_multiplier,
        sample_rate=plan.plan.sample_rate,
        steps=sum(e.steps for e in events if e.noise_multiplier == plan.plan.noise_multiplier),
        accountant=plan.plan.accountant,
        noise=config.privacy.noise,
        max_grad_norm=config.privacy.max_grad_norm,
        clipping=config.privacy.clipping,
        size_noise=plan.plan.size_noise,
        ledger_epsilon=ledger.spent(),
        ledger_delta=ledger.delta,
        ledger_limit=ledger.max_epsilon,
    )


def _local_plan(config: RunConfig) -> training.LocalPlan:
    return training.LocalPlan(
        steps=config.training.local_steps,
        physical_batch=config.training.physical_batch,
        optimizer=config.training.optimizer,
        learning_rate=config.training.learning_rate,
        proximal=config.training.proximal,
    )
