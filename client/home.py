"""What an institution gains by joining: three models, each made at home from its own records.

*Alone* is trained from a fresh adapter, as if there were no federation. *Shared* is the adapter
that the federation released. *Own* is made from the shared one at home, or is the model alone where
that was clearly better. Alone has no differential privacy and does not leave the institution. The
same holds for own, unless ``home.epsilon`` trains it under DP, which is not done here
(`client.home_cohort`).

Settings are chosen on a validation part of the training records. Held-out rows serve for nothing
but the figures at the end.
"""

import enum
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from client import alone_models
from client.alone_models import AloneModel
from client.home_models import Choice, Home, HomeModels, Setting
from client.home_training import HomePlan, Trainee, expected_errors, train_at_home
from fedlora.arrays import Floats, Int64
from fedlora.config.sections import HOME_CHOOSES_ON, HOME_COMPARES_ON, HOME_VALIDATION, HomeConfig
from fedlora.data.shards import Shard
from fedlora.errors import InputError
from fedlora.gradients.lora_layers import Scale
from fedlora.models.adapters import PARTS, AdapterState, kind
from fedlora.models.trainable import Trainable
from fedlora.runs.comparison import text_numbers

COMPARED_FROM = 30
"""The fewest steps after which a model alone may stop: fewer say little of what more will bring."""
WEIGHTS = (0.5, 0.75, 1.0)
"""Weights of the adapter that was trained at home, against the shared one; fine-tune has only 1."""


class Model(enum.Enum):
    """The two models that are trained at home."""

    ALONE = "alone"
    OWN = "own"


def models_at_home(
    work: Trainable, homes: Sequence[Home], settings: HomeConfig, physical_batch: int
) -> list[HomeModels]:
    """Train the models of institutions at home.

    Each institution holds back a fifth of its training records, trains both models on the rest,
    and chooses by the expected errors on what it held back: for the model alone the learning rate
    (one of ``home.learning-rate``) and the number of steps (it trains until twice as many have no
    fewer errors, and at most ``home.steps``), for the own model the rate and the weight of the
    trained adapter in its mean with the shared one. With few records it takes the first learning
    rate, the smallest weight and all steps, but `HOME_STEPS_WITHOUT_CHOICE` at most. Then it trains
    both models anew by these settings, on all its training records.

    The own model takes as many steps as the model alone, and a weight of a half or more. The shared
    adapter was trained on the records held back too, so these would choose few steps and a small
    weight for no other reason than that. With ``interpolate`` it takes the shared factors and,
    where the model has a head, a fresh one, which moves at ``home.head-learning-rate`` as that of
    the model alone.

    Where the model alone is right on clearly more of the records held back (`is_better`), it is the
    own model too. Where training gives no numbers, the own model is the shared adapter (weight 0).

    The runs of a sweep train a model alone once (`client.alone_models`).

    Args:
        work: The model; a fresh adapter is its ``start``.
        homes: The institutions.
        settings: The section ``[home]``.
        physical_batch: Records in memory at a time.

    Returns:
        The models of each institution.

    Raises:
        InputError: If training a model alone gives no numbers.

    Reference: interpolation with the shared model: Wortsman et al. (2022), arXiv 2109.01903;
    a penalty on the distance to it: Li et al. (2021), Ditto, arXiv 2012.04221, which is MR-MTL of
    Liu et al. (2022), arXiv 2206.07902.
    """
    trainer = _Trainer(work, homes, settings, physical_batch)
    return trainer.own(trainer.alone(compared=True))


def models_alone(
    work: Trainable, homes: Sequence[Home], settings: HomeConfig, physical_batch: int
) -> list[AloneModel]:
    """Train the models alone of institutions, as `models_at_home` does, and no own models.

    Returns:
        The model alone of each institution, which is compared with no own one (``right`` is empty).

    Raises:
        InputError: If training gives no numbers.
    """
    found = _Trainer(work, homes, settings, physical_batch).alone(compared=False)
    return [found[i] for i in range(len(homes))]


