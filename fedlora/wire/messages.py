"""The typed messages between server and institutions: plain data, without Flower and torch.

The receiver validates them: an institution holds an order against its own limits, a strategy holds
an update against the global adapter.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.arrays import Int64
    from fedlora.models.adapters import AdapterState
    from fedlora.secure.secure_aggregation import MaskedOrder


@dataclass(frozen=True, kw_only=True)
class Hello:
    """An institution's first reply.

    Args:
        institution: Its name, unique in the federation.
        version: Its fedlora version.
        fits: Whether the whole run fits what its privacy ledger has left.
        size: Its size class, under secure aggregation; 0 otherwise.
        code: A digest of fedlora's files there; empty in a simulation.
    """

    institution: str
    version: str
    fits: bool
    size: int = 0
    code: str = ""


@dataclass(frozen=True, kw_only=True)
class Query:
    """The server's question before the first round.

    Args:
        run: The run's identity, also after a resume.
        first: Whether no round of the run was ordered yet, so that nobody can have been charged.
        participations: The largest number of rounds for which the institution may be asked.
    """

    run: str
    first: bool
    participations: int


@dataclass(frozen=True, kw_only=True)
class TrainOrder:
    """The server's message to an institution for one round.

    Args:
        run: The run's identity, also after a resume.
        round: The number of the round, from 1.
        participations: The largest number of rounds of this run for which the institution may be
            asked. The institution plans its noise for this number and enforces it.
        base: SHA-256 of the base model's weights as the server holds them.
        report: Names of requested figures (``loss``, ``records``). Under DP each is refused.
        parts: The parts to train and send back (`fedlora.models.adapters.PARTS`).
        kept: The local parts: trained, kept from round to round and not sent. All other parts stay
            as they are in ``adapter``.
        adapter: The adapter to start from.
        masked: The round's order under the full protocol of secure aggregation; None otherwise.
    """

    run: str
    round: int
    participations: int
    base: str
    report: tuple[str, ...]
    parts: tuple[str, ...]
    kept: tuple[str, ...]
    adapter: "AdapterState"
    masked: "MaskedOrder | None" = None

    def digest(self, config_fingerprint: str) -> str:
        """SHA-256 (hex) over every field but ``masked``, and over the configuration.

        It is computed once for an order and a configuration.
        """
        digests: dict[str, str] = self.__dict__.setdefault("_digests", {})
        if config_fingerprint not in digests:
            digests[config_fingerprint] = self._digest(config_fingerprint)
        return digests[config_fingerprint]

    def _digest(self, config_fingerprint: str) -> str:
        head = [
            self.run,
            self.round,
            self.participations,
            self.base,
            self.report,
            self.parts,
            self.kept,
            config_fingerprint,
        ]
        hasher = hashlib.sha256(json.dumps(head).encode())
        for name, tensor in self.adapter.items():
            hasher.update(json.dumps([name, list(tensor.shape)]).encode())
            hasher.update(tensor.numpy().tobytes())
        return hasher.hexdigest()


@dataclass(frozen=True, kw_only=True)
class EvaluateOrder:
    """The order to evaluate an institution's adapters on its held-out rows, in simulations.

    It asks for the institution's own adapter where institutions have local parts, and, under the
    message type `fedlora.wire.wire.HOME`, for the comparison of the models that it trains at home.

    Args:
        run: The run's identity.
        round: The number of the last round.
        save: Whether the institution saves its adapter for use after the run.
        adapter: The global adapter; the institution's local parts replace its own.
    """

    run: str
    round: int
    save: bool
    adapter: "AdapterState"


@dataclass(frozen=True, kw_only=True)
class Release:
    """The adapter that a run released, for an institution's own use; sent after the last round.

    Args:
        run: The run's identity.
        name: The name under which the operator knows the run.
        round: The number of the last round.
        base: SHA-256 of the base model's weights as the server holds them.
        origins: The runs behind the run's start and base (`fedlora.models.model_files.Origin`).
        adapter: The released adapter; an institution's local parts replace its own.
    """

    run: str
    name: str
    round: int
    base: str
    origins: Sequence[Mapping[str, Any]]
    adapter: "AdapterState"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An institution's answer to an `EvaluateOrder`, and, without metrics, to a `Release`.

    Args:
        institution: The institution's name.
        metrics: Metrics of its own adapter on its own held-out rows, from
            `fedlora.models.tasks.Task.evaluate`; empty without such rows. At home: for ``alone``,
            ``shared`` and ``own`` the predicted class of each held-out row (its index), and the
            figures of `client.home_models.Choice`.
    """

    institution: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PrivacySpent:
    """The privacy that an institution has spent, in figures that depend on public values only.

    Args:
        unit: The unit of privacy: ``record``, or a column.
        epsilon: The spending of this run so far, at ``delta``.
        delta: The run's delta.
        noise_multiplier: Standard deviation of the noise over ``max_grad_norm``.
        sample_rate: Probability that a unit is in a step's batch.
        steps: Steps taken in this run.
        noise: ``secure`` or ``seeded``.
        max_grad_norm: Clipping bound.
        ledger_epsilon: The spending of all runs on these records, at ``ledger_delta``.
        ledger_epsilon_alone: The same if all others collude in runs with secure aggregation; inf
            where an institution's own share protects nothing.
        ledger_delta: The ledger's delta.
        ledger_limit: The ledger's limit, which the institution sets.
    """

    unit: str
    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    noise: str
    max_grad_norm: float
    ledger_epsilon: float
    ledger_epsilon_alone: float
    ledger_delta: float
    ledger_limit: float

    @classmethod
    def stored(cls, said: Mapping[str, Any]) -> "PrivacySpent":
        """A record from a file, in which an infinite number may be a text."""
        values: dict[str, Any] = {**said}
        values["ledger_epsilon_alone"] = float(values["ledger_epsilon_alone"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """An institution's answer to a `TrainOrder`.

    Args:
        institution: The institution's name.
        round: The order's round.
        adapter: The trained parts, after local training; empty where there are ``words``.
        run: The order's run.
        size: The size for the weighting: a size class or a record count; 0 for
            uniform weights.
        privacy: The privacy spent; None without DP.
        metrics: The requested figures; empty under DP.
        words: Under secure aggregation the noised sum of gradients, int64 ``(d,)``, in steps of the
            grid (`fedlora.secure.noise_shares`); None otherwise.
    """

    institution: str
    round: int
    adapter: "AdapterState"
    run: str = ""
    size: float = 0.0
    privacy: PrivacySpent | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    words: "Int64 | None" = None
