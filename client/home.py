"""What an institution gains by joining: three models, each made at home from its own records.

*Alone* is trained from a fresh adapter, as if there were no federation. *Shared* is the adapter
that the federation released. *Own* starts from the shared one and is trained at home. Neither alone
nor own has differential privacy, and neither leaves the institution.

Settings are chosen on a validation part of the training records. Held-out rows serve for nothing
but the figures at the end.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.home_training import HomePlan, Trainee, mean_losses, train_at_home
from fedlora.adapters import PARTS, AdapterState, kind
from fedlora.config import HomeConfig
from fedlora.shards import Shard
from fedlora.streams import RandomSource
from fedlora.trainable import Trainable

VALIDATION = 0.2
"""Share of the training records that choices are made on."""
MIN_VALIDATION = 8
"""An institution with fewer such records takes all steps and the trained adapter."""
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weights of the adapter that was trained at home, against the shared one."""


OWN_CARD = """# An institution's own model

This adapter was trained on the institution's records without differential privacy. It may reveal
records, so it must not leave the institution. The adapter that the federation released is another
one.
"""
"""The model card beside an own adapter."""


@dataclass(frozen=True, kw_only=True)
class Home:
    """One institution at home.

    Args:
        shard: Its training records.
        shared: The adapter that the federation released to it.
        source: Its random source.
    """

    shard: Shard
    shared: AdapterState
    source: RandomSource


class Model(enum.Enum):
    """The two models that are trained at home."""

    ALONE = "alone"
    OWN = "own"


@dataclass(frozen=True)
class Choice:
    """What validation records chose.

    Args:
        alone_steps: Steps of the model alone.
        own_steps: Steps of the own model.
        weight: Weight of the trained adapter in the own model, against the shared one: at 0 the
            own model is the shared one.
    """

    alone_steps: int
    own_steps: int
    weight: float

    def steps(self, model: Model) -> int:
        """The steps of a model."""
        return self.alone_steps if model is Model.ALONE else self.own_steps


@dataclass(frozen=True, kw_only=True)
class HomeModels:
    """The models of one institution.

    Args:
        alone: The adapter that was trained from a fresh one.
        own: The adapter that was trained from the shared one.
        choice: The settings that validation records chose.
    """

    alone: AdapterState
    own: AdapterState
    choice: Choice