def is_better(alone: Sequence[bool], own: Sequence[bool], copy_of: Int64) -> bool:
    """Whether the model alone is right on more records than the own one, beyond chance.

    The difference must be above its standard error if the models were equally good, which is the
    root of the sum of its squares over the different records. Copies count as one: a model gives
    them one answer. Where no record has a copy the sum is the number of records on which one model
    is right and the other wrong.

    Args:
        alone: Whether the model alone is right on each record ``(n,)``.
        own: The same of the own model.
        copy_of: The number of each record's kind ``(n,)``, equal for copies; from 0.

    Reference: McNemar (1947), Note on the sampling error of the difference between correlated
    proportions.
    """
    apart = np.asarray(alone, dtype=np.float64) - np.asarray(own, dtype=np.float64)
    by_kind = np.bincount(copy_of, weights=apart)
    return bool(by_kind.sum() > math.sqrt((by_kind**2).sum()))


Candidate = TypeVar("Candidate")
Trials = Mapping[Setting, Mapping[int, AdapterState]]
"""Setting -> number of an institution -> its adapter."""


class _Trainer:
    """Trains and chooses the models of several institutions under one configuration."""

    def __init__(
        self, work: Trainable, homes: Sequence[Home], settings: HomeConfig, physical_batch: int
    ) -> None:
        work.train_only([part for part in PARTS if part in {kind(name) for name in work.start}])
        self.work, self.homes, self.settings = work, homes, settings
        self.physical_batch = physical_batch
        self.bases = [home.shared for home in homes]  # mixed with the trained adapters
        if settings.method == "dual":
            self.bases = [beside(home.shared, work) for home in homes]
        self.starts = self.bases  # of the own models
        self.fresh_head = settings.method == "interpolate"
        if self.fresh_head:
            head = work.start.only(("head",))
            self.starts = [base.updated(head) for base in self.bases]
        self.weights = (1.0,) if settings.method == "fine-tune" else WEIGHTS
        self.default = Setting(settings.steps_without_choice, settings.learning_rate[0])
        self.fits: dict[int, Shard] = {}  # of institutions that hold records back
        self.held: dict[int, Shard] = {}
        for i, home in enumerate(homes):
            fit, held = _split(home)
            if len(held) >= HOME_COMPARES_ON:
                self.fits[i], self.held[i] = fit, held

    def alone(self, *, compared: bool) -> dict[int, AloneModel]:
        """The model alone of each institution.

        Args:
            compared: Whether the own model is chosen against it.

        Raises:
            InputError: If training gives no numbers.
        """
        found: dict[int, AloneModel] = {}
        for i, home in enumerate(self.homes):
            if (kept := alone_models.read(home.alone, self.work.start)) is not None:
                found[i] = kept
        missing = [i for i in range(len(self.homes)) if i not in found]
        tried = [i for i in missing if compared or self._chooses(i)]
        most = checkpoints(self.settings.steps)
        trials = self._trials(Model.ALONE, dict.fromkeys(tried, most))
        chosen = dict.fromkeys(missing, self.default) | {
            i: setting for i, (setting, _) in self._fewest(trials.items()).items()
        }
        right = self._right(
            {i: trials[chosen[i]][i] for i in missing if compared and i in self.held}
        )
        for i, adapter in self._train_on_all(Model.ALONE, chosen).items():
            if not adapter.is_finite():
                raise InputError(
                    f"the model alone has no finite values after {chosen[i].steps} steps at "
                    f"{chosen[i].learning_rate:g}, so nothing can be compared with it; lower "
                    "home.learning-rate, home.head-learning-rate or home.steps (with fedlora home: "
                    "--steps)"
                )
            held_back = len(self.held[i]) if i in tried and i in self.held else 0
            found[i] = AloneModel(adapter, chosen[i], right.get(i, ()), held_back)
            alone_models.write(self.homes[i].alone, found[i])
        return found

    def own(self, alone: Mapping[int, AloneModel]) -> list[HomeModels]:
        """The models of each institution, of which the own one is made here.

        Args:
            alone: The models alone.
        """
        trials = self._trials(Model.OWN, {i: (one.setting.steps,) for i, one in alone.items()})
        chosen = dict.fromkeys(alone, (self.default, self.weights[0])) | {
            i: (setting, weight if np.isfinite(errors) else 0.0)
            for i, ((setting, weight), errors) in self._fewest(self._mixtures(trials)).items()
        }
        for i, (setting, _) in chosen.items():
            if i in self.held and not trials[setting][i].is_finite():
                chosen[i] = setting, 0.0
        right = self._right(
            {
                i: mixed(self.bases[i], trials[setting][i], weight)
                for i, (setting, weight) in chosen.items()
                if i in self.held
            }
        )
        kept = {i for i in right if is_better(alone[i].right, right[i], text_numbers(self.held[i]))}
        settings = {i: setting for i, (setting, _) in chosen.items() if i not in kept}
        trained = self._train_on_all(Model.OWN, settings)
        found: list[HomeModels] = []
        for i in range(len(self.homes)):
            one, (setting, weight) = alone[i], chosen[i]
            own = one.adapter
            if i not in kept:
                weight = weight if trained[i].is_finite() else 0.0
                own = mixed(self.bases[i], trained[i], weight)
            choice = Choice(
                alone=one.setting,
                own=setting,
                weight=weight,
                keeps_alone=i in kept,
                held_back=one.held_back,
            )
            found.append(HomeModels(alone=one.adapter, own=own, choice=choice))
        return found

    def _trials(self, model: Model, steps: Mapping[int, tuple[int, ...]]) -> Trials:
        """Train one model of institutions that hold records back, on the rest of their records.

        Args:
            model: The model.
            steps: Number of an institution -> the steps to try. Institutions that choose train by
                every rate, those that only compare by the default setting.
        """
        fits = {i: self.fits[i] for i in steps if i in self.fits}
        tried = {i: steps[i] if self._chooses(i) else (self.default.steps,) for i in fits}
        found: dict[Setting, dict[int, AdapterState]] = {}
        for rate in self.settings.learning_rate:
            if rate != self.default.learning_rate:
                fits = {i: shard for i, shard in fits.items() if self._chooses(i)}
            if not fits:
                break
            for i, adapters in self._train(model, fits, tried, rate, "fit").items():
                for count, adapter in zip(tried[i], adapters, strict=False):  # it may stop early
                    found.setdefault(Setting(count, rate), {})[i] = adapter
        rates = self.settings.learning_rate
        in_order = sorted(found, key=lambda s: (rates.index(s.learning_rate), s.steps))
        return {setting: found[setting] for setting in in_order}  # of equal errors the first counts

    def _chooses(self, i: int) -> bool:
        return len(self.held.get(i, ())) >= HOME_CHOOSES_ON

    def _train_on_all(self, model: Model, chosen: Mapping[int, Setting]) -> dict[int, AdapterState]:
        """Train one model of some institutions on all their records, by the chosen settings.

        The chosen trial is not trained on instead: Adam, begun anew at its end, takes steps of full
        length whatever the gradient, which cost models alone two points (benchmarks/LOG.md).
        """
        found: dict[int, AdapterState] = {}
        for rate in dict.fromkeys(setting.learning_rate for setting in chosen.values()):
            numbers = [i for i, setting in chosen.items() if setting.learning_rate == rate]
            whole = {i: self.homes[i].shard for i in numbers}
            steps = {i: (chosen[i].steps,) for i in numbers}
            trained = self._train(model, whole, steps, rate, "all")
            found |= {i: adapter for i, (adapter,) in trained.items()}
        return found

    def _train(
        self,
        model: Model,
        shards: Mapping[int, Shard],
        steps: Mapping[int, tuple[int, ...]],
        rate: float,
        purpose: str,
    ) -> dict[int, list[AdapterState]]:
        """Train one model of some institutions: number -> its adapters after those steps."""
        settings, alone = self.settings, model is Model.ALONE
        plan = HomePlan(
            batch_size=settings.batch_size,
            physical_batch=self.physical_batch,
            learning_rate=rate,
            head_learning_rate=settings.head_learning_rate if alone or self.fresh_head else rate,
            proximal=settings.proximal if settings.method == "ditto" and not alone else 0.0,
        )
        trainees = [
            Trainee(
                shard=shard,
                start=self.work.start if alone else self.starts[i],
                steps=steps[i],
                source=self.homes[i].source.child(model.value, purpose),
                held=self.held[i] if len(steps[i]) > 1 and steps[i][0] >= COMPARED_FROM else None,
            )
            for i, shard in shards.items()
        ]
        return dict(zip(shards, train_at_home(self.work, trainees, plan), strict=True))

    def _mixtures(
        self, trials: Trials
    ) -> Iterator[tuple[tuple[Setting, float], Mapping[int, AdapterState]]]:
        """The means of own models' trials with the shared adapters, by setting and weight."""
        for setting, adapters in trials.items():
            for weight in self.weights:
                means = {i: mixed(self.bases[i], a, weight) for i, a in adapters.items()}
                yield (setting, weight), means

    def _fewest(
        self, candidates: Iterable[tuple[Candidate, Mapping[int, AdapterState]]]
    ) -> dict[int, tuple[Candidate, float]]:
        """The candidate with the fewest expected errors on the records held back, and these.

        Institutions that do not choose are left out.
        """
        found: dict[int, tuple[Candidate, float]] = {}
        for candidate, adapters in candidates:
            choosing = {i: adapter for i, adapter in adapters.items() if self._chooses(i)}
            if not choosing:
                continue
            for i, errors in zip(choosing, self._errors(choosing), strict=True):
                if i not in found or errors < found[i][1]:
                    found[i] = candidate, float(errors)
        return found

    def _errors(self, adapters: Mapping[int, AdapterState]) -> Floats:
        """The expected errors of each institution's adapter; infinite if they are no number."""
        shards = [self.held[i] for i in adapters]
        errors = expected_errors(self.work, list(adapters.values()), shards, self.physical_batch)
        return np.nan_to_num(errors, nan=np.inf, posinf=np.inf)

    def _right(self, adapters: Mapping[int, AdapterState]) -> dict[int, tuple[bool, ...]]:
        """Whether each institution's adapter is right on each of the records held back."""
        found: dict[int, tuple[bool, ...]] = {}
        for i, adapter in adapters.items():
            adapter.load_into(self.work.model)
            said, _ = self.work.task.predict(self.work.model, self.held[i], self.work.labels)
            truth: list[int] = self.held[i].targets.tolist()
            labels = [self.work.labels[target] for target in truth]
            found[i] = tuple(a == b for a, b in zip(said, labels, strict=True))
        return found


