"""Institution-level DP: the server's plan and its accountant."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedlora.config.config import RunConfig
from fedlora.models.adapters import AdapterState
from fedlora.privacy import accounting, composition, odds
from fedlora.privacy.composition import Event, History
from fedlora.privacy.streams import RandomSource
from fedlora.wire.messages import ClientUpdate
from strategies import institution_dp
from strategies.base import Round

ADVERSARY = (
    "the other institutions and anyone who sees any or all of the global adapters; not the server, "
    "which sees every update"
)
ADJACENCY = (
    "one institution's updates, in all rounds, replaced by zero; that it takes part is public"
)


@dataclass(frozen=True, kw_only=True)
class InstitutionMechanism:
    """Gaussian noise on the sum of clipped updates, planned for the whole run.

    Sampling of institutions amplifies nothing here: each round for which an institution is asked
    counts in full.

    Args:
        noise_multiplier: Deviation of the noise over ``max_norm``.
        max_norm: Clipping bound of an institution's update.
        delta: The delta of the whole run.
        seed: The run's seed for noise that a simulation can repeat; None for noise under a key from
            the operating system.
    """

    noise_multiplier: float
    max_norm: float
    delta: float
    seed: int | None

    def aggregate(
        self, this_round: Round, updates: list[ClientUpdate], answered: int
    ) -> AdapterState:
        """One round's noised mean; see `strategies.institution_dp`."""
        source = (
            RandomSource.secure()
            if self.seed is None
            else RandomSource.seeded("institution-noise", self.seed, this_round.number)
        )
        return institution_dp.aggregate(
            this_round.before.only(this_round.parts),
            updates,
            max_norm=self.max_norm,
            noise_multiplier=self.noise_multiplier,
            answered=answered,
            source=source,
        )

    def spent(self, asked: Iterable[int]) -> float:
        """Epsilon of the institution that was asked most often.

        Args:
            asked: The number of rounds for which each institution was asked, answered or not.
        """
        return composition.epsilon(
            history(self.noise_multiplier, max(asked, default=0)), self.delta
        )

    def statement(self, asked: Iterable[int]) -> dict[str, Any]:
        """The part of privacy.json on institutions."""
        said = self.spending(max(asked, default=0))
        if self.seed is None:
            events = history(self.noise_multiplier, said["steps"])
            said["odds"] = odds.bounds(events, said["epsilon"], self.delta)
        return said

    def spending(self, steps: int) -> dict[str, Any]:
        """`statement` without odds, for an institution that was asked for this many rounds."""
        return {
            "unit": "institution",
            "adversary": ADVERSARY,
            "adjacency": ADJACENCY,
            "epsilon": self.spent([steps]),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": 1.0,
            "steps": steps,
            "max_norm": self.max_norm,
            "noise": "secure" if self.seed is None else "seeded",
        }


def history(noise_multiplier: float, steps: int) -> History:
    """The releases of an institution that was asked for this many rounds."""
    if not steps:
        return ()
    return (Event(noise_multiplier=noise_multiplier, sample_rate=1.0, steps=steps),)


def plan(config: RunConfig, institutions: int, participations: int) -> InstitutionMechanism:
    """The mechanism for a run under institution-level DP.

    Args:
        config: The run.
        institutions: The number of institutions.
        participations: The most rounds for which one institution can be asked.

    Raises:
        InputError: If no noise reaches the budget.
    """
    privacy = config.privacy
    delta = accounting.public_delta(institutions)
    return InstitutionMechanism(
        noise_multiplier=accounting.noise_multiplier(
            epsilon=privacy.institution_epsilon,
            delta=delta,
            sample_rate=1.0,
            steps=participations,
        ),
        max_norm=privacy.institution_max_norm,
        delta=delta,
        seed=config.seed if privacy.noise == "seeded" else None,
    )
