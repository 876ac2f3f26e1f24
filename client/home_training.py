"""Training at home: steps without DP on one institution's records, for its own use.

Several institutions train in one pass where the model allows it: each example is computed with the
adapter of its own institution.
"""

# torch types some of its functions in part only
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import contextlib
import itertools
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from client.passes import equal_passes, packed_losses, plain_passes
from client.training import add_gradients, proximal_term, shuffled, training_steps
from fedlora.data.shards import Shard, concatenate
from fedlora.gradients import lora_layers, packing
from fedlora.models.adapters import AdapterState, kind
from fedlora.models.trainable import Trainable
from fedlora.privacy.streams import RandomSource

PASS_TOKENS = 2048
"""Tokens of a shared pass: gradients are summed, so that memory holds activations only."""


@dataclass(frozen=True, kw_only=True)
class HomePlan:
    """The steps of training at home, by Adam.

    Args:
        batch_size: Records of a step; an institution with fewer takes all it has.
        physical_batch: Records in memory at a time.
        learning_rate: Step size of factors and magnitudes.
        head_learning_rate: Step size of a head.
        proximal: Ditto's mu (Li et al. 2021, arXiv 2012.04221): mu (w - start) is added to the
            gradient.
    """

    batch_size: int
    physical_batch: int
    learning_rate: float
    head_learning_rate: float
    proximal: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """One adapter that is trained at home.

    Args:
        shard: The records to train on; at least one.
        start: The adapter to start from.
        steps: The numbers of steps after which the adapter is wanted, ascending, from 1.
        source: The random source of shuffling and dropout.
        held: Records held back, at least one: it stops at the first number of ``steps`` after which
            it has no fewer expected errors on these than after the number before. None: it goes on.
    """

    shard: Shard
    start: AdapterState
    steps: tuple[int, ...]
    source: RandomSource
    held: Shard | None = None


def train_at_home(
    work: Trainable, trainees: Sequence[Trainee], plan: HomePlan
) -> list[list[AdapterState]]:
    """Train adapters on their own records, without DP.

    The adapter after s steps is the mean of the iterates s // 2 + 1 to s. The mean stands in for a
    decaying step size (Polyak & Juditsky 1992), and needs no number of steps beforehand.

    Args:
        work: The model. Its trained parameters are those that are trained here; afterwards they
            may have any values.
        trainees: Any number of them.
        plan: The steps.

    Returns:
        For each trainee an adapter for each entry of its ``steps`` that it reached.

    Raises:
        ValueError: If a trainee has no records.
    """
    if not all(len(trainee.shard) for trainee in trainees):
        raise ValueError("training at home needs at least one record")
    if _can_share(work, [trainee.start for trainee in trainees]):
        return _train_together(work, trainees, plan)
    return [_train_one(work, trainee, plan) for trainee in trainees]


def expected_errors(
    work: Trainable, adapters: Sequence[AdapterState], shards: Sequence[Shard], physical_batch: int
) -> list[float]:
    """The expected share of wrong answers of each adapter on records of its own, in [0, 1].

    It is the mean of 1 - e^-loss: one minus the probability of the right class. Unlike the mean
    loss it is not ruled by the few records of which a model is sure and wrong.

    Args:
        work: The model; it has one of the adapters afterwards.
        adapters: The adapters.
        shards: The records of each, at least one.
        physical_batch: Records in memory at a time.
    """
    sums = torch.zeros(len(adapters), dtype=torch.float64)
    with torch.no_grad():
        if _can_share(work, adapters):
            owner = np.repeat(np.arange(len(shards)), [len(shard) for shard in shards])
            values = _stacked(work, adapters)
            passes = _shared_passes(work, concatenate(shards), owner, values, physical_batch)
            with contextlib.closing(passes):
                for rows, losses, _ in passes:
                    sums.index_add_(0, torch.from_numpy(owner[rows]), _errors(losses))
        else:
            for i, (adapter, shard) in enumerate(zip(adapters, shards, strict=True)):
                adapter.load_into(work.model)
                rows = np.arange(len(shard))
                plain = plain_passes(work, shard, rows, physical_batch, None)
                with contextlib.closing(plain):
                    sums[i] = sum(float(_errors(losses).sum()) for losses in plain)
    return [float(total) / len(shard) for total, shard in zip(sums, shards, strict=True)]


def _errors(losses: torch.Tensor) -> torch.Tensor:
    return -torch.expm1(-losses.double())


