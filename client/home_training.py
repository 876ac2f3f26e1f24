"""Training at home: steps without DP on one institution's records, for its own use.

Several institutions train in one pass where the model allows it: each example is computed with the
adapter of its own institution.
"""

# torch types some of its functions in part only
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from client.passes import fill_passes, packed_losses, packed_tokens, plain_passes
from client.training import shuffled, training_steps
from fedlora.adapters import AdapterState, kind, parameters
from fedlora.per_sample import pop_grad_sample
from fedlora.shards import Shard, concatenate
from fedlora.streams import RandomSource
from fedlora.trainable import Trainable


@dataclass(frozen=True, kw_only=True)
class HomePlan:
    """The steps of training at home, by Adam.

    Args:
        batch_size: Records of a step; an institution with fewer takes all it has.
        physical_batch: Records in memory at a time.
        learning_rate: Step size of factors and magnitudes.
        head_learning_rate: Step size of a head.
        proximal: Ditto's mu (Li et al. 2021, arXiv 2012.04221): mu (w - w_start) is added to the
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
    """

    shard: Shard
    start: AdapterState
    steps: tuple[int, ...]
    source: RandomSource


def train_at_home(
    work: Trainable, trainees: Sequence[Trainee], plan: HomePlan
) -> list[list[AdapterState]]:
    """Train adapters on their own records, without DP.

    The adapter after s steps is the mean of the iterates s // 2 + 1 to s. The mean stands in for a
    decaying step size (Polyak & Juditsky 1992), and needs no number of steps beforehand.

    Args:
        work: The model. Its trained parameters are those that are trained here; their values are
            the last trainee's afterwards.
        trainees: Any number of them.
        plan: The steps.

    Returns:
        For each trainee an adapter for each entry of its ``steps``.
    """
    together = (
        work.first_position is not None
        and not work.per_sample.has_magnitude
        and not work.per_sample.has_dropout
        and work.base.model.device.type == "cpu"
    )
    if together:
        return _train_together(work, trainees, plan)
    return [_train_one(work, trainee, plan) for trainee in trainees]


def mean_loss(work: Trainable, adapter: AdapterState, shard: Shard, physical_batch: int) -> float:
    """Mean loss of an adapter on records, in nats."""
    adapter.load_into(work.model)
    total = 0.0
    rows = np.arange(len(shard))
    with torch.no_grad():
        passes = plain_passes(work, shard, rows, physical_batch, _no_dropout)
        with contextlib.closing(passes):
            for losses in passes:
                total += float(losses.sum())
    return total / len(shard)


def _no_dropout(row: int) -> RandomSource:
    return RandomSource.seeded("unused", row)


class _TailMeans:
    """Means of the second half of the iterates, at chosen steps.

    Args:
        steps: The chosen steps, ascending.
        values: The iterates, which change in place.
    """

    def __init__(self, steps: Iterable[int], values: Sequence[torch.Tensor]) -> None:
        self._steps, self._values = tuple(steps), values
        self._sums = [torch.zeros_like(v, dtype=torch.float64) for v in values]
        self._halves: dict[int, list[torch.Tensor]] = {
            s: [total.clone() for total in self._sums] for s in self._steps if s == 1
        }
        self.means: dict[int, list[torch.Tensor]] = {}

    def add(self, step: int) -> None:
        """Count the iterate after this step, from 1."""
        for total, value in zip(self._sums, self._values, strict=True):
            total.add_(value.detach())
        for wanted in self._steps:
            if step == wanted // 2:
                self._halves[wanted] = [total.clone() for total in self._sums]
            if step == wanted:
                count = wanted - wanted // 2
                self.means[wanted] = [
                    ((total - half) / count).to(value.dtype)
                    for total, half, value in zip(
                        self._sums, self._halves[wanted], self._values, strict=True
                    )
                ]


def _optimizer(named: Mapping[str, torch.nn.Parameter], plan: HomePlan) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [parameter],
            "lr": plan.head_learning_rate if kind(name) == "head" else plan.learning_rate,
        }
        for name, parameter in named.items()
    ]
    return torch.optim.Adam(groups)


