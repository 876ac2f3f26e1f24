"""An institution's local steps, with and without DP; neither network nor ledger is touched here."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from client.dp_sgd import PoissonSampler, PrivateOptimizer, check_sampler
from fedlora import tasks
from fedlora.shards import Shard
from fedlora.streams import RandomSource
from fedlora.trainable import Trainable, training_mode

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True, kw_only=True)
class LocalPlan:
    """What one round of local training does.

    Args:
        steps: Optimizer steps.
        physical_batch: Records in memory at a time.
        optimizer: A key of ``OPTIMIZERS``.
        learning_rate: Its step size.
        proximal: FedProx's mu (Li et al. 2020, arXiv 1812.06127): mu (w - w_global) is added to
            each step's gradient. Under DP that comes after clipping and noise and follows from
            what was released before, so it is post-processing.
    """

    steps: int
    physical_batch: int
    optimizer: str
    learning_rate: float
    proximal: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PrivacyMechanism:
    """The sampled Gaussian mechanism that every step of a private round is.

    Args:
        noise_multiplier: Standard deviation of the noise over ``max_grad_norm``.
        sample_rate: Probability of a unit to be in a step's batch.
        normaliser: Public expected number of units a step; the gradient sum is divided by it.
        max_grad_norm: Clipping bound.
        clipping: ``flat`` or ``automatic``.
    """

    noise_multiplier: float
    sample_rate: float
    normaliser: float
    max_grad_norm: float
    clipping: str


def train(
    trainable: Trainable, shard: Shard, plan: LocalPlan, batch_size: int, source: RandomSource
) -> float:
    """Plain steps over shuffled records.

    Args:
        trainable: Holds the global adapter; holds the trained one afterwards.
        shard: The institution's records.
        plan: Steps, memory, optimizer.
        batch_size: Records a step; at most the shard's.
        source: Shuffling and dropout.

    Returns:
        Mean training loss over all records seen.
    """
    parameters = list(trainable.parameters().values())
    optimizer = OPTIMIZERS[plan.optimizer](parameters, lr=plan.learning_rate)
    pull = _proximal(parameters, plan.proximal)
    size = min(batch_size, len(shard))
    total = 0.0
    with _training(trainable, private=False):
        batches = _shuffled(len(shard), size, plan.steps, source.child("shuffle"))
        for step, rows in enumerate(batches):
            dropout = source.child("dropout", step)
            optimizer.zero_grad()
            for micro in tasks.micro_batches(shard.lengths, rows, plan.physical_batch):
                losses = _losses(trainable, shard, micro, dropout)
                (losses.sum() / len(rows)).backward()
                total += float(losses.detach().sum())
            pull()
            optimizer.step()
    return total / (size * plan.steps)


def train_privately(
    trainable: Trainable,
    shard: Shard,
    plan: LocalPlan,
    mechanism: PrivacyMechanism,
    source: RandomSource,
    sampler: torch.utils.data.Sampler[list[int]] | None = None,
) -> None:
    """DP-SGD steps: the trained adapter is the only thing that comes out.

    Guarantee: with ``source`` keyed by the operating system the adapter afterwards is the output of
    ``plan.steps`` sampled Gaussian mechanisms under adding or removing one unit of ``shard`` (a
    record, or all records that share a unit), and of post-processing.

    Args:
        trainable: Holds the global adapter; holds the trained one afterwards.
        shard: The institution's records.
        plan: Steps, memory, optimizer.
        mechanism: Noise, sampling, clipping.
        source: Sampling, noise, dropout.
        sampler: Batches of unit numbers; by default Poisson over the shard's units.

    Raises:
        Refusal: When a guard trips (``guard-*``). The adapter must not be released then.
    """
    named = trainable.parameters()
    unit_rows = _rows_of_units(shard)
    sampler = sampler or PoissonSampler(
        units=len(unit_rows),
        sample_rate=mechanism.sample_rate,
        steps=plan.steps,
        source=source.child("sampling"),
    )
    check_sampler(sampler)
    optimizer = PrivateOptimizer(
        OPTIMIZERS[plan.optimizer](list(named.values()), lr=plan.learning_rate),
        names={p: name for name, p in named.items()},
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        normaliser=mechanism.normaliser,
        clipping=mechanism.clipping,
        source=source.child("noise"),
    )
    pull = _proximal(list(named.values()), plan.proximal)
    optimizer.attach_step_hook(lambda _: pull())  # Opacus calls it once noise is in the gradient
    shapes = trainable.task.shapes(shard)
    with _training(trainable, private=True):
        for step, units in enumerate(sampler):
            dropout = source.child("dropout", step)
            optimizer.zero_grad()
            for group in _groups([unit_rows[u] for u in units], shapes, plan.physical_batch):
                _unit_gradients(trainable, shard, group, shapes, plan.physical_batch, dropout)
                optimizer.signal_skip_step(True)  # clip and accumulate only
                optimizer.step()
                optimizer.zero_grad()
            # the step itself: noise on what was accumulated, also when nobody was drawn
            for p in named.values():
                p.grad_sample = p.new_zeros((0, *p.shape))  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.signal_skip_step(False)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _proximal(parameters: Sequence[torch.nn.Parameter], mu: float) -> Callable[[], None]:
    """A function that adds ``mu (w - w_now)`` to each gradient, with the values of this moment."""
    if not mu:
        return lambda: None
    start = [p.detach().clone() for p in parameters]

    def add() -> None:
        for p, origin in zip(parameters, start, strict=True):
            if p.grad is not None:
                p.grad.add_(p.detach() - origin, alpha=mu)

    return add


def _unit_gradients(
    trainable: Trainable,
    shard: Shard,
    group: Sequence[np.ndarray],
    shapes: np.ndarray,
    physical_batch: int,
    dropout: RandomSource,
) -> None:
    """Leave each unit's summed gradient (units, *shape) in ``grad_sample``.

    A unit's gradient is the same to the last bit whatever other units are there: all passes have
    ``physical_batch`` rows of one shape, and a unit's rows are summed in an order of their own.
    Memory holds one pass at a time.
    """
    everyone = np.arange(len(group))
    sums: list[torch.Tensor] | None = None
    for rows, unit_of_row, width in _passes(group, shapes, physical_batch):
        # Row i is unit i, or an index says whose it is; rows that only fill the pass are a unit
        # after the last.
        plain = np.array_equal(unit_of_row[unit_of_row < len(group)], everyone)
        index = None if plain else torch.from_numpy(unit_of_row)
        with trainable.per_sample.expanded(physical_batch if plain else len(group) + 1, index):
            _losses(trainable, shard, rows, dropout, width).sum().backward()
            trainable.per_sample.collect()
        gradients = [p.grad_sample[: len(group)] for p in trainable.parameters().values()]  # pyright: ignore
        sums = (
            gradients if sums is None else [a.add_(b) for a, b in zip(sums, gradients, strict=True)]
        )
    for p, total in zip(trainable.parameters().values(), sums or [], strict=True):
        p.grad_sample = total  # pyright: ignore[reportAttributeAccessIssue]


def _groups(
    units: Sequence[np.ndarray], shapes: np.ndarray, physical_batch: int
) -> Iterator[list[np.ndarray]]:
    """Groups of up to ``physical_batch`` units whose gradients are in memory together.

    Units of one record each are grouped by its shape, so that a group is one pass.
    """
    single = all(len(rows) == 1 for rows in units)
    group: list[np.ndarray] = []
    for rows in sorted(units, key=lambda rows: (*shapes[rows[0]], int(rows[0]))):
        other = single and group and tuple(shapes[rows[0]]) != tuple(shapes[group[0][0]])
        if len(group) == physical_batch or other:
            yield group
            group = []
        group.append(rows)
    if group:
        yield group


def _passes(
    group: Sequence[np.ndarray], shapes: np.ndarray, physical_batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Passes of exactly ``physical_batch`` rows of one shape through the model.

    A unit's rows of one shape are in one pass as far as they fit into one, so which of them are
    added to which follows from the unit alone. A pass that is not full repeats its rows.

    Yields:
        Rows of the shard (physical_batch,), the unit of each, where ``len(group)`` says that a row
        only fills, and the width to pad to.
    """
    blocks: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    for unit, rows in enumerate(group):
        for shape in sorted({tuple(map(int, shapes[row])) for row in rows}):
            alike = rows[(shapes[rows] == shape).all(1)]
            for start in range(0, len(alike), physical_batch):
                block = (unit, alike[start : start + physical_batch])
                blocks.setdefault(shape, []).append(block)
    for shape in sorted(blocks):
        for held in _packed(blocks[shape], physical_batch):
            rows = np.concatenate([part for _, part in held])
            units = np.repeat([unit for unit, _ in held], [len(part) for _, part in held])
            filler = np.full(physical_batch - len(rows), len(group))
            yield np.resize(rows, physical_batch), np.concatenate([units, filler]), shape[0]


