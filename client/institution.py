"""An institution in one run: its records, its budget, its answers and refusals.

What happens in a round under DP, and in which order it reaches the disk (`Institution.play`):

1. `accept` checks the order and reads the local parts. `plan_round` plans the noise, checks the
   institution's limits and opens the ledger, which is bound to the records. Until here nothing is
   written, and a refusal costs nothing.
2. `PrivateRound.charge` writes the cost and the key of the noise into the ledger, and syncs it.
3. Training adds the noise (`client.cohort`; several institutions of a simulation share passes).
4. `PrivateRound.store_answer` writes the answer into the ledger and wipes the key. A masked vector
   is in `secure.db` instead, and the key goes when the ledger closes the round.
5. The local parts are written, and the rest is sent.

Whenever the process is killed, the ledger states at least the released spending
(docs/threat-model.md). The same order again is the same release, charged once.
"""

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import fedlora
from client import checks, cohort, secure_role, secure_store, training
from client.cohort import Play
from client.config_policy import server_values
from client.ledger import Ledger
from client.local_parts import LocalParts
from client.private_round import PrivateRound
from client.releases import Releases
from client.secure_role import SecureRole
from client.settings import REPORTABLE, Settings
from client.training import LocalPlan
from fedlora import processors
from fedlora.config.config import UNRELEASED, RunConfig
from fedlora.config.sections import check_gpu
from fedlora.data import records
from fedlora.data.shards import Shard
from fedlora.errors import InputError, Refusal
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState
from fedlora.privacy import accounting
from fedlora.privacy.accounting import PrivacyPlan
from fedlora.privacy.budget import delta_of, plan_run
from fedlora.privacy.streams import RandomSource
from fedlora.runs import run_files
from fedlora.runs.run_files import LEDGERS
from fedlora.secure import peers, secure_order
from fedlora.secure.secure_aggregation import KeysMessage, Terms
from fedlora.wire.messages import (
    ClientUpdate,
    EvaluateOrder,
    Evaluation,
    Hello,
    Query,
    Release,
    TrainOrder,
)


