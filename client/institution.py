"""How an institution answers an order: its own records, its own budget, its own refusals.

The order of events is what the privacy claim rests on: plan, *charge*, train, *store the answer*,
send. Whatever is killed in between, the ledger never says less than what was released
(docs/threat-model.md).
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from client import training
from client.ledger import Charge, Ledger
from fedlora import accounting, trainable, wire
from fedlora.accounting import Event, PrivacyPlan
from fedlora.config import PrivacyConfig, RunConfig
from fedlora.errors import Refusal
from fedlora.shards import Shard
from fedlora.streams import RandomSource


@dataclass(frozen=True, kw_only=True)
class Institution:
    """One institution as its own machine knows it.

    Args:
        name: Its name in the federation.
        index: Its number in the partition.
        ledger: Path of its privacy ledger.
    """

    name: str
    index: int
    ledger: Path


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an institution plans to spend in a run. Every figure depends on public values only.

    Args:
        plan: Noise for the whole run.
        public_size: Size class: the largest power of two not above the number of units.
        normaliser: Expected number of units a step, from the size class.
    """

    plan: PrivacyPlan
    public_size: int
    normaliser: float

    @property
    def round_event(self) -> Event:
        """What one round spends."""
        return Event(
            noise_multiplier=self.plan.noise_multiplier,
            sample_rate=self.plan.sample_rate,
            steps=self.plan.steps_per_round,
        )

    @property
    def events(self) -> tuple[Event, ...]:
        """What the whole run spends at most."""
        whole = Event(
            noise_multiplier=self.plan.noise_multiplier,
            sample_rate=self.plan.sample_rate,
            steps=self.plan.max_steps,
        )
        return (whole, *self.size_events)

    @property
    def size_events(self) -> tuple[Event, ...]:
        """The release of a noised record count, when the weighting wants one."""
        if not self.plan.size_noise:
            return ()
        return (Event(noise_multiplier=self.plan.size_noise, sample_rate=1.0, steps=1),)


def locate(config: RunConfig, index: int) -> Institution:
    """The institution with this number in a simulation."""
    name = trainable.records(config).names[index]
    directory = Path(config.privacy.ledger or Path(config.run_dir) / "ledgers")
    return Institution(name=name, index=index, ledger=directory / f"{name}.db")


def budget(config: RunConfig, units: int, participations: int) -> Budget:
    """Plan the noise of a whole run for an institution with this many units.

    Args:
        config: The run.
        units: Records, or distinct values of the unit column.
        participations: Rounds it may be asked for, at most.

    Raises:
        InputError: If delta is not below 1 / (the most units of its size class), or no noise
            reaches the budget.
    """
    return _budget(
        config.privacy,
        config.training.local_steps,
        config.training.batch_size,
        config.training.sample_rate,
        config.federation.weighting,
        units,
        participations,
    )


@functools.lru_cache(maxsize=4096)
def _budget(
    privacy: PrivacyConfig,
    local_steps: int,
    batch_size: int,
    sample_rate: float,
    weighting: str,
    units: int,
    participations: int,
) -> Budget:
    public = accounting.public_size(units)
    delta = _delta(privacy, units)
    rate = sample_rate or min(1.0, batch_size / public)
    plan = accounting.plan(
        epsilon=privacy.epsilon,
        delta=delta,
        sample_rate=rate,
        steps_per_round=local_steps,
        rounds=participations,
        accountant=privacy.accountant,
        size_noise=privacy.size_noise if weighting == "noised-size" else 0.0,
    )
    return Budget(plan=plan, public_size=public, normaliser=rate * public)