def models_at_home(
    work: Trainable, homes: Sequence[Home], settings: HomeConfig, physical_batch: int
) -> list[HomeModels]:
    """Train the models of institutions at home.

    Each institution holds back a fifth of its training records, trains both models on the rest,
    and chooses by the loss on what it held back: the number of steps of each (a quarter, a half,
    or all of ``home.steps``), and the weight of the own adapter against the shared one. Then it
    trains both anew on all its training records.

    Args:
        work: The model; a fresh adapter is its ``start``.
        homes: The institutions.
        settings: The section ``[home]``.
        physical_batch: Records in memory at a time.

    Returns:
        The models of each institution.

    Reference: interpolation with the shared model: Wortsman et al. (2022), arXiv 2109.01903;
    a penalty on the distance to it: Li et al. (2021), Ditto, arXiv 2012.04221, which is MR-MTL of
    Liu et al. (2022), arXiv 2206.07902.
    """
    work.train_only([part for part in PARTS if part in {kind(name) for name in work.start}])
    trainer = _Trainer(work, homes, settings, physical_batch)
    splits = [_split(home) for home in homes]
    validation = {i: held for i, (_, held) in enumerate(splits) if held is not None}
    steps = tuple(sorted({max(1, settings.steps // part) for part in (4, 2, 1)}))
    fits = {i: splits[i][0] for i in validation}
    tried = [trainer.train(model, fits, dict.fromkeys(fits, steps), "fit") for model in Model]
    choices = [Choice(settings.steps, settings.steps, 1.0)] * len(homes)
    alone, own = tried
    for i, choice in trainer.choose(steps, alone, own, validation).items():
        choices[i] = choice
    whole = {i: home.shard for i, home in enumerate(homes)}
    alone, own = (
        trainer.train(
            model, whole, {i: (choice.steps(model),) for i, choice in enumerate(choices)}, "all"
        )
        for model in Model
    )
    return [
        HomeModels(
            alone=alone[i][0], own=mixed(home.shared, own[i][0], choice.weight), choice=choice
        )
        for i, (home, choice) in enumerate(zip(homes, choices, strict=True))
    ]


class _Trainer:
    """Trains and chooses the models of several institutions under one configuration."""

    def __init__(
        self, work: Trainable, homes: Sequence[Home], settings: HomeConfig, physical_batch: int
    ) -> None:
        self.work, self.homes, self.settings = work, homes, settings
        self.physical_batch = physical_batch

    def train(
        self,
        model: Model,
        shards: Mapping[int, Shard],
        steps: Mapping[int, tuple[int, ...]],
        purpose: str,
    ) -> dict[int, list[AdapterState]]:
        """Train one model of some institutions: number -> its adapters after those steps."""
        settings, alone = self.settings, model is Model.ALONE
        plan = HomePlan(
            batch_size=settings.batch_size,
            physical_batch=self.physical_batch,
            learning_rate=settings.learning_rate,
            head_learning_rate=settings.head_learning_rate if alone else settings.learning_rate,
            proximal=settings.proximal if settings.method == "ditto" and not alone else 0.0,
        )
        trainees = [
            Trainee(
                shard=shard,
                start=self.work.start if alone else self.homes[i].shared,
                steps=steps[i],
                source=self.homes[i].source.child(model.value, purpose),
            )
            for i, shard in shards.items()
        ]
        return dict(zip(shards, train_at_home(self.work, trainees, plan), strict=True))

    def choose(
        self,
        steps: Sequence[int],
        alone: Mapping[int, Sequence[AdapterState]],
        own: Mapping[int, Sequence[AdapterState]],
        validation: Mapping[int, Shard],
    ) -> dict[int, Choice]:
        """Choose steps and weight of each institution by the loss on its validation records.

        Args:
            steps: Numbers of steps.
            alone: Number -> the institution's models alone after those steps.
            own: Number -> the institution's adapters from the shared one after those steps.
            validation: Number -> the institution's validation records.
        """
        numbers = list(validation)
        if not numbers:
            return {}
        alone_losses, own_losses = (
            [self._losses([m[i][k] for i in numbers], validation) for k in range(len(steps))]
            for m in (alone, own)
        )
        alone_best, own_best, weights = _least(alone_losses), _least(own_losses), [1.0] * len(own)
        if self.settings.method != "fine-tune":
            trained = [own[i][k] for i, k in zip(numbers, own_best, strict=True)]
            pairs = [(self.homes[i].shared, t) for i, t in zip(numbers, trained, strict=True)]
            losses = [
                self._losses([mixed(shared, t, weight) for shared, t in pairs], validation)
                for weight in WEIGHTS[:-1]
            ]
            best = _least([*losses, np.min(np.stack(own_losses), axis=0)])
            weights = [WEIGHTS[k] for k in best]
        return {
            number: Choice(steps[alone_best[i]], steps[own_best[i]], weights[i])
            for i, number in enumerate(numbers)
        }

    def _losses(
        self, adapters: Sequence[AdapterState], records: Mapping[int, Shard]
    ) -> NDArray[np.float64]:
        """The loss of each institution's adapter on its records; infinite if it is no number."""
        losses = mean_losses(self.work, adapters, list(records.values()), self.physical_batch)
        return np.array([loss if math.isfinite(loss) else math.inf for loss in losses])


def _least(losses: Sequence[NDArray[np.float64]]) -> list[int]:
    """For each institution the number of the array that has its least loss."""
    return [int(k) for k in np.stack(losses).argmin(axis=0)]


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


def _split(home: Home) -> tuple[Shard, Shard | None]:
    """The records that a model is fitted to, and those that choices are made on."""
    count = round(VALIDATION * len(home.shard))
    if count < MIN_VALIDATION:
        return home.shard, None
    order = home.source.child("validation").permutation(len(home.shard))
    return home.shard.select(np.sort(order[count:])), home.shard.select(np.sort(order[:count]))