def checkpoints(most: int) -> tuple[int, ...]:
    """The numbers of steps that a model alone may take: ``most``, its half, its quarter, and so on.

    Beyond the quarter it is halved as long as `COMPARED_FROM` steps are left.
    """
    found = [most]
    while len(found) < 3 or found[-1] >= 2 * COMPARED_FROM:
        found.append(max(1, found[-1] // 2))
    return tuple(sorted(set(found)))


def beside(shared: AdapterState, work: Trainable) -> AdapterState:
    """Fresh factors beside the frozen shared ones, which become a residual of the base.

    Args:
        shared: The released adapter.
        work: Its model; gives the fresh factors and the scale s of s B A.

    Returns:
        An adapter that computes what ``shared`` computes until it is trained.
    """
    scale = Scale.of_model(work.model)
    whole, had_residuals = shared.single(scale)
    return whole.as_residual(work.start, Scale(whole.rank, False) if had_residuals else scale)


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


def _split(home: Home) -> tuple[Shard, Shard]:
    """The records that a model is fitted to, and those that are held back.

    Copies of a record are on one side: a model is right on those that it was fitted to. At most
    `HOME_VALIDATION` of the records are held back, and of the different ones: fewer where most
    records are copies of a few.
    """
    shard = home.shard
    copy_of = text_numbers(shard)
    copies, kinds = np.bincount(copy_of), list[int]()
    room, most = (round(HOME_VALIDATION * count) for count in (len(shard), len(copies)))
    order = home.source.child("validation").permutation(len(shard))
    for kind_of in dict.fromkeys(copy_of[order].tolist()):
        if copies[kind_of] <= room and len(kinds) < most:
            room -= copies[kind_of]
            kinds.append(kind_of)
    held = np.isin(copy_of, kinds)
    return shard.select(np.flatnonzero(~held)), shard.select(np.flatnonzero(held))
