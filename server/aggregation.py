"""Aggregations of a round's updates: a strategy's mean, a robust rule, a noised mean or a sum.

The driver (`server.rounds`) calls one `Aggregation` and knows nothing of its kind.
"""

import abc
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora.config.config import RunConfig
from fedlora.models.adapters import AdapterState
from fedlora.secure import noise_shares
from fedlora.wire import wire
from server import institution_privacy
from server.institution_privacy import InstitutionMechanism
from server.replies import Replies
from server.run_directory import RunState
from server.secure_session import SecureSession
from strategies import noised_sum, robust
from strategies.base import Round, Strategy


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """One adapter from the updates of a round.

    Args:
        adapter: The new value of the trained parts; an empty one changes nothing.
        rejected: Institution -> reason, for valid updates that have no weight.
    """

    adapter: AdapterState
    rejected: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures about a round's replies that the server may record.

    Args:
        updates: The number of updates that count.
        rejected: Institution -> reason.
        received: Institution -> bytes of its adapter.
    """

    updates: int
    rejected: Mapping[str, str]
    received: Mapping[str, int]


class Aggregation(abc.ABC):
    """An aggregation, and the figures that the server may count, report and record under it.

    The methods here suit an aggregation whose server may record figures of each update. An
    aggregation that hides updates overrides them, as `InstitutionLevel` does.

    Attributes:
        newest_checkpoint_only: Whether a run may be resumed from its newest checkpoint only.
        least_asked: The least number of institutions with which a round can change something.
    """

    newest_checkpoint_only = False
    least_asked = 1

    @abc.abstractmethod
    def aggregate(self, this_round: Round, replies: Replies) -> Aggregated:
        """Take all replies of a round and make one adapter of the valid updates.

        Raises:
            Refusal: When the round must change nothing, with the reason as its code.
        """

    def report(self, this_round: Round, replies: Replies, names: Iterable[str]) -> Report:
        """The figures about the replies, after `aggregate`.

        Args:
            this_round: The round.
            replies: Its replies.
            names: The institutions that were asked.
        """
        return Report(updates=replies.valid, rejected=replies.failed, received=replies.received)

    def epsilons(self, state: RunState) -> dict[str, float]:
        """Institution -> epsilon spent of its records' budget, where that may be recorded."""
        return {name: spent["epsilon"] for name, spent in state.privacy.items()}

    def largest_epsilon(self, state: RunState) -> float | None:
        """The largest epsilon that an institution has spent of its records' budget."""
        return max(self.epsilons(state).values(), default=None)

    def round_record(self, state: RunState) -> dict[str, Any]:
        """Further keys of a line of ``rounds.jsonl``."""
        return {}

    def statement(self, state: RunState) -> dict[str, Any]:
        """Further keys of ``privacy.json``."""
        return {}


class Mean(Aggregation):
    """The mean of a strategy.

    Args:
        strategy: The strategy.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def aggregate(self, this_round: Round, replies: Replies) -> Aggregated:
        """The strategy's mean of the valid updates, as they arrive."""
        return Aggregated(adapter=self._strategy.aggregate(this_round, replies))


class RobustRule(Aggregation):
    """A rule that bounds the influence of a few bad institutions (`strategies.robust`).

    Args:
        config: The run.
        strategy: The strategy, whose mean multi-krum takes.
    """

    def __init__(self, config: RunConfig, strategy: Strategy) -> None:
        self._rule, self._share = config.federation.robust_rule
        self.least_asked = next(
            n for n in itertools.count(1) if robust.enough(self._rule, self._share, n)
        )
        self._mean = strategy.aggregate

    def aggregate(self, this_round: Round, replies: Replies) -> Aggregated:
        """The rule's choice among the valid updates. Raises `Refusal` ``too-few-updates``."""
        adapter, rejected = robust.aggregate(
            this_round, replies, rule=self._rule, share=self._share, mean=self._mean
        )
        return Aggregated(adapter=adapter, rejected=rejected)


