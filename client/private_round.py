"""One round of one institution under DP, from the charge to the stored answer."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from client import private_training
from client.ledger import Ledger
from client.private_training import Participant
from client.secure_role import SecureRole
from client.training import LocalPlan
from fedlora import processors
from fedlora.arrays import Int64
from fedlora.config.config import UNRELEASED, RunConfig
from fedlora.data import records
from fedlora.data.shards import Shard
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState
from fedlora.privacy import composition
from fedlora.privacy.accounting import PrivacyPlan
from fedlora.privacy.streams import RandomSource
from fedlora.wire import wire
from fedlora.wire.messages import ClientUpdate, PrivacySpent, TrainOrder

Trained = AdapterState | Int64
"""The outcome of a round's training: an adapter, or a vector under secure aggregation."""


@dataclass(kw_only=True)
class PrivateRound:
    """A planned round: `charge` it, train it (`train_rounds`), then `store_answer`.

    It holds the ledger open; use it as a context manager.

    Args:
        name: The institution's name.
        order: The server's order, checked, with the adapter that training starts from.
        config: The run.
        shard: The institution's records.
        plan: The plan of the institution's run.
        ledger: The institution's ledger, open.
        institutions: The number of institutions in the run.
        secure: The institution's role under the full protocol of secure aggregation.
        masked: The round's vector where that protocol masked it before.
        key: Key of the round's noise and sampling; empty before the charge.
    """

    name: str
    order: TrainOrder
    config: RunConfig
    shard: Shard
    plan: PrivacyPlan
    ledger: Ledger
    institutions: int
    secure: SecureRole | None
    masked: Int64 | None = None
    key: bytes = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.close()

    @property
    def training_digest(self) -> str:
        """Digest of order and configuration: rounds that share it can share passes.

        The keys `UNRELEASED` do not count: a smaller batch in memory, after the round ran out of
        it, is the same release and is not charged again.
        """
        return self.order.digest(self.config.fingerprint(*UNRELEASED))

    @property
    def digest(self) -> str:
        """Digest of `training_digest` and name, under which the ledger has this round.

        The name counts, so that a second institution on one ledger never makes the first one's
        release again.
        """
        return hashlib.sha256(json.dumps([self.training_digest, self.name]).encode()).hexdigest()

    def charge(self) -> ClientUpdate | None:
        """Charge the ledger for the round, unless it was answered before.

        Returns:
            The stored answer of a round that was answered or masked before, else None.

        Raises:
            Refusal: If the ledger refuses (``budget-exhausted``, ``ledger-*`` and others).
        """
        seeded: bytes | None = None  # under secure noise the ledger draws a key
        if self.config.privacy.noise != "secure":
            path = [self.order.round, self.name]
            if self.config.adapter.start:  # the rounds before it drew from the same seed
                path.append(self.config.adapter.start)
            seeded = RandomSource.seeded("privacy", self.config.seed, *path).key
        charged = self.ledger.charge(
            run_id=self.order.run,
            round_number=self.order.round,
            order_digest=self.digest,
            event=self.plan.round_event,
            max_steps_of_run=self.plan.max_steps,
            key=seeded,
        )
        self.key = charged.key
        if self.masked is not None:
            return self._update(self.masked)
        return None if charged.answer is None else wire.update_from_bytes(charged.answer)

    def store_answer(self, trained: Trained) -> ClientUpdate:
        """Store the round's answer in the ledger; only then may it be sent.

        A masked vector is in the store of the protocol's keys instead (`SecureParty.mask`), and the
        ledger closes the round before shares leave (`SecureParty.unmask`).

        Args:
            trained: The outcome of `train_rounds`.

        Returns:
            The answer, with the local parts: where another process stored one to this order
            meanwhile, as a worker may that was given up, that one.

        Raises:
            Refusal: ``round-already-answered`` to another order, or ``ledger-*``.
        """
        order = self.order
        if self.secure is not None and not isinstance(trained, AdapterState):
            return self._update(self.secure.mask(order, trained))
        update = self._update(trained)
        blob = wire.update_to_bytes(update)
        stored = self.ledger.store_answer(order.run, order.round, self.digest, blob)
        return update if stored is blob else wire.update_from_bytes(stored)

    def _update(self, trained: Trained) -> ClientUpdate:
        adapter, words = AdapterState({}), None
        if isinstance(trained, AdapterState):
            adapter = trained.only((*self.order.parts, *self.order.kept))
        else:
            words = trained
        return ClientUpdate(
            institution=self.name,
            round=self.order.round,
            run=self.order.run,
            adapter=adapter,
            size=self._size(),
            privacy=self._spent(),
            words=words,
        )

    def _size(self) -> float:
        """The size that the weighting needs: a size class, or 0.

        Under secure aggregation it is 0: the roster knows the size class (`Institution.hello`).
        """
        weighting = self.config.federation.weighting
        if self.plan.honest:
            return 0.0
        if weighting == "public-size":
            return float(self.plan.size_class)
        return 0.0

    def _spent(self) -> PrivacySpent:
        plan, ledger = self.plan, self.ledger
        events = ledger.history(self.order.run)
        return PrivacySpent(
            unit=self.config.privacy.unit,
            epsilon=composition.epsilon(events, plan.delta),
            delta=plan.delta,
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            steps=ledger.steps_of(self.order.run),
            noise=self.config.privacy.noise,
            max_grad_norm=plan.max_grad_norm,
            ledger_epsilon=ledger.spent(),
            ledger_epsilon_alone=ledger.spent_alone(),
            ledger_delta=ledger.delta,
            ledger_limit=ledger.max_epsilon,
        )


def train_rounds(rounds: Sequence[PrivateRound]) -> list[Trained]:
    """Train charged rounds that follow equal orders, in shared passes if they have one step.

    Args:
        rounds: At least one.

    Returns:
        The trained adapter of each round, or its vector under secure aggregation.

    Raises:
        Refusal: When a guard trips; nothing may be released then.
    """
    order, config = rounds[0].order, rounds[0].config
    work, plan = trainable.load(config, records.load(config).labels), LocalPlan.of(config)
    if len(rounds) > 1 and plan.steps > 1:
        return [trained for one in rounds for trained in train_rounds([one])]
    work.train_only((*order.parts, *order.kept))
    order.adapter.load_into(work.model)
    participants = [
        Participant(shard=each.shard, mechanism=each.plan, source=RandomSource(each.key))
        for each in rounds
    ]
    with processors.threads(config.engine.threads):
        if config.privacy.shares_noise:
            institutions = rounds[0].institutions
            return list(private_training.noised_sums(work, participants, plan, institutions))
        return list(private_training.train_privately(work, participants, plan))