def _trained(work: Trainable) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by their names in an adapter."""
    return {name: p for name, p in parameters(work.model).items() if p.requires_grad}


def _train_one(work: Trainable, trainee: Trainee, plan: HomePlan) -> list[AdapterState]:
    trainee.start.load_into(work.model)
    named = _trained(work)
    origin = [p.detach().clone() for p in named.values()]
    optimizer, shard = _optimizer(named, plan), trainee.shard
    tail = _TailMeans(trainee.steps, list(named.values()))
    size, source = min(plan.batch_size, len(shard)), trainee.source
    with training_steps(work, private=False):
        batches = shuffled(len(shard), size, trainee.steps[-1], source.child("shuffle"))
        for step, rows in enumerate(batches, 1):
            dropout = functools.partial(source.child("dropout", step).child, "row")
            optimizer.zero_grad()
            passes = plain_passes(work, shard, rows, plan.physical_batch, dropout)
            with contextlib.closing(passes):
                for losses in passes:
                    (losses.sum() / len(rows)).backward()
            for p, start in zip(named.values(), origin, strict=True):
                if plan.proximal and p.grad is not None:
                    p.grad.add_(p.detach() - start, alpha=plan.proximal)
            optimizer.step()
            tail.add(step)
    return [
        trainee.start.updated(dict(zip(named, tail.means[steps], strict=True)))
        for steps in trainee.steps
    ]


def _train_together(
    work: Trainable, trainees: Sequence[Trainee], plan: HomePlan
) -> list[list[AdapterState]]:
    """Train with values ``(trainees, *shape)`` of each parameter, in shared packed passes.

    A trainee that has taken its last step moves on with a gradient of zero, unseen.
    """
    if not trainees:
        return []
    trainees[0].start.load_into(work.model)  # the residual, which all share
    named = _trained(work)
    inner = {id(p): name for name, p in work.parameters().items()}
    stacked = {
        name: torch.nn.Parameter(torch.stack([t.start[name] for t in trainees]).clone())
        for name in named
    }
    origin = {name: values.detach().clone() for name, values in stacked.items()}
    optimizer = _optimizer(stacked, plan)
    tail = _TailMeans(sorted({s for t in trainees for s in t.steps}), list(stacked.values()))
    last = max(t.steps[-1] for t in trainees)
    batches = [
        shuffled(len(t.shard), min(plan.batch_size, len(t.shard)), last, t.source.child("shuffle"))
        for t in trainees
    ]
    with training_steps(work, private=False):
        for step in range(1, last + 1):
            gradients = {name: torch.zeros_like(values) for name, values in stacked.items()}
            active = [i for i, t in enumerate(trainees) if step <= t.steps[-1]]
            parts = [trainees[i].shard.select(np.sort(next(batches[i]))) for i in active]
            owner = np.repeat(active, [len(part) for part in parts])
            weight = np.repeat([1 / len(part) for part in parts], [len(part) for part in parts])
            values = {inner[id(p)]: stacked[name] for name, p in named.items()}
            for rows, losses, places in _shared_passes(
                work, concatenate(parts), owner, values, plan.physical_batch
            ):
                scale = torch.from_numpy(weight[rows]).to(losses.dtype)
                (losses * scale).sum().backward()
                work.per_sample.collect()
                for name, parameter in named.items():
                    gradients[name].index_add_(0, places, pop_grad_sample(name, parameter))
            for name, values in stacked.items():
                values.grad = gradients[name]
                if plan.proximal:
                    values.grad.add_(values.detach() - origin[name], alpha=plan.proximal)
            optimizer.step()
            tail.add(step)
    return [
        [
            trainee.start.updated(
                {n: means[i] for n, means in zip(named, tail.means[steps], strict=True)}
            )
            for steps in trainee.steps
        ]
        for i, trainee in enumerate(trainees)
    ]


def _shared_passes(
    work: Trainable,
    shard: Shard,
    owner: np.ndarray,
    values: Mapping[str, torch.Tensor],
    physical_batch: int,
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Packed passes over rows of several trainees, each row with its owner's values.

    Yields:
        The rows of a pass, their losses ``(n,)``, and the numbers of the trainees that have rows in
        it ``(units,)`` int64. The caller runs backward and ``collect`` before the next pass.
    """
    total, widths = packed_tokens(work, physical_batch), work.task.widths(shard)
    for part in fill_passes(shard.lengths, total, physical_batch):
        rows = part[np.argsort(widths[part], kind="stable")]
        owners, unit = np.unique(owner[rows], return_inverse=True)
        places = torch.from_numpy(owners)
        own = {name: stacked.detach()[places] for name, stacked in values.items()}
        with (
            work.per_sample.expanded(len(owners), torch.from_numpy(unit), own),
            packed_losses(work, shard, rows, _no_dropout, total, physical_batch) as losses,
        ):
            yield rows, losses, places
