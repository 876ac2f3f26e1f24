"""An institution's local steps, with and without DP; neither network nor ledger is touched here."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedlora import packing, tasks
from fedlora.adapters import AdapterState
from fedlora.errors import Refusal
from fedlora.shards import Shard, concatenate
from fedlora.streams import RandomSource
from fedlora.trainable import Trainable, training_mode

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
MULTIPLE = 64
"""A packed row has a multiple of so many tokens: kernels are made and kept for each size, and treat
the last rows of an odd one in another way."""
SHORT = 10  # tokens that a row of a pass may have on average before fewer rows fit into it


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


@dataclass(frozen=True, kw_only=True)
class Participant:
    """An institution in a private round.

    Args:
        shard: Its records.
        mechanism: Its noise, sampling, clipping.
        source: Of its sampling, noise, dropout.
        sampler: Batches of unit numbers; None for Poisson over the shard's units.
    """

    shard: Shard
    mechanism: PrivacyMechanism
    source: RandomSource
    sampler: torch.utils.data.Sampler[list[int]] | None = None


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
            dropout = functools.partial(source.child("dropout", step).child, "row")
            optimizer.zero_grad()
            passes = _plain_passes(trainable, shard, rows, plan.physical_batch, dropout)
            with contextlib.closing(passes):
                for losses in passes:
                    (losses.sum() / len(rows)).backward()
                    total += float(losses.detach().sum())
            pull()
            optimizer.step()
    return total / (size * plan.steps)


def _plain_passes(
    trainable: Trainable,
    shard: Shard,
    rows: np.ndarray,
    physical_batch: int,
    dropout: Callable[[int], RandomSource],
) -> Generator[torch.Tensor]:
    """Losses of all rows ``(n,)``, in passes; each one's backward goes before the next."""
    if trainable.first_position is None:
        for micro in tasks.micro_batches(shard.lengths, rows, physical_batch):
            yield _losses(trainable, shard, micro, dropout)
        return
    lengths, widths = shard.lengths[rows], trainable.task.widths(shard)
    passes = max(1, round(lengths.sum() / _tokens(trainable, physical_batch)))
    room = -(-int(lengths.sum()) // passes) + int(lengths.max())  # in equal parts, but for a row
    for numbers in _filled(lengths, room, physical_batch):
        part = rows[numbers]
        part = part[np.argsort(widths[part], kind="stable")]
        total = _multiple(int(shard.lengths[part].sum()))
        with _packed_losses(trainable, shard, part, dropout, total, len(part)) as losses:
            yield losses


def train_privately(
    trainable: Trainable, participants: Sequence[Participant], plan: LocalPlan
) -> list[AdapterState]:
    """DP-SGD steps of one institution, or of several in shared passes.

    Guarantee: with ``source`` keyed by the operating system an adapter that comes out is the output
    of ``plan.steps`` sampled Gaussian mechanisms under adding or removing one unit of that
    participant's ``shard`` (a record, or all records that share a unit), and of post-processing.
    Each adapter is the same to the last bit whoever else takes part.

    Args:
        trainable: Holds the adapter that all start from, and holds it afterwards.
        participants: At least one; all with the same clipping. After a step their adapters differ,
            and a pass takes each example with its institution's.
        plan: Steps, memory, optimizer.

    Returns:
        The trained adapter of each.

    Raises:
        Refusal: When a guard trips (``guard-*``). No adapter must be released then.
        ValueError: For participants with different clipping, or several with more than one step
            where `can_share` says no.
    """
    start = AdapterState.read(trainable.model)
    named = trainable.parameters()
    runs = [_Run(participant, named, plan) for participant in participants]
    if len({r.clipping for r in runs}) > 1:
        raise ValueError("participants share passes with one clipping only")
    if len(runs) > 1 and not can_share(trainable, plan.steps):
        raise ValueError("participants cannot share passes of several steps under DoRA")
    trained: list[AdapterState] = []
    with _training(trainable, private=True):
        for step in range(plan.steps):
            drawn = _draw(trainable, runs, plan, step)
            sums = _clipped_sums(trainable, named, runs, drawn)
            for index, run in enumerate(runs):
                run.load(named)
                for p, total in zip(named.values(), sums, strict=True):
                    p.summed_grad = total[index]  # pyright: ignore[reportAttributeAccessIssue]
                    p.grad_sample = p.new_zeros((0, *p.shape))  # pyright: ignore[reportAttributeAccessIssue]
                run.optimizer.step()  # noise on the sum, also when nobody was drawn
                run.optimizer.zero_grad(set_to_none=True)
                run.keep(named)
                if step == plan.steps - 1:
                    trained.append(AdapterState.read(trainable.model))
        start.load_into(trainable.model)
    return trained


def can_share(trainable: Trainable, steps: int) -> bool:
    """Whether several participants can share the passes of so many steps.

    DoRA's norms are those of one A and B, so under it they can share the first step only.
    """
    return steps == 1 or not trainable.per_sample.has_magnitude


class _Run:
    """What a participant keeps through the steps of a round."""

    def __init__(
        self, participant: Participant, named: dict[str, torch.nn.Parameter], plan: LocalPlan
    ) -> None:
        from client.dp_sgd import Clipping, PoissonSampler, PrivateOptimizer, check_sampler

        self.shard, mechanism, source = participant.shard, participant.mechanism, participant.source
        self.source = source
        self.rows_of_units = _rows_of_units(self.shard)
        sampler = participant.sampler or PoissonSampler(
            units=len(self.rows_of_units),
            sample_rate=mechanism.sample_rate,
            steps=plan.steps,
            source=source.child("sampling"),
        )
        check_sampler(sampler)
        self.draws = iter(sampler)
        self.clipping = Clipping(max_grad_norm=mechanism.max_grad_norm, kind=mechanism.clipping)
        self.optimizer = PrivateOptimizer(
            OPTIMIZERS[plan.optimizer](list(named.values()), lr=plan.learning_rate),
            names={p: name for name, p in named.items()},
            noise_multiplier=mechanism.noise_multiplier,
            clipping=self.clipping,
            normaliser=mechanism.normaliser,
            source=source.child("noise"),
        )
        pull = _proximal(list(named.values()), plan.proximal)
        self.optimizer.attach_step_hook(lambda _: pull())  # Opacus calls it once noise is in
        self.values: list[torch.Tensor] = []
        self.keep(named)

    def keep(self, named: dict[str, torch.nn.Parameter]) -> None:
        """Remember the model's adapter as this participant's."""
        self.values = [p.detach().clone() for p in named.values()]

    def load(self, named: dict[str, torch.nn.Parameter]) -> None:
        """Put this participant's adapter into the model."""
        with torch.no_grad():
            for p, value in zip(named.values(), self.values, strict=True):
                p.copy_(value)


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


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """Everyone's units of one step.

    Args:
        shard: Their rows, participant after participant, each one's in their own order.
        units: Rows of each unit.
        owner: Whose it is: the number of its participant.
        physical_batch: The most rows of a pass.
        dropout: The source of each row's masks; empty where there is none.
        values: What each parameter is for each participant, ``(participants, *shape)``; empty: as
            in the model.
    """

    shard: Shard
    units: list[np.ndarray]
    owner: list[int]
    physical_batch: int
    dropout: list[RandomSource]
    values: list[torch.Tensor]

    def of(self, units: Sequence[int]) -> list[torch.Tensor] | None:
        """What each parameter is for these units, ``(units, *shape)``; None: as in the model."""
        owners = [self.owner[unit] for unit in units]
        return [value[owners] for value in self.values] or None


def _draw(trainable: Trainable, runs: Sequence[_Run], plan: LocalPlan, step: int) -> _Drawn:
    """Everyone's units of a step, by each one's own sampler."""
    units: list[np.ndarray] = []
    owner: list[int] = []
    parts: list[Shard] = []
    dropout: list[RandomSource] = []
    rows_so_far = 0
    for index, run in enumerate(runs):
        drawn = [run.rows_of_units[unit] for unit in next(run.draws)]
        rows = np.sort(np.concatenate([np.empty(0, np.int64), *drawn]))
        parts.append(run.shard.select(rows))
        units += [rows_so_far + np.searchsorted(rows, unit) for unit in drawn]
        owner += [index] * len(drawn)
        if trainable.per_sample.has_dropout:
            source = run.source.child("dropout", step)
            dropout += [source.child("row", int(row)) for row in rows]
        rows_so_far += len(rows)
    values: list[torch.Tensor] = []
    # All begin with the same values. One participant has its own as well, for the same bits.
    if step > 0 and can_share(trainable, plan.steps):
        values = [torch.stack(each) for each in zip(*(run.values for run in runs), strict=True)]
    return _Drawn(
        shard=concatenate(parts),
        units=units,
        owner=owner,
        physical_batch=plan.physical_batch,
        dropout=dropout,
        values=values,
    )


def _clipped_sums(
    trainable: Trainable,
    named: dict[str, torch.nn.Parameter],
    runs: Sequence[_Run],
    drawn: _Drawn,
) -> list[torch.Tensor]:
    """Sums of everyone's clipped gradients, float64 ``(runs, *shape)`` for each parameter.

    A participant's units are added one after the other in an order of its own, so that its sum does
    not depend, in any bit, on the others.
    """
    numbers = sum(p.numel() for p in named.values())
    sums = next(iter(named.values())).new_zeros((len(runs), numbers), dtype=torch.float64)
    # On a GPU, and with several threads, kernels may depend on how many examples have one width.
    one = trainable.base.model.device.type == "cpu" and torch.get_num_threads() == 1
    packed = one and trainable.first_position is not None
    make = _packed_gradients if packed else _padded_gradients
    for group, gradients in make(trainable, named, drawn):
        runs[0].clipping.clip(gradients)
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)  # (units, numbers)
        order = np.argsort(group) if packed else range(len(group))  # a participant's own
        for position in order:  # one after the other, on a GPU too
            sums[drawn.owner[group[position]]].add_(flat[position])
    each = sums.split([p.numel() for p in named.values()], 1)
    return [part.unflatten(1, p.shape) for part, p in zip(each, named.values(), strict=True)]


