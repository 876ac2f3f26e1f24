"""The models of an institution at home: their start, the choice between settings, their cards."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fedlora.data.shards import Shard
from fedlora.models.adapters import AdapterState
from fedlora.privacy.streams import RandomSource
from fedlora.rounding import at_most
from fedlora.runs.comparison import CHOICES
from fedlora.wire.messages import PrivacySpent

OWN_CARD = """# An institution's own model

This adapter was trained on the institution's records without differential privacy. It may reveal
records, so it must not leave the institution. The adapter that the federation released is another
one.
"""
"""The model card beside an own adapter."""
ALONE_CARD = """
It is the institution's model alone: on records that were held back it was right more often than a
model made from the released adapter.
"""
"""A further paragraph of the card where the model alone is kept."""
PRIVATE_CARD = """# An institution's own model, trained under differential privacy

The model starts from the adapter that run {run} released and was trained at the institution. This
training protects each {unit} in the institution's records: epsilon {epsilon} at delta {delta:g}
(one {unit} added or removed; {steps} steps, sample rate {sample_rate:.4g}, noise multiplier
{noise_multiplier:.4g}, clipping bound {max_grad_norm:g}).

What privacy.json of that run says of its list of classes and of what it started from holds for
this model too.

{others} that were in the ledger of the institution when this card was written, the spending is
epsilon {ledger_epsilon} at delta {ledger_delta:g}. Runs without differential privacy on these
records, if there were any, are not covered.
"""
"""The model card of an own adapter that was trained under DP."""
WITH_RUN = "The run used the same records. Together with it, and with all other runs"
WITHOUT_RUN = (
    "The ledger has no charge of that run. If the run used these records under another ledger,\n"
    "its epsilon and delta add to what follows. Together with all runs"
)
SHARED_NOISE_CARD = """
Runs with secure aggregation are in that sum as long as the institutions that they count as honest
added their noise. If all others collude, the spending is epsilon {0}.
"""
"""A further paragraph of the card where the ledger has such runs."""
SEEDED_CARD = """
The noise was drawn from a seed, for a reproducible simulation, so this training protects nobody.
"""
"""A further paragraph of the card where the noise is seeded."""


@dataclass(frozen=True, kw_only=True)
class PrivateOwn:
    """The training of an own model under DP, which was charged.

    Args:
        run: The run that released the shared adapter.
        privacy: The spending of this training; its ledger's figures are of now, also where a
            stored answer is given again.
        run_charged: Whether the ledger has charges of the run.
    """

    run: str
    privacy: PrivacySpent
    run_charged: bool

    def card(self) -> str:
        """The model card."""
        figures = dataclasses.asdict(self.privacy)
        figures |= {key: at_most(figures[key]) for key in ("epsilon", "ledger_epsilon")}
        others = WITH_RUN if self.run_charged else WITHOUT_RUN
        card = PRIVATE_CARD.format(run=self.run, others=others, **figures)
        if self.privacy.ledger_epsilon_alone > self.privacy.ledger_epsilon:
            card += SHARED_NOISE_CARD.format(at_most(self.privacy.ledger_epsilon_alone))
        return card + (SEEDED_CARD if self.privacy.noise == "seeded" else "")


@dataclass(frozen=True, kw_only=True)
class Home:
    """One institution at home.

    Args:
        shard: Its training records.
        shared: The adapter that the federation released to it.
        source: Its random source.
        alone: The file of its model alone where the runs of a sweep share that
            (`client.alone_models`).
    """

    shard: Shard
    shared: AdapterState
    source: RandomSource
    alone: Path | None


class Setting(NamedTuple):
    """A setting that is tried.

    Args:
        steps: Steps at home.
        learning_rate: The learning rate of factors and magnitudes.
    """

    steps: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What validation records chose.

    Args:
        alone: The setting of the model alone.
        own: The setting of the own model.
        weight: Weight of the trained adapter in the own model, against the shared one: at 0 the
            own model is the shared one.
        keeps_alone: Whether the own model is the model alone, which was right more often than the
            mean with that weight.
        held_back: Number of training records that were held back to choose and compare on.
    """

    alone: Setting
    own: Setting
    weight: float
    keeps_alone: bool = False
    held_back: int = 0

    def figures(self) -> dict[str, float]:
        """The choice as `fedlora.wire.messages.Evaluation` has it at home."""
        figures = (
            self.alone.steps,
            self.own.steps,
            self.alone.learning_rate,
            self.own.learning_rate,
            self.weight,
            self.keeps_alone,
            self.held_back,
        )
        return dict(zip(CHOICES, figures, strict=True))


@dataclass(frozen=True, kw_only=True)
class HomeModels:
    """The models of one institution.

    Args:
        alone: The adapter that was trained from a fresh one.
        own: The adapter that was made from the shared one, or that of the model alone.
        choice: The settings that validation records chose.
        private: The own model's training, where it was under DP.
    """

    alone: AdapterState
    own: AdapterState
    choice: Choice
    private: PrivateOwn | None = None

    def card(self) -> str:
        """The model card of the own model."""
        if self.private is not None:
            return self.private.card()
        return OWN_CARD + (ALONE_CARD if self.choice.keeps_alone else "")
