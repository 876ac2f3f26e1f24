"""DP-SGD steps of one institution, or of several in shared passes.

A step samples units (`client.dp_sgd.PoissonSampler`), computes their gradients
(`client.gradients`), clips and sums them, and adds noise (`client.dp_sgd.PrivateOptimizer`). Under
secure aggregation it adds a share of noise (`client.noise_share`), and the server takes the step.
"""

# torch and Opacus type some of their functions in part only
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from client.gradients import SampledUnits, packed_gradients, padded_gradients
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
    """DP-SGD steps of one institution, or of several in shared passes.

    Guarantee: with ``source`` keyed by the operating system, each returned adapter is the output of
    ``plan.steps`` sampled Gaussian mechanisms, under adding or removing one unit of that
    participant's ``shard`` (a record, or all records that share a unit), and of post-processing.
    The other participants change no bit of it.

    Args:
        trainable: A model with the adapter that all start from; it has the same one afterwards, but
            after an error any of theirs.
        participants: At least one; all with the same clipping. After a step their adapters differ,
            and a pass computes each example with its own institution's adapter.
        plan: The local plan.

    Returns:
        The trained adapter of each participant.

    Raises:
        Refusal: When a guard trips (``guard-*``). No adapter must be released then.
        ValueError: For participants with different clipping, or several with more than one step
            where `can_share` says no.
    """
    start = AdapterState.read(trainable.model)
    named = trainable.parameters()
    members = [_Stepping(participant, named, plan) for participant in participants]
    _check_one_clipping(members)
    if len(members) > 1 and not can_share(trainable, plan.steps):
        raise ValueError("participants cannot share passes of several steps under DoRA")
    trained: list[AdapterState] = []
    with training_steps(trainable, private=True):
        for step in range(plan.steps):
            batch = _draw(trainable, members, plan, step)
            sums = _clipped_sums(trainable, named, members, batch)
            for index, member in enumerate(members):
                member.load(named)
                for p, total in zip(named.values(), sums, strict=True):
                    p.summed_grad = total[index]  # pyright: ignore[reportAttributeAccessIssue]
                    p.grad_sample = p.new_zeros((0, *p.shape))  # pyright: ignore[reportAttributeAccessIssue]
                member.optimizer.step()  # adds noise, also to an empty batch
                member.optimizer.zero_grad(set_to_none=True)
                member.save(named)
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
    (`client.noise_share.noised_words`) under adding or removing one unit of any of them. The other
    participants change no bit of a vector.

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
    from client.noise_share import noised_words  # loads Opacus, as `_Member` does

    named = trainable.parameters()
    members = [_Member(participant, plan) for participant in participants]
    _check_one_clipping(members)
    if plan.steps != 1:
        raise ValueError("a vector holds the sum of one step")
    with training_steps(trainable, private=True):
        sums = _clipped_sums(trainable, named, members, _draw(trainable, members, plan, 0))
    of_parameter = dict(zip(named.values(), sums, strict=True))
    in_order = [
        of_parameter[p]
        for _, p in sorted(lora_layers.parameters(trainable.model).items())
        if p in of_parameter
    ]
    return [
        noised_words(
            torch.cat([part[index].flatten() for part in in_order]).cpu().numpy(),
            member.mechanism,
            member.source.child("noise-share"),
            institutions,
        )
        for index, member in enumerate(members)
    ]


def _check_one_clipping(members: Sequence["_Member"]) -> None:
    if len({member.clipping for member in members}) > 1:
        raise ValueError("participants share passes with one clipping only")


def can_share(trainable: Trainable, steps: int) -> bool:
    """Whether several participants can share the passes of so many steps.

    DoRA's norms hold for one pair of A and B, so under DoRA participants share the first step only.
    """
    return steps == 1 or not trainable.per_sample.has_magnitude