def _can_share(work: Trainable, adapters: Sequence[AdapterState]) -> bool:
    """Whether several adapters can share passes: they differ in trained tensors only."""
    if (
        not adapters
        or work.first_position is None
        or work.per_sample.has_magnitude
        or work.per_sample.has_dropout
        or work.base.model.device.type != "cpu"
    ):
        return False
    named, (first, *others) = lora_layers.trained(work.model), adapters
    return all(
        other.keys() == first.keys()
        and all(other[n].shape == t.shape for n, t in first.items())
        and all(torch.equal(other[n], t) for n, t in first.items() if n not in named)
        for other in others
    )


class _TailMeans:
    """Means of the second half of the iterates, at chosen steps.

    Args:
        steps: The chosen steps.
        values: The iterates, which change in place.
    """

    def __init__(self, steps: Iterable[int], values: Sequence[torch.Tensor]) -> None:
        self._steps, self._values = tuple(steps), values
        self.means: dict[int, list[torch.Tensor]] = {}

    def add(self, step: int) -> None:
        """Include the iterate after this step, from 1."""
        for wanted in self._steps:
            count = step - wanted // 2
            if count == 1:
                self.means[wanted] = [value.detach().clone() for value in self._values]
            elif count > 1 and step <= wanted:
                for mean, value in zip(self.means[wanted], self._values, strict=True):
                    mean.lerp_(value.detach(), 1 / count)


def _optimizer(named: Mapping[str, torch.nn.Parameter], plan: HomePlan) -> torch.optim.Optimizer:
    rates: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in named.items():
        rate = plan.head_learning_rate if kind(name) == "head" else plan.learning_rate
        rates.setdefault(rate, []).append(parameter)
    groups = [{"params": members, "lr": rate} for rate, members in rates.items()]
    return torch.optim.Adam(groups, fused=True)


class _Progress:
    """Which trainees go on, by the expected errors on records that they hold back."""

    def __init__(self, work: Trainable, trainees: Sequence[Trainee], plan: HomePlan) -> None:
        self._work, self._trainees, self._plan = work, trainees, plan
        self._errors = [math.inf] * len(trainees)

    def going_on(self, reached: Mapping[int, AdapterState], steps: int) -> set[int]:
        """The numbers of the trainees that go on, of those that reached these steps.

        Args:
            reached: Number of a trainee -> its adapter after these steps.
            steps: The steps, one of each trainee's.
        """
        more = {i for i in reached if self._trainees[i].steps[-1] > steps}
        held = {i: shard for i in sorted(more) if (shard := self._trainees[i].held) is not None}
        adapters = [reached[i] for i in held]
        errors = expected_errors(
            self._work, adapters, list(held.values()), self._plan.physical_batch
        )
        for i, measured in zip(held, errors, strict=True):
            if not measured < self._errors[i]:
                more.discard(i)
            self._errors[i] = measured
        return more


def _train_one(work: Trainable, trainee: Trainee, plan: HomePlan) -> list[AdapterState]:
    trainee.start.load_into(work.model)
    named = lora_layers.trained(work.model)
    pull = proximal_term(list(named.values()), plan.proximal)
    optimizer, shard = _optimizer(named, plan), trainee.shard
    tail = _TailMeans(trainee.steps, list(named.values()))
    size, source = min(plan.batch_size, len(shard)), trainee.source
    batches = shuffled(len(shard), size, trainee.steps[-1], source.child("shuffle"))
    progress = _Progress(work, [trainee], plan)
    found: list[AdapterState] = []
    for done, wanted in itertools.pairwise((0, *trainee.steps)):
        with training_steps(work, private=False):
            for step in range(done + 1, wanted + 1):
                rows, dropout = next(batches), source.child("dropout", step)
                optimizer.zero_grad()
                add_gradients(work, shard, rows, plan.physical_batch, dropout)
                pull()
                optimizer.step()
                tail.add(step)
        means = (mean.cpu() for mean in tail.means.pop(wanted))
        found.append(trainee.start.updated(dict(zip(named, means, strict=True))))
        if trainee.held is None:
            continue
        iterate = AdapterState.read(work.model)
        if not progress.going_on({0: found[-1]}, wanted):
            break
        iterate.load_into(work.model)
    return found


