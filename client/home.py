"""Models that an institution trains at home after the run, for itself, from its own records.

*Alone* is trained from a fresh adapter, as if there were no federation. *Shared* is the adapter
that the federation released. *Own* is a weighted mean of the shared adapter and one that goes on
from it at home, or the model alone where that does better on records held back. Alone and own have
no differential privacy and do not leave the institution.

Held-out rows serve for nothing but the figures at the end: everything is chosen on training records
that are held back.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from client.passes import plain_passes
from client.training import add_gradients, shuffled, training_steps
from fedlora.config.sections import HOME_BATCH_SIZE
from fedlora.data.shards import Shard
from fedlora.errors import InputError
from fedlora.gradients import lora_layers
from fedlora.models.adapters import PARTS, AdapterState, kind
from fedlora.models.trainable import Trainable
from fedlora.privacy.streams import RandomSource
from fedlora.runs.comparison import text_numbers

LEARNING_RATE, HEAD_LEARNING_RATE = 0.005, 0.05
"""Adam's step sizes, of factors and magnitudes and of a head."""
WEIGHTS = (0.5, 0.75, 1.0)
"""Weights of the adapter that was trained at home in the own model. Smaller ones would be chosen
for no other reason than that the shared adapter was trained on the records held back too."""
HELD_BACK = 0.2
"""Share of the training records that are held back to choose on."""
MIN_HELD_BACK = 16
"""With fewer records held back nothing is chosen: the own model has the first weight."""
CARD = """# An institution's own model

This adapter was trained on the institution's records without differential privacy. It may reveal
records, so it must not leave the institution. The adapter that the federation released is another
one.
"""
"""The model card beside an own adapter."""


@dataclass(frozen=True, kw_only=True)
class HomeModels:
    """The models of one institution.

    Args:
        alone: The adapter that was trained from a fresh one.
        own: The adapter that was made from the shared one, or that of the model alone.
        weight: Weight of the trained adapter in the own model, against the shared one; 0 where its
            training gave no numbers, so that the own model is the shared one.
        keeps_alone: Whether the own model is the model alone.
        held_back: Number of training records that were held back to choose on.
    """

    alone: AdapterState
    own: AdapterState
    weight: float
    keeps_alone: bool
    held_back: int

    def figures(self) -> dict[str, float]:
        """What was chosen, for an `Evaluation` at home."""
        return {name: getattr(self, name) for name in ("weight", "keeps_alone", "held_back")}


def train(
    work: Trainable,
    shard: Shard,
    shared: AdapterState,
    source: RandomSource,
    *,
    steps: int,
    physical_batch: int,
) -> HomeModels:
    """Train the models of an institution at home.

    It first trains both models on four fifths of its records, and takes of the model alone and the
    own models by `WEIGHTS` the one with the fewest expected errors on the fifth that it held back.
    Then it trains both models anew on all its records. With `interpolate`, the one method, the own
    model begins from the shared factors and, where the model has a head, from a fresh one.

    Args:
        work: The model; a fresh adapter is its ``start``. Its trained parameters may have any
            values afterwards.
        shard: The institution's training records; at least one.
        shared: The adapter that the run released to it.
        source: Its random source.
        steps: Steps of each training.
        physical_batch: Records in memory at a time.

    Raises:
        InputError: If training the model alone gives no numbers.

    Reference: Wortsman et al. (2022), arXiv 2109.01903, for the mean with the shared model.
    """
    work.train_only([part for part in PARTS if part in {kind(name) for name in work.start}])
    trainer = _Trainer(work, steps, physical_batch)
    begin = shared.updated(work.start.only(("head",)))
    fit, held = split(shard, source.child("validation"))
    weight, keeps_alone = WEIGHTS[0], False
    if len(held) >= MIN_HELD_BACK:
        alone = trainer.train(fit, work.start, source.child("alone", "fit"))
        own = trainer.train(fit, begin, source.child("own", "fit"))
        candidates = [(0.0, alone), *((weight, mixed(shared, own, weight)) for weight in WEIGHTS)]
        errors = [trainer.errors(adapter, held) for _, adapter in candidates]
        best = int(np.argmin(errors))
        weight, keeps_alone = candidates[best][0], best == 0
    alone = trainer.train(shard, work.start, source.child("alone", "all"))
    if not alone.is_finite():
        raise InputError(
            f"the model alone has no finite values after {steps} steps, so nothing can be compared "
            "with it; lower home.steps (with fedlora home: --steps)"
        )
    own = alone
    if not keeps_alone:
        own = trainer.train(shard, begin, source.child("own", "all"))
        weight = weight if own.is_finite() else 0.0
        own = mixed(shared, own, weight)
    return HomeModels(
        alone=alone,
        own=own,
        weight=weight,
        keeps_alone=keeps_alone,
        held_back=len(held) if len(held) >= MIN_HELD_BACK else 0,
    )