@dataclass(frozen=True, kw_only=True)
class Institution:
    """One institution in one run, on its own machine.

    Args:
        config: The run, as this institution follows it.
        name: The institution's name in the federation.
        index: The institution's number in the partition.
        ledger_path: The file of its privacy ledger.
        directory: The directory of its local parts.
        secure_store: The file of its keys and shares in secure aggregation.
        report: Names of figures that it sends where DP is off.
        max_delta: Largest delta of a run.
        max_run_epsilon: Largest epsilon of a run, at the ledger's delta.
        max_alone_epsilon: The same if all other institutions collude, under secure aggregation.
        simulated: Whether one experimenter plays every institution.
        key_path: The file of its own key; None in a simulation, where keys follow from the seed.
        peers_path: The directory of the pinned keys of its peers; None likewise.
    """

    config: RunConfig
    name: str
    index: int
    ledger_path: Path
    directory: Path
    secure_store: Path
    report: tuple[str, ...] = REPORTABLE
    max_delta: float = 1.0
    max_run_epsilon: float = math.inf
    max_alone_epsilon: float = math.inf
    simulated: bool = True
    key_path: Path | None = None
    peers_path: Path | None = None

    @classmethod
    def locate(cls, config: RunConfig, index: int) -> Self:
        """The institution with this number in a simulation."""
        name = records.load(config).names[index]
        ledgers = Path(config.run_dir) / LEDGERS
        return cls(
            config=config,
            name=name,
            index=index,
            ledger_path=ledgers / f"{name}.db",
            directory=Path(config.run_dir) / "institutions" / name,
            secure_store=ledgers / f"{name}.{secure_store.FILE}",
        )

    @classmethod
    def deployed(cls, settings: Settings, config: RunConfig) -> Self:
        """The institution of these settings, on its own machine.

        Raises:
            InputError: If the settings ask for a GPU, and torch finds none.
        """
        if settings.gpu:
            check_gpu("gpu is true", "false")
        return cls(
            config=config,
            name=settings.name,
            index=0,
            ledger_path=Path(settings.ledger),
            directory=Path(settings.state) / "kept",
            report=settings.report,
            max_delta=settings.max_delta,
            max_run_epsilon=settings.max_run_epsilon,
            max_alone_epsilon=settings.max_alone_epsilon,
            simulated=False,
            key_path=Path(settings.key) if settings.key else None,
            peers_path=Path(settings.peers) if settings.peers else None,
            secure_store=Path(settings.state) / secure_store.FILE,
        )

    def hello(self, query: Query) -> Hello:
        """Give the institution's name and version, and whether its ledger allows the run.

        Raises:
            Refusal: ``ledger-*``, ``no-peers``, or for a run beyond the institution's limits.
        """
        fits, size = True, 0
        if self.config.privacy.enabled:
            shard = self.records()
            plan = plan_run(self.config, shard.num_units, query.participations)
            if self.config.privacy.shares_noise:
                self.secure_role()  # refuses missing keys and peers before the run begins
            with self.open_ledger(shard, create=query.first and self.simulated) as ledger:
                self._check_limits(plan, ledger)
                fits = ledger.fits(plan.events, query.run)
            size = plan.size_class if plan.honest else 0
        return Hello(
            institution=self.name,
            version=fedlora.__version__,
            fits=fits,
            size=size,
            code="" if self.simulated else run_files.code(),
        )

    def answer(self, order: TrainOrder) -> ClientUpdate:
        """Train one round and account for it.

        Raises:
            Refusal: With a code; only the code may leave.
        """
        (outcome,) = cohort.answer([self.play(order)])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def play(self, order: TrainOrder) -> Play:
        """One round from the order to the answer; `client.cohort` trains what it yields.

        Yields:
            The charged round, where it was not answered before; then waits for its training.

        Returns:
            The answer, which may be sent.
        """
        order = self.accept(order)
        if not self.config.privacy.enabled:
            update = self._train_without_dp(order)
        else:
            with self.plan_round(order) as planned:
                update = planned.charge()
                if update is None:  # else it was answered before, and is not trained again
                    update = planned.store_answer((yield planned))
        return self.store_local_parts(order, update)  # the caller sends the rest

    def accept(self, order: TrainOrder) -> TrainOrder:
        """Check an order, and put the local parts into its adapter.

        Returns:
            The order whose adapter training starts from; its digest determines the release.

        Raises:
            Refusal: If the order does not fit this configuration, or asks for figures that may not
                leave; ``kept-part-unreadable``.
        """
        work = self.load()
        checks.check_base(order, work.base.digest)
        checks.check_adapter(order.adapter, work.start, self.config)
        checks.check_order(order, self.config)
        checks.check_report(order.report, () if self.config.privacy.enabled else self.report)
        if not order.kept:
            return order
        local = self.local_parts(order.run).load(order.round, order.adapter.only(order.kept))
        return dataclasses.replace(order, adapter=order.adapter.updated(local))

    def plan_round(self, order: TrainOrder) -> PrivateRound:
        """Plan a round under DP.

        Args:
            order: An accepted order.

        Returns:
            The round, not charged yet, with the ledger open.

        Raises:
            Refusal: For a run beyond the institution's limits (``delta-too-large``,
                ``epsilon-too-large``, ``alone-epsilon-too-large``), for an adapter that no step
                changes (``step-too-small``) or that is too large (``adapter-too-large``),
                ``no-peers``, ``ledger-*``, or ``secure-*`` (`SecureRole.begin`).
        """
        shard = self.records()
        plan = plan_run(self.config, shard.num_units, order.participations)
        checks.check_step(order, self.config, plan)
        checks.check_size(order, plan)
        secure = self.secure_role() if self.config.privacy.shares_noise else None
        with contextlib.ExitStack() as on_error:
            ledger, masked = on_error.enter_context(self.open_ledger(shard)), None
            self._check_limits(plan, ledger)
            if secure:
                count, masked = secure.begin(order)
            else:
                count = len(records.load(self.config).names)
            on_error.pop_all()  # the round closes it
        return PrivateRound(
            name=self.name,
            order=order,
            config=self.config,
            shard=shard,
            plan=plan,
            ledger=ledger,
            institutions=count,
            secure=secure,
            masked=masked,
        )

    def secure_role(self) -> SecureRole:
        """This institution in the full protocol of secure aggregation.

        Raises:
            Refusal: ``protocol-mismatch`` if the run has none, ``no-peers`` without pinned keys.
            InputError: If a file of a key cannot be used.
        """
        config, name = self.config, self.name
        if not config.privacy.shares_noise:
            raise Refusal("protocol-mismatch", "the run has no masked vectors")
        if self.simulated:
            key = peers.simulated(config.seed, name)
            pinned = peers.simulated_public(config.seed, records.load(config).names)
        elif self.key_path is None or self.peers_path is None:
            raise Refusal(
                "no-peers",
                "under secure aggregation the settings must have key and peers; add them",
            )
        else:
            key = peers.read_private(self.key_path)
            pinned = peers.pinned(self.peers_path, name, key)
        return SecureRole(
            config=config,
            name=name,
            store=self.secure_store,
            ledger=self.ledger_path,
            key=key,
            peers=pinned,
        )

    def secure_keys(self, terms: Terms) -> KeysMessage:
        """Make the keys of a run (`SecureRole.keys`)."""
        parameters = secure_order.parameters(self.load().start, self.config)
        return self.secure_role().keys(terms, parameters)

    def store_local_parts(self, order: TrainOrder, update: ClientUpdate) -> ClientUpdate:
        """Store an update's local parts on this disk, and return the update without them."""
        if order.kept:
            self.local_parts(order.run).store(order.round, update.adapter.only(order.kept))
        return dataclasses.replace(update, adapter=update.adapter.only(order.parts))

    def receive(self, release: Release) -> Evaluation:
        """Store the released adapter with this institution's local parts (`client.releases`).

        Under the full protocol of secure aggregation it first erases the run's secrets.

        Returns:
            The institution's name, without metrics.

        Raises:
            Refusal: If the adapter does not fit; ``base-mismatch``, ``kept-part-unreadable``,
                ``ledger-*`` or ``secure-store-*``.
        """
        with processors.threads(self.config.engine.threads):
            work = self.load()
            checks.check_base(release, work.base.digest)
            checks.check_adapter(release.adapter, work.start, self.config)
            whole = dataclasses.replace(release, adapter=self.with_local_parts(release))
            if self.config.privacy.shares_noise:
                secure_role.erase(self.secure_store, self.ledger_path, release.run)
            Releases(Path(self.config.run_dir)).store(whole, server_values(self.config), work.model)
        return Evaluation(institution=self.name, metrics={})

    def with_local_parts(self, sent: EvaluateOrder | Release) -> AdapterState:
        """A released adapter with the local parts of the last round in place of the server's."""
        default = sent.adapter.only(self.config.federation.traits.local_parts)
        return sent.adapter.updated(self.local_parts(sent.run).load(sent.round + 1, default))

    def open_ledger(self, shard: Shard | None = None, *, create: bool = False) -> Ledger:
        """Open the institution's ledger, and bind it to its records.

        With ``create`` an existing one is only checked: the first order binds it.

        Args:
            shard: The institution's records, where they are at hand.
            create: Create a missing ledger, with limit and delta of the run. Only a simulation
                does so, and only before the run's first order.

        Raises:
            Refusal: ``ledger-*`` when it is missing, locked, corrupt, bound to other records, or
                has a delta that is too large for so many units.
            InputError: If a missing ledger cannot be created.
        """
        shard = self.records() if shard is None else shard
        path, privacy = self.ledger_path, self.config.privacy
        found = path.exists()
        if create and not found:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                Ledger.create(
                    path,
                    max_epsilon=privacy.epsilon,
                    delta=delta_of(privacy, shard.num_units),
                )
            except InputError:
                if not path.exists():  # otherwise another run made it meanwhile
                    raise
        with contextlib.ExitStack() as on_error:
            ledger = on_error.enter_context(Ledger.open(path))
            checks.check_ledger_delta(ledger, path, shard.num_units)
            if create and found:  # the first order binds it: the run may be refused before
                ledger.is_bound(shard.fingerprint, privacy.unit)
            else:
                ledger.bind(shard.fingerprint, privacy.unit)
            on_error.pop_all()
        return ledger

    def _train_without_dp(self, order: TrainOrder) -> ClientUpdate:
        work, shard = self.load(), self.records()
        work.train_only((*order.parts, *order.kept))
        order.adapter.load_into(work.model)
        batch = max(1, round(self.config.training.rate(len(shard)) * len(shard)))
        source = RandomSource.seeded("train", self.config.seed, order.round, self.name)
        with processors.threads(self.config.engine.threads):
            loss = training.train(work, shard, LocalPlan.of(self.config), batch, source)
        known = {"loss": loss, "records": float(len(shard))}
        sizes = {
            "uniform": 0.0,
            "records": float(len(shard)),
            "public-size": float(accounting.public_size(len(shard))),
        }
        return ClientUpdate(
            institution=self.name,
            round=order.round,
            run=order.run,
            adapter=AdapterState.read(work.model),
            size=sizes[self.config.federation.weighting],
            metrics={name: known[name] for name in order.report if name in known},
        )

    def _check_limits(self, plan: PrivacyPlan, ledger: Ledger) -> None:
        checks.check_limits(
            plan,
            ledger,
            max_delta=self.max_delta,
            max_run_epsilon=self.max_run_epsilon,
            max_alone_epsilon=self.max_alone_epsilon,
        )

    def records(self) -> Shard:
        """The training records."""
        return records.load(self.config).train(self.index)

    def load(self) -> trainable.Trainable:
        """The model."""
        # A deployed institution's settings name the classes: most orders need no record yet.
        given = self.config.data.labels
        labels = records.load(self.config).labels if self.simulated else given
        return trainable.load(self.config, labels)

    def local_parts(self, run: str) -> LocalParts:
        """The local parts of a run."""
        return LocalParts(self.directory, run, self.config.fingerprint(*UNRELEASED))