def _packed(
    blocks: Sequence[tuple[int, np.ndarray]], physical_batch: int
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Blocks of up to ``physical_batch`` rows in lists of up to as many rows; none is split."""
    held: list[tuple[int, np.ndarray]] = []
    count = 0
    for block in blocks:
        if count + len(block[1]) > physical_batch:
            yield held
            held, count = [], 0
        held.append(block)
        count += len(block[1])
    yield held


def _rows_of_units(shard: Shard) -> list[np.ndarray]:
    """Unit number -> its rows, in a fixed order."""
    order = np.argsort(shard.units, kind="stable")
    _, starts = np.unique(shard.units[order], return_index=True)
    return np.split(order, starts[1:])


def _shuffled(records: int, size: int, steps: int, source: RandomSource) -> Iterator[np.ndarray]:
    """``steps`` batches of ``size`` rows, walking through fresh permutations."""
    queue = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(queue) < size:
            queue = np.concatenate([queue, source.permutation(records)])
        batch, queue = queue[:size], queue[size:]
        yield batch


def _losses(
    trainable: Trainable, shard: Shard, rows: np.ndarray, dropout: RandomSource, width: int = 0
) -> torch.Tensor:
    if trainable.per_sample.has_dropout:
        trainable.per_sample.draw_dropout([dropout.child("row", int(row)) for row in rows])
    task = trainable.task
    batch = task.collate(shard, rows, width)
    return task.losses(trainable.model, batch, trainable.labels)


@contextlib.contextmanager
def _training(trainable: Trainable, *, private: bool) -> Iterator[None]:
    """Training mode; under DP attention by plain products, whose result for a row is its own.

    Fused kernels differ with the mask, which transformers leaves out when no row of a batch is
    padded. On a CPU plain products are faster in training anyway.
    """
    plain = private or trainable.base.model.device.type == "cpu"
    training_mode(trainable.model, True)
    try:
        with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            yield
    finally:
        trainable.per_sample.draw_dropout(())
        training_mode(trainable.model, False)
