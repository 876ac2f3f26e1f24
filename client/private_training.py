"""DP-SGD steps of one institution, or of several in shared passes.

A step samples units, computes their gradients (`client.gradients`), clips and sums them, and adds
noise (`client.dp_sgd`). Under secure aggregation it adds a share of noise (`client.noise_share`),
and the server takes the step.
"""

# torch types some of its functions in part only
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from client.dp_sgd import PrivateOptimizer, clip, poisson_batches
from client.gradients import SampledUnits, packs, unit_gradients
from client.noise_share import noised_words
from client.training import OPTIMIZERS, LocalPlan, proximal_term, training_steps
from fedlora.arrays import Int64
from fedlora.data.shards import Shard, concatenate
from fedlora.gradients import lora_layers
from fedlora.models.adapters import AdapterState
from fedlora.models.trainable import Trainable
from fedlora.privacy.accounting import PrivacyPlan
from fedlora.privacy.streams import RandomSource


@dataclass(frozen=True, kw_only=True)
class Participant:
    """An institution in a private round.

    Args:
        shard: The institution's records.
        mechanism: The plan of its run: noise, sampling, clipping.
        source: The random source of its sampling, noise and dropout.
    """

    shard: Shard
    mechanism: PrivacyPlan
    source: RandomSource


def train_privately(
    trainable: Trainable, participants: Sequence[Participant], plan: LocalPlan
) -> list[AdapterState]:
    """DP-SGD steps of one institution, or one step of several in shared passes.

    Guarantee: with ``source`` keyed by the operating system, each returned adapter is the output of
    ``plan.steps`` sampled Gaussian mechanisms, under adding or removing one unit of that
    participant's ``shard`` (a record, or all records that share a unit), and of post-processing.

    Args:
        trainable: A model with the adapter that all start from; it has the same one afterwards, but
            after an error any of theirs.
        participants: At least one; all with the same clipping.
        plan: The local plan; of one step for several participants.

    Returns:
        The trained adapter of each participant.

    Raises:
        Refusal: When a guard trips (``guard-*``). No adapter must be released then.
        ValueError: For participants with different clipping, or several with more than one step.
    """
    if len(participants) > 1 and plan.steps > 1:
        raise ValueError("participants share passes of one step only")
    start = AdapterState.read(trainable.model)
    named = trainable.parameters()
    optimizers = [_optimizer(participant, named, plan) for participant in participants]
    draws = [_draws(participant, plan) for participant in participants]
    trained: list[AdapterState] = []
    with training_steps(trainable, private=True):
        for step in range(plan.steps):
            batch = _draw(trainable, participants, draws, plan, step)
            sums = _clipped_sums(trainable, named, participants, *batch)
            for optimizer, total in zip(optimizers, sums, strict=True):
                if len(participants) > 1:
                    start.load_into(trainable.model)
                optimizer.step(total)  # adds noise, also to an empty batch
                if step == plan.steps - 1:
                    trained.append(AdapterState.read(trainable.model))
        start.load_into(trainable.model)
    return trained


def noised_sums(
    trainable: Trainable, participants: Sequence[Participant], plan: LocalPlan, institutions: int
) -> list[Int64]:
    """The vectors of one step under secure aggregation, of one institution or of several.

    Guarantee: with ``source`` keyed by the operating system, the sum of the vectors of
    ``mechanism.honest`` institutions is the output of a sampled Gaussian mechanism
    (`client.noise_share.noised_words`) under adding or removing one unit of any of them.

    Args:
        trainable: A model with the adapter that all start from; it does not change.
        participants: At least one; all with the same clipping.
        plan: The local plan, of one step.
        institutions: The number of institutions in the run.

    Returns:
        int64 ``(d,)`` for each participant: the trained parts in the order of `AdapterState`.

    Raises:
        Refusal: When a guard trips (``guard-*``). No vector must be released then.
        ValueError: For participants with different clipping, or a plan of several steps.
    """
    if plan.steps != 1:
        raise ValueError("a vector holds the sum of one step")
    of_parameter = {p: name for name, p in lora_layers.parameters(trainable.model).items()}
    named = {of_parameter[p]: p for p in trainable.parameters().values()}
    named = dict(sorted(named.items()))
    draws = [_draws(participant, plan) for participant in participants]
    with training_steps(trainable, private=True):
        batch = _draw(trainable, participants, draws, plan, 0)
        sums = _clipped_sums(trainable, named, participants, *batch)
    return [
        noised_words(
            total.cpu().numpy(),
            participant.mechanism,
            participant.source.child("noise-share"),
            institutions,
        )
        for participant, total in zip(participants, sums, strict=True)
    ]


def _draws(participant: Participant, plan: LocalPlan) -> Iterator[Int64]:
    return poisson_batches(
        units=participant.shard.num_units,
        sample_rate=participant.mechanism.sample_rate,
        steps=plan.steps,
        source=participant.source.child("sampling"),
    )


def _optimizer(
    participant: Participant, named: Mapping[str, torch.nn.Parameter], plan: LocalPlan
) -> PrivateOptimizer:
    mechanism, parameters = participant.mechanism, list(named.values())
    return PrivateOptimizer(
        OPTIMIZERS[plan.optimizer](parameters, lr=plan.learning_rate),
        named=named,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        expected_batch_size=mechanism.expected_batch_size,
        source=participant.source.child("noise"),
        after_noise=proximal_term(parameters, plan.proximal),
    )


def _draw(
    trainable: Trainable,
    participants: Sequence[Participant],
    draws: Sequence[Iterator[Int64]],
    plan: LocalPlan,
    step: int,
) -> tuple[SampledUnits, list[int]]:
    """Sample each participant's units of a step; also the number of each unit's participant."""
    units: list[Int64] = []
    owner: list[int] = []
    parts: list[Shard] = []
    dropout: list[RandomSource] = []
    rows_so_far = 0
    for index, (participant, draw) in enumerate(zip(participants, draws, strict=True)):
        drawn = [participant.shard.rows_of_unit(int(unit)) for unit in next(draw)]
        rows = np.sort(np.concatenate([np.empty(0, np.int64), *drawn]))
        parts.append(participant.shard.select(rows))
        units += [rows_so_far + np.searchsorted(rows, unit) for unit in drawn]
        owner += [index] * len(drawn)
        if trainable.per_sample.has_dropout:
            source = participant.source.child("dropout", step)
            dropout += [source.child("row", int(row)) for row in rows]
        rows_so_far += len(rows)
    batch = SampledUnits(
        shard=concatenate(parts), units=units, physical_batch=plan.physical_batch, dropout=dropout
    )
    return batch, owner


def _clipped_sums(
    trainable: Trainable,
    named: Mapping[str, torch.nn.Parameter],
    participants: Sequence[Participant],
    batch: SampledUnits,
    owner: Sequence[int],
) -> torch.Tensor:
    """Sums of each participant's clipped gradients, float64 ``(participants, numbers)``."""
    (bound, *others) = {participant.mechanism.max_grad_norm for participant in participants}
    if others:
        raise ValueError("participants share passes with one clipping only")
    numbers = sum(p.numel() for p in named.values())
    sums = next(iter(named.values())).new_zeros((len(participants), numbers), dtype=torch.float64)
    for units, gradients in unit_gradients(trainable, named, batch, packed=packs(trainable)):
        clip(gradients, bound)
        for unit, gradient in zip(units, gradients, strict=True):
            sums[owner[unit]].add_(gradient)
    return sums