def _delta(privacy: PrivacyConfig, units: int) -> float:
    """The run's delta, checked against the size class: a check against the count would tell it."""
    most = accounting.most_of_class(units)
    delta = privacy.delta or accounting.public_delta(most)
    accounting.check_delta(delta, most)
    return delta


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
            delta=_delta(config.privacy, units),
            accountant=config.privacy.accountant,
        )
    ledger = Ledger.open(institution.ledger)
    most = accounting.most_of_class(units)
    if ledger.delta >= 1 / most:
        ledger.close()
        raise Refusal(
            "ledger-delta",
            f"{institution.ledger} reckons at delta {ledger.delta:g}; it must be below 1 / units "
            f"({1 / most:g} for this size class): make another with a smaller --delta",
        )
    ledger.bind(shard.fingerprint(), config.privacy.unit)
    return ledger


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
    records = trainable.records(config)
    shard = records.train(institution.index)
    work = trainable.load(config, records.labels)
    if order.base != work.base.digest:
        raise Refusal(
            "base-mismatch", "the server trains another base model than model.name gives here"
        )
    problem = order.adapter.validate_against(work.start)
    if problem:
        raise Refusal(
            "adapter-mismatch", f"the order's adapter does not fit this configuration: {problem}"
        )
    work.train_only(order.parts)
    if not config.privacy.enabled:
        return _plain(institution, order, config, work, shard)
    if order.report:
        raise Refusal(
            "metrics-not-allowed",
            f"the server asks for {', '.join(order.report)}; under DP none leaves",
        )
    return _private(institution, order, config, work, shard)


def _plain(
    institution: Institution,
    order: wire.TrainOrder,
    config: RunConfig,
    work: trainable.Trainable,
    shard: Shard,
) -> wire.ClientUpdate:
    """A round without DP."""
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
    return wire.ClientUpdate(
        institution=institution.name,
        round=order.round,
        adapter=trainable.AdapterState.read(work.model).only(order.parts),
        size=size,
        metrics={name: known[name] for name in order.report if name in known},
    )


def _private(
    institution: Institution,
    order: wire.TrainOrder,
    config: RunConfig,
    work: trainable.Trainable,
    shard: Shard,
) -> wire.ClientUpdate:
    """A round under DP: plan, charge, train, store, and only then return."""
    plan = budget(config, shard.num_units, order.participations)
    with open_ledger(institution, config, shard, create=False) as ledger:
        digest = order.digest(config.fingerprint())
        charge = ledger.charge(
            run_id=order.run,
            round=order.round,
            order_digest=digest,
            event=plan.round_event,
            planned=plan.events,
            max_steps_of_run=plan.plan.max_steps,
            key=_key(config, institution, order),
            extra_events=plan.size_events,
        )
        if charge.answer is not None:
            return wire.update_from_bytes(charge.answer)
        order.adapter.load_into(work.model)
        training.train_privately(
            work,
            shard,
            _local_plan(config),
            training.PrivacyMechanism(
                noise_multiplier=plan.plan.noise_multiplier,
                sample_rate=plan.plan.sample_rate,
                normaliser=plan.normaliser,
                max_grad_norm=config.privacy.max_grad_norm,
                clipping=config.privacy.clipping,
            ),
            RandomSource(charge.key),
        )
        update = wire.ClientUpdate(
            institution=institution.name,
            round=order.round,
            adapter=trainable.AdapterState.read(work.model).only(order.parts),
            size=_released_size(config, ledger, order.run, shard, plan, charge),
            privacy=_spent(config, ledger, order.run, plan),
        )
        ledger.store_answer(order.run, order.round, digest, wire.update_to_bytes(update))
    return update


def _key(config: RunConfig, institution: Institution, order: wire.TrainOrder) -> bytes | None:
    """The round's key: the ledger draws it from the operating system unless the run is seeded."""
    if config.privacy.noise == "secure":
        return None
    return RandomSource.seeded("privacy", config.seed, order.round, institution.name).key


def _released_size(
    config: RunConfig, ledger: Ledger, run: str, shard: Shard, plan: Budget, charge: Charge
) -> float:
    if config.federation.weighting == "public-size":
        return float(plan.public_size)
    if config.federation.weighting == "noised-size":
        draw = float(RandomSource(charge.key).child("size").normal(1)[0])
        noised = max(1.0, shard.num_units + plan.plan.size_noise * draw)
        return ledger.released_size(run, noised)
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