class _Member:
    """A participant's sampler and clipping through the steps of a round."""

    def __init__(self, participant: Participant, plan: LocalPlan) -> None:
        # Opacus takes seconds to import, and a run without DP needs none of it.
        from client.dp_sgd import Clipping, PoissonSampler

        mechanism, source = participant.mechanism, participant.source
        self.shard, self.mechanism, self.source = participant.shard, mechanism, source
        self.values: list[torch.Tensor] = []  # of its own adapter, once a step has changed it
        sampler = PoissonSampler(
            units=self.shard.num_units,
            sample_rate=mechanism.sample_rate,
            steps=plan.steps,
            source=source.child("sampling"),
        )
        self.draws = iter(sampler)
        self.clipping = Clipping(max_grad_norm=mechanism.max_grad_norm, kind=mechanism.clipping)


class _Stepping(_Member):
    """A participant with an optimizer and an adapter of its own."""

    def __init__(
        self, participant: Participant, named: dict[str, torch.nn.Parameter], plan: LocalPlan
    ) -> None:
        from client.dp_sgd import PrivateOptimizer

        super().__init__(participant, plan)
        mechanism = self.mechanism
        self.optimizer = PrivateOptimizer(
            OPTIMIZERS[plan.optimizer](list(named.values()), lr=plan.learning_rate),
            names={p: name for name, p in named.items()},
            noise_multiplier=mechanism.noise_multiplier,
            clipping=self.clipping,
            expected_batch_size=mechanism.expected_batch_size,
            source=self.source.child("noise"),
        )
        pull = proximal_term(list(named.values()), plan.proximal)
        self.optimizer.attach_step_hook(lambda _: pull())  # Opacus calls it once noise is in
        self.save(named)

    def save(self, named: dict[str, torch.nn.Parameter]) -> None:
        """Remember the model's adapter as this participant's."""
        self.values = [p.detach().clone() for p in named.values()]

    def load(self, named: dict[str, torch.nn.Parameter]) -> None:
        """Put this participant's adapter into the model."""
        with torch.no_grad():
            for p, value in zip(named.values(), self.values, strict=True):
                p.copy_(value)


def _draw(
    trainable: Trainable, members: Sequence[_Member], plan: LocalPlan, step: int
) -> SampledUnits:
    """Sample each participant's units of a step."""
    units: list[np.ndarray] = []
    owner: list[int] = []
    parts: list[Shard] = []
    dropout: list[RandomSource] = []
    rows_so_far = 0
    for index, member in enumerate(members):
        drawn = [member.shard.rows_of_unit(unit) for unit in next(member.draws)]
        rows = np.sort(np.concatenate([np.empty(0, np.int64), *drawn]))
        parts.append(member.shard.select(rows))
        units += [rows_so_far + np.searchsorted(rows, unit) for unit in drawn]
        owner += [index] * len(drawn)
        if trainable.per_sample.has_dropout:
            source = member.source.child("dropout", step)
            dropout += [source.child("row", int(row)) for row in rows]
        rows_so_far += len(rows)
    values: list[torch.Tensor] = []
    # All begin with the same values. One participant has its own as well, for the same bits.
    if step > 0 and can_share(trainable, plan.steps):
        values = [
            torch.stack(each) for each in zip(*(member.values for member in members), strict=True)
        ]
    return SampledUnits(
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
    members: Sequence[_Member],
    batch: SampledUnits,
) -> list[torch.Tensor]:
    """Sums of each participant's clipped gradients, float64 ``(members, *shape)`` a parameter.

    A participant's units are added one after the other in an order of its own, so that the others
    change no bit of its sum.
    """
    numbers = sum(p.numel() for p in named.values())
    sums = next(iter(named.values())).new_zeros((len(members), numbers), dtype=torch.float64)
    # On a GPU, and with several threads, kernels may depend on how many examples have one width.
    one = trainable.base.model.device.type == "cpu" and torch.get_num_threads() == 1
    packed = one and trainable.first_position is not None
    make = packed_gradients if packed else padded_gradients
    for group, gradients in make(trainable, named, batch):
        members[0].clipping.clip(gradients)
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)  # (units, numbers)
        order = np.argsort(group) if packed else range(len(group))  # a participant's own
        for position in order:  # one after the other, on a GPU too
            sums[batch.owner[group[position]]].add_(flat[position])
    each = sums.split([p.numel() for p in named.values()], 1)
    return [part.unflatten(1, p.shape) for part, p in zip(each, named.values(), strict=True)]