def _packed_gradients(
    trainable: Trainable, named: dict[str, torch.nn.Parameter], drawn: _Drawn
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Each unit's summed gradient, from packed rows of one size.

    A unit's gradient is the same to the last bit whatever other units are there: all packed rows
    have equally many tokens, and a unit's rows are added one after the other in their order.

    Yields:
        Some units, all of them before later ones, and for each parameter their gradients,
        float32 ``(units, *shape)``.
    """
    shard, units, slots = drawn.shard, drawn.units, drawn.physical_batch
    rows = np.concatenate([np.empty(0, np.int64), *units])
    of_row = np.repeat(np.arange(len(units)), [len(each) for each in units])
    total = _tokens(trainable, slots)
    widths = trainable.task.widths(shard)
    single = len(rows) == len(units)
    begun: list[torch.Tensor] = []  # of a unit whose last rows are in a later pass
    for part in _filled(shard.lengths[rows], total, slots):
        order = part[np.argsort(widths[rows[part]], kind="stable")]
        own = drawn.of(of_row[order].tolist())
        filled = None if own is None else dict(zip(named, own, strict=True))
        with trainable.per_sample.expanded(len(part), None, filled):
            dropout = drawn.dropout.__getitem__
            with _packed_losses(trainable, shard, rows[order], dropout, total, slots) as losses:
                losses.sum().backward()
            trainable.per_sample.collect()
        of_rows = [_taken(name, p) for name, p in named.items()]
        if single:
            yield of_row[order].tolist(), of_rows
            continue
        first, last = int(of_row[part[0]]), int(of_row[part[-1]])
        found = [g.new_zeros((last - first + 1, *g.shape[1:])) for g in of_rows]
        for sums, before in zip(found, begun, strict=bool(begun)):
            sums[0] = before
        for place in np.argsort(order):
            for sums, gradients in zip(found, of_rows, strict=True):
                sums[of_row[order[place]] - first].add_(gradients[place])
        whole = part[-1] == len(rows) - 1 or of_row[part[-1] + 1] != last
        begun = [] if whole else [sums[-1] for sums in found]
        if finished := list(range(first, last + whole)):
            yield finished, [sums[: len(finished)] for sums in found]


def _filled(lengths: np.ndarray, total: int, most: int) -> Iterator[np.ndarray]:
    """Numbers of rows ``(n,)`` in their order, as many in a pass as have room."""
    begin, tokens = 0, 0
    for number, length in enumerate(lengths):
        if number - begin == most or tokens + length > total:
            yield np.arange(begin, number)
            begin, tokens = number, 0
        tokens += int(length)
    if begin < len(lengths):
        yield np.arange(begin, len(lengths))


def _tokens(trainable: Trainable, physical_batch: int) -> int:
    """Tokens of a packed row: about those of `physical_batch` short rows.

    They are a whole number of the longest rows, which then leave no rest but that of `MULTIPLE`.
    """
    longest = trainable.task.encoding.max_length
    return _multiple(max(1, round(SHORT * physical_batch / longest)) * longest)


def _multiple(tokens: int) -> int:
    """The size of a packed row that so many tokens fit into."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def _padded_gradients(
    trainable: Trainable, named: dict[str, torch.nn.Parameter], drawn: _Drawn
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """The same from padded passes, for models, tasks and devices that need them.

    A unit's gradient is the same to the last bit whatever other units are there: all passes have
    ``physical_batch`` rows of one shape, and a unit's rows are summed in an order of their own.
    Memory holds one pass and the gradients of up to ``physical_batch`` units.
    """
    slots = drawn.physical_batch
    shapes = trainable.task.shapes(drawn.shard)
    for group in _groups(drawn.units, shapes, slots):
        values = drawn.of(group)
        everyone = np.arange(len(group))
        sums: list[torch.Tensor] | None = None
        for rows, unit_of_row, width in _passes([drawn.units[i] for i in group], shapes, slots):
            # Row i is unit i, or an index says whose it is; rows that only fill the pass are a unit
            # after the last.
            plain = np.array_equal(unit_of_row[unit_of_row < len(group)], everyone)
            index = None if plain else torch.from_numpy(unit_of_row)
            count = slots if plain else len(group) + 1
            filled = None
            if values is not None:  # what only fills computes with the first unit's
                place = torch.arange(count)
                place[len(group) :] = 0
                filled = {n: value[place] for n, value in zip(named, values, strict=True)}
            with trainable.per_sample.expanded(count, index, filled):
                dropout = drawn.dropout.__getitem__
                _losses(trainable, drawn.shard, rows, dropout, width).sum().backward()
                trainable.per_sample.collect()
            gradients = [_taken(name, p)[: len(group)] for name, p in named.items()]
            if sums is None:
                sums = gradients
            else:
                sums = [a.add_(b) for a, b in zip(sums, gradients, strict=True)]
        assert sums is not None, "a group has at least one unit with at least one row"
        yield group, sums


def _taken(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter's per-example gradient, which it then has no more."""
    gradient: torch.Tensor | None = getattr(parameter, "grad_sample", None)
    if gradient is None:
        raise Refusal("guard-no-gradient", f"{name} has no per-example gradient")
    parameter.grad_sample = None  # pyright: ignore[reportAttributeAccessIssue]
    return gradient


def _groups(
    units: Sequence[np.ndarray], shapes: np.ndarray, physical_batch: int
) -> Iterator[list[int]]:
    """Numbers of up to ``physical_batch`` units whose gradients are in memory together.

    Units of one record each are grouped by its shape, so that a group is one pass.
    """
    single = all(len(rows) == 1 for rows in units)
    first = [int(rows[0]) for rows in units]
    group: list[int] = []
    for unit in sorted(range(len(units)), key=lambda u: (*shapes[first[u]], first[u])):
        other = single and group and tuple(shapes[first[unit]]) != tuple(shapes[first[group[0]]])
        if len(group) == physical_batch or other:
            yield group
            group = []
        group.append(unit)
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
        for held in _fitting(blocks[shape], physical_batch):
            rows = np.concatenate([part for _, part in held])
            units = np.repeat([unit for unit, _ in held], [len(part) for _, part in held])
            filler = np.full(physical_batch - len(rows), len(group))
            yield np.resize(rows, physical_batch), np.concatenate([units, filler]), shape[0]


def _fitting(
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
    trainable: Trainable,
    shard: Shard,
    rows: np.ndarray,
    dropout: Callable[[int], RandomSource],
    width: int = 0,
) -> torch.Tensor:
    """Losses of the given rows ``(b,)``; ``dropout`` gives the source of a row's masks."""
    if trainable.per_sample.has_dropout:
        trainable.per_sample.draw_dropout([dropout(int(row)) for row in rows])
    task = trainable.task
    batch = task.collate(shard, rows, width)
    return task.losses(trainable.model, batch, trainable.labels)


@contextlib.contextmanager
def _packed_losses(
    trainable: Trainable,
    shard: Shard,
    rows: np.ndarray,
    dropout: Callable[[int], RandomSource],
    total: int,
    slots: int,
) -> Iterator[torch.Tensor]:
    """Losses of the given rows ``(n,)`` in one packed row; their backward goes inside."""
    assert trainable.first_position is not None
    if trainable.per_sample.has_dropout:
        trainable.per_sample.draw_dropout([dropout(int(row)) for row in rows])
    batch = trainable.task.pack(
        shard,
        rows,
        first=trainable.first_position,
        total=total,
        slots=slots,
        device=trainable.base.model.device,
    )
    with packing.use(batch.row):
        yield trainable.task.losses(trainable.model, batch, trainable.labels)


@contextlib.contextmanager
def _training(trainable: Trainable, *, private: bool) -> Iterator[None]:
    """Training mode; under DP on a GPU attention by plain products, whose rows are their own."""
    plain = private and trainable.base.model.device.type != "cpu"
    training_mode(trainable.model, True)
    try:
        with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            yield
    finally:
        trainable.per_sample.draw_dropout(())
        training_mode(trainable.model, False)