def mixed(shared: AdapterState, trained: AdapterState, weight: float) -> AdapterState:
    """The mean of two adapters, in which ``trained`` has this weight; the residual is shared."""
    if weight in (0.0, 1.0):
        return trained if weight else shared
    return shared.updated(
        {
            name: torch.lerp(shared[name], tensor, weight)
            for name, tensor in trained.items()
            if kind(name) != "residual"
        }
    )


def split(shard: Shard, source: RandomSource) -> tuple[Shard, Shard]:
    """The records that a model is fitted to, and those that are held back.

    Copies of a record are on one side: a model is right on those that it was fitted to. At most
    `HELD_BACK` of the records are held back, and of the different ones.
    """
    copy_of = text_numbers(shard)
    copies, kinds = np.bincount(copy_of), list[int]()
    room, most = (round(HELD_BACK * count) for count in (len(shard), len(copies)))
    for one in dict.fromkeys(copy_of[source.permutation(len(shard))].tolist()):
        if copies[one] <= room and len(kinds) < most:
            room -= copies[one]
            kinds.append(one)
    held = np.isin(copy_of, kinds)
    return shard.select(np.flatnonzero(~held)), shard.select(np.flatnonzero(held))


@dataclass(frozen=True)
class _Trainer:
    """Plain training of one adapter, and its errors."""

    work: Trainable
    steps: int
    physical_batch: int

    def train(self, shard: Shard, start: AdapterState, source: RandomSource) -> AdapterState:
        """The mean of the second half of Adam's iterates, in place of a decaying step size.

        Reference: Polyak and Juditsky (1992), Acceleration of stochastic approximation.
        """
        start.load_into(self.work.model)
        named = lora_layers.trained(self.work.model)
        optimizer: torch.optim.Optimizer = torch.optim.Adam(list(_groups(named)), fused=True)
        size = min(HOME_BATCH_SIZE, len(shard))
        means: dict[str, torch.Tensor] = {}
        with training_steps(self.work, private=False):
            batches = shuffled(len(shard), size, self.steps, source.child("shuffle"))
            for step, rows in enumerate(batches):
                optimizer.zero_grad()
                dropout = source.child("dropout", step)
                add_gradients(self.work, shard, rows, self.physical_batch, dropout)
                optimizer.step()  # pyright: ignore[reportUnknownMemberType]
                if (count := step + 1 - self.steps // 2) < 1:
                    continue
                for name, parameter in named.items():
                    mean = means.setdefault(name, parameter.detach().clone())
                    mean.lerp_(parameter.detach(), 1 / count)
        return start.updated({name: mean.cpu() for name, mean in means.items()})

    def errors(self, adapter: AdapterState, shard: Shard) -> float:
        """The expected share of wrong answers, in [0, 1]; infinite where it is no number.

        It is the mean of one minus the probability of the right class. Unlike the mean loss it is
        not ruled by the few records of which a model is sure and wrong.
        """
        adapter.load_into(self.work.model)
        with torch.no_grad():
            losses = plain_passes(
                self.work, shard, np.arange(len(shard)), self.physical_batch, None
            )
            total = sum(float(-torch.expm1(-each.double()).sum()) for each in losses)
        return float(np.nan_to_num(total / len(shard), nan=np.inf, posinf=np.inf))


def _groups(named: Mapping[str, torch.nn.Parameter]) -> Iterator[dict[str, object]]:
    """Adam's groups: a head moves faster than factors."""
    for head, rate in ((False, LEARNING_RATE), (True, HEAD_LEARNING_RATE)):
        members = [p for name, p in named.items() if (kind(name) == "head") is head]
        if members:
            yield {"params": members, "lr": rate}