def _train_together(
    work: Trainable, trainees: Sequence[Trainee], plan: HomePlan
) -> list[list[AdapterState]]:
    """Train with values ``(trainees, *shape)`` of each parameter, in shared packed passes.

    A trainee that has taken its last step moves on without a gradient, unseen.
    """
    stacked = {
        name: torch.nn.Parameter(values)
        for name, values in _stacked(work, [t.start for t in trainees]).items()
    }
    pull = proximal_term(list(stacked.values()), plan.proximal)
    optimizer = _optimizer(stacked, plan)
    checkpoints = sorted({steps for t in trainees for steps in t.steps})
    tail = _TailMeans(checkpoints, list(stacked.values()))
    batches = [
        shuffled(
            len(t.shard),
            min(plan.batch_size, len(t.shard)),
            t.steps[-1],
            t.source.child("shuffle"),
        )
        for t in trainees
    ]
    for values in stacked.values():
        values.grad = torch.zeros_like(values)
    found: list[list[AdapterState]] = [[] for _ in trainees]
    progress = _Progress(work, trainees, plan)
    training = list(range(len(trainees)))
    for done, wanted in itertools.pairwise((0, *checkpoints)):
        with training_steps(work, private=False):
            for step in range(done + 1, wanted + 1):
                optimizer.zero_grad(set_to_none=False)
                parts = {i: trainees[i].shard.select(np.sort(next(batches[i]))) for i in training}
                _add_shared_gradients(work, parts, stacked, plan.physical_batch)
                pull()
                optimizer.step()
                tail.add(step)
        means = dict(zip(stacked, tail.means.pop(wanted), strict=True))
        reached = {
            i: trainees[i].start.updated({name: mean[i].clone() for name, mean in means.items()})
            for i in training
            if wanted in trainees[i].steps
        }
        for i, adapter in reached.items():
            found[i].append(adapter)
        more = progress.going_on(reached, wanted)
        training = [i for i in training if i not in reached or i in more]
        if not training:
            break
    return found


def _add_shared_gradients(
    work: Trainable,
    shards: Mapping[int, Shard],
    stacked: Mapping[str, torch.nn.Parameter],
    physical_batch: int,
) -> None:
    """Add the gradient of the mean loss over each shard to that adapter's row of the gradients.

    Args:
        work: The model.
        shards: Number of an adapter -> records, ascending, each at least one.
        stacked: The values ``(adapters, *shape)`` of each trained parameter, with gradients.
        physical_batch: Records in memory at a time.
    """
    numbers = torch.tensor(list(shards))
    sizes = [len(shard) for shard in shards.values()]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values = {name: each.detach()[numbers] for name, each in stacked.items()}
    records = concatenate(list(shards.values()))
    named = lora_layers.trained(work.model)
    passes = _shared_passes(work, records, owner, values, physical_batch)
    with contextlib.closing(passes):
        for rows, losses, owners in passes:
            share = torch.tensor([1 / sizes[i] for i in owner[rows]], dtype=losses.dtype)
            (losses * share).sum().backward()
            collected = work.per_sample.collect()
            for name, parameter in named.items():
                gradient = stacked[name].grad
                assert gradient is not None
                gradient.index_add_(0, numbers[owners], collected.pop(parameter))


def _stacked(work: Trainable, adapters: Sequence[AdapterState]) -> dict[str, torch.Tensor]:
    """The values ``(adapters, *shape)`` of each trained parameter, by name in an adapter.

    The model gets the tensors that are not trained, in which the adapters agree.
    """
    adapters[0].load_into(work.model)
    return {
        name: torch.stack([each[name] for each in adapters])
        for name in lora_layers.trained(work.model)
    }


def _shared_passes(
    work: Trainable,
    shard: Shard,
    owner: np.ndarray,
    values: Mapping[str, torch.Tensor],
    physical_batch: int,
) -> Generator[tuple[np.ndarray, torch.Tensor, slice]]:
    """Packed passes over rows of several adapters, each row with its own adapter's values.

    Args:
        work: The model.
        shard: The rows.
        owner: The number of each row's adapter ``(rows,)``, from 0, ascending, each at least once.
        values: The values of each trained parameter ``(adapters, *shape)``.
        physical_batch: Records in memory at a time.

    Yields:
        The rows of a pass, their losses ``(n,)``, and the adapters of these rows. The caller runs
        backward and ``collect`` before the next pass.
    """
    inner = {id(p): name for name, p in work.parameters().items()}
    inner_names = {name: inner[id(p)] for name, p in lora_layers.trained(work.model).items()}
    tokens = min(PASS_TOKENS, physical_batch * work.task.encoding.max_length)
    for rows in equal_passes(shard.lengths, tokens, len(shard)):
        owners = slice(int(owner[rows[0]]), int(owner[rows[-1]]) + 1)
        own = {inner_names[name]: each.detach()[owners] for name, each in values.items()}
        unit = torch.from_numpy(owner[rows] - owners.start)
        total = packing.row_size(int(shard.lengths[rows].sum()))
        with (
            work.per_sample.expanded(owners.stop - owners.start, unit, own),
            packed_losses(work, shard, rows, None, total, len(rows)) as losses,
        ):
            yield rows, losses, owners