class InstitutionLevel(Aggregation):
    """A noised mean that hides each institution's part (`strategies.institution_dp`).

    The validity of an update depends on the institution's records. So an invalid update counts as
    an update of zero, and no figure that depends on a single update is recorded.

    Args:
        mechanism: The noise and its accountant.
        record_epsilon: The budget of the institutions' records; the spent part is not recorded.
    """

    newest_checkpoint_only = (
        True  # an older checkpoint would release a round again, under fresh noise
    )

    def __init__(self, mechanism: InstitutionMechanism, record_epsilon: float) -> None:
        self._mechanism, self._record_epsilon = mechanism, record_epsilon

    def aggregate(self, this_round: Round, replies: Replies) -> Aggregated:
        """The noised mean; an empty adapter when no institution answered."""
        updates = sorted((update for update, _ in replies), key=lambda u: u.institution)
        answered = _answered(replies)
        if not answered:
            return Aggregated(adapter=AdapterState({}))
        return Aggregated(adapter=self._mechanism.aggregate(this_round, updates, answered))

    def report(self, this_round: Round, replies: Replies, names: Iterable[str]) -> Report:
        """All answers, valid or not; bytes as if each institution had sent the asked parts."""
        asked = this_round.before.only(this_round.parts)
        return Report(
            updates=_answered(replies),
            rejected={n: code for n, code in replies.failed.items() if n not in replies.invalid},
            received=dict.fromkeys(names, wire.array_bytes(wire.pack_adapter(asked))),
        )

    def epsilons(self, state: RunState) -> dict[str, float]:
        """Empty, because the spending shows whether an update was valid."""
        return {}

    def largest_epsilon(self, state: RunState) -> float:
        """The whole budget of an institution's records."""
        return self._record_epsilon

    def round_record(self, state: RunState) -> dict[str, Any]:
        """The epsilon of the institution that was asked most often."""
        return {"institution_epsilon": self._mechanism.spent(state.asked.values())}

    def statement(self, state: RunState) -> dict[str, Any]:
        """The promise about institutions."""
        return {"institution_level": self._mechanism.statement(state.asked.values())}


class NoisedSum(Aggregation):
    """The sum of vectors with shares of noise, under secure aggregation.

    The server sees masked vectors and their sum. No figure of a single vector is computed or
    recorded.

    Args:
        config: The run.
        institutions: The number of institutions.
        session: The protocol.
    """

    newest_checkpoint_only = True  # nobody answers a round twice

    def __init__(self, config: RunConfig, institutions: int, session: SecureSession) -> None:
        self._config, self._institutions, self._session = config, institutions, session
        privacy = config.privacy
        self.least_asked = noise_shares.least_survivors(
            institutions, privacy.honest, privacy.colluding
        )

    def aggregate(self, this_round: Round, replies: Replies) -> Aggregated:
        """One step on the union of the records; `Refusal` where a sum has too few survivors."""
        config = self._config
        total, sizes = self._session.total(this_round, replies)
        divisor = config.training.batch_size * math.fsum(sizes)
        grid = noise_shares.grid(config.privacy.max_grad_norm)
        scale = config.training.learning_rate * grid / divisor
        before = this_round.before.only(this_round.parts)
        return Aggregated(adapter=noised_sum.step(before, total, scale))

    def statement(self, state: RunState) -> dict[str, Any]:
        """The institutions that must be trusted."""
        privacy = self._config.privacy
        return {
            "secure_aggregation": {
                "honest": privacy.honest,
                "colluding": privacy.colluding,
                "institutions": self._institutions,
                "least_survivors": self.least_asked,
            }
        }


def _answered(replies: Replies) -> int:
    return replies.valid + len(replies.invalid)


def choose(
    config: RunConfig,
    institutions: int,
    participations: int,
    strategy: Strategy,
    session: SecureSession | None,
) -> Aggregation:
    """The aggregation of a run.

    Args:
        config: The run.
        institutions: The number of institutions.
        participations: The most rounds for which one institution can be asked.
        strategy: The run's strategy.
        session: The full protocol of secure aggregation, where the run has it.

    Raises:
        InputError: If no noise keeps institution-level DP within its budget.
    """
    if session is not None:
        return NoisedSum(config, institutions, session)
    if config.privacy.hides_institutions:
        mechanism = institution_privacy.plan(config, institutions, participations)
        return InstitutionLevel(mechanism, config.privacy.epsilon)
    return Mean(strategy) if config.federation.robust == "none" else RobustRule(config, strategy)
