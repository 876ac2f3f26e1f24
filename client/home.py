"""What an institution gains by joining: three models, each made at home from its own records.

*Alone* is trained from a fresh adapter, as if there were no federation. *Shared* is the adapter
that the federation released. *Own* starts from the shared one and is trained at home. Neither alone
nor own has differential privacy, and neither leaves the institution.

Settings are chosen on a validation part of the training records. Held-out rows serve for nothing
but the figures at the end.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from client.home_training import HomePlan, Trainee, expected_errors, train_at_home
from fedlora.adapters import PARTS, AdapterState, factor_names, kind
from fedlora.config import HomeConfig
from fedlora.lora_layers import ADAPTER, lora_layers
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
    and chooses by the expected errors on what it held back: the number of steps of each (a
    quarter, a half or all of ``home.steps``), and the weight of the own adapter against the shared
    one. Then it trains both anew on all its training records.

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
    trials = dict.fromkeys(fits, steps)
    alone_trials = trainer.train(Model.ALONE, fits, trials, "fit")
    own_trials = trainer.train(Model.OWN, fits, trials, "fit")
    choices = [Choice(settings.steps, settings.steps, 1.0)] * len(homes)
    for i, choice in trainer.choose(steps, alone_trials, own_trials, validation).items():
        choices[i] = choice
    whole = {i: home.shard for i, home in enumerate(homes)}
    alone, own = (
        trainer.train(
            model, whole, {i: (choice.steps(model),) for i, choice in enumerate(choices)}, "all"
        )
        for model in Model
    )
    return [
        HomeModels(alone=alone[i][0], own=mixed(start, own[i][0], choice.weight), choice=choice)
        for i, (start, choice) in enumerate(zip(trainer.starts, choices, strict=True))
    ]


class _Trainer:
    """Trains and chooses the models of several institutions under one configuration."""

    def __init__(
        self, work: Trainable, homes: Sequence[Home], settings: HomeConfig, physical_batch: int
    ) -> None:
        self.work, self.homes, self.settings = work, homes, settings
        self.physical_batch = physical_batch
        self.starts = [home.shared for home in homes]  # of the own models
        if settings.method == "dual":
            self.starts = [beside(home.shared, work) for home in homes]

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
                start=self.work.start if alone else self.starts[i],
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
        """Choose steps and weight of each institution by its errors on validation records.

        Args:
            steps: Numbers of steps.
            alone: Number -> the institution's models alone after those steps.
            own: Number -> the institution's adapters from the shared one after those steps.
            validation: Number -> the institution's validation records.
        """
        numbers = list(validation)
        if not numbers:
            return {}
        alone_errors, own_errors = (
            np.array(
                [self._errors([m[i][k] for i in numbers], validation) for k in range(len(steps))]
            )
            for m in (alone, own)
        )  # (steps, institutions)
        alone_best, own_best = alone_errors.argmin(0), own_errors.argmin(0)
        weights = np.ones(len(numbers))
        if self.settings.method != "fine-tune":
            pairs = [
                (self.starts[i], own[i][int(k)]) for i, k in zip(numbers, own_best, strict=True)
            ]
            errors = [
                self._errors([mixed(*pair, weight) for pair in pairs], validation)
                for weight in WEIGHTS[:-1]
            ]
            best = np.stack([*errors, own_errors.min(0)]).argmin(0)
            weights = np.array(WEIGHTS)[best]
        return {
            number: Choice(steps[int(alone_best[i])], steps[int(own_best[i])], float(weights[i]))
            for i, number in enumerate(numbers)
        }

    def _errors(
        self, adapters: Sequence[AdapterState], records: Mapping[int, Shard]
    ) -> NDArray[np.float64]:
        """The expected errors of each institution's adapter; infinite if they are no number."""
        errors = expected_errors(self.work, adapters, list(records.values()), self.physical_batch)
        return np.nan_to_num(errors, nan=np.inf, posinf=np.inf)


def beside(shared: AdapterState, work: Trainable) -> AdapterState:
    """Fresh factors beside the frozen shared ones, which become a residual of the base.

    Args:
        shared: The released adapter.
        work: Its model; gives the fresh factors and the scale s of s B A.

    Returns:
        An adapter that computes what ``shared`` computes until it is trained.
    """
    _, layer = next(iter(lora_layers(work.model)))
    scale = cast(float, cast(Any, layer).scaling[ADAPTER])
    whole, scaled = shared.single(lambda _: scale)
    if not scaled:
        factors = shared.layers().items()
        whole = shared.updated({factor_names(path)[1]: scale * own.b for path, own in factors})
    return whole.as_residual(work.start)


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
