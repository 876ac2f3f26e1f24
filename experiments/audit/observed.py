"""The server's view of a run, and attacks on single records from that view.

The server knows every order that it sent and every update that it received. With one step of SGD an
update is the noisy sum of the clipped gradients of the sampled records. The share of a canary's
gradient in that sum is the solution of a linear system. Under secure aggregation the server knows
a sum of updates in place of each (`views`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Message, MessageType
from numpy.typing import NDArray

from client.dp_sgd import clip
from experiments.audit.findings import ALL_BUT_HONEST, ALL_BUT_ONE, SERVER
from fedlora.arrays import Floats
from fedlora.config.config import RunConfig
from fedlora.data import records
from fedlora.data.shards import Shard
from fedlora.gradients import lora_layers
from fedlora.models.adapters import AdapterState
from fedlora.models.trainable import Trainable, training_mode
from fedlora.privacy.accounting import PrivacyPlan
from fedlora.privacy.budget import plan_run
from fedlora.secure import noise_shares
from fedlora.wire import wire
from fedlora.wire.messages import ClientUpdate
from simulation.engines.grid import SimulationGrid

RIDGE_FRACTION = 1e-3  # ridge without noise, as a fraction of the mean squared gradient norm


def views(config: RunConfig, institutions: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The observers whose bounds are compared with a promise.

    Under local trust the server sees each update. Under secure aggregation it sees the sum of all
    vectors. Colluding institutions let it subtract theirs, and lost ones are in no sum: the
    smallest sum that the promise covers has the vectors of ``privacy.honest`` institutions. Here
    these are the first by name, a choice that no coin of a canary changes. If all others collude,
    one vector is left.

    Args:
        config: The run.
        institutions: The number of its institutions.

    Returns:
        Name of an observer -> groups of institutions (indices) of whose updates it knows the sum.
    """
    single = tuple((index,) for index in range(institutions))
    if not config.privacy.shares_noise:
        return {SERVER: single}
    everyone = tuple(range(institutions))
    return {
        SERVER: (everyone,),
        ALL_BUT_HONEST: (everyone[: config.privacy.honest],),
        ALL_BUT_ONE: single,
    }


@dataclass(kw_only=True)
class Transcript:
    """Orders and updates of every round, on disk.

    Args:
        folder: The directory of the updates.
    """

    folder: Path
    orders: dict[int, tuple[AdapterState, tuple[str, ...]]] = field(
        default_factory=dict[int, tuple[AdapterState, tuple[str, ...]]]
    )

    def watch(self, grid: SimulationGrid) -> None:
        """Record all orders and updates that pass through a grid from now on."""
        push, pull = grid.push_messages, grid.pull_messages

        def pushed(messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == MessageType.TRAIN:
                    order = wire.unpack_order(message.content)
                    self.orders.setdefault(order.round, (order.adapter, tuple(order.parts)))
            return push(messages)

        def pulled(message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(pull(message_ids))
            for reply in replies:
                if reply.metadata.message_type == MessageType.TRAIN and reply.has_content():
                    self._store(reply)
            return replies

        self.folder.mkdir(parents=True, exist_ok=True)
        cast(Any, grid).push_messages, cast(Any, grid).pull_messages = pushed, pulled

    def _store(self, reply: Message) -> None:
        try:
            update = wire.unpack_update(reply.content)
        except Exception:  # a refusal, which the run itself records
            return
        if update.words is not None:
            update = dataclasses.replace(update, words=update.words.copy())  # else read-only
        (self.folder / f"{update.round}-{update.institution}").write_bytes(
            wire.update_to_bytes(update)
        )

    def update(self, round_number: int, institution: str) -> ClientUpdate | None:
        """Return the update that an institution sent in a round, or None."""
        path = self.folder / f"{round_number}-{institution}"
        return wire.update_from_bytes(path.read_bytes()) if path.exists() else None

    def updates(self, round_number: int, institutions: Sequence[str]) -> list[ClientUpdate]:
        """Return the updates of institutions in a round; empty unless all of them sent one."""
        found = [self.update(round_number, name) for name in institutions]
        return [] if None in found else [update for update in found if update is not None]


def losses(work: Trainable, shard: Shard, physical_batch: int) -> Floats:
    """Compute the loss of each row under the loaded adapter, float64 ``(n,)``."""
    found = np.empty(len(shard))
    order = np.argsort(-shard.lengths, kind="stable")
    training_mode(work.model, False)
    with torch.inference_mode():
        for start in range(0, len(order), physical_batch):
            rows = order[start : start + physical_batch]
            batch = work.task.collate(shard, rows)
            found[rows] = work.task.losses(work.model, batch, work.labels).cpu().double().numpy()
    return found


def gradients(work: Trainable, shard: Shard, physical_batch: int) -> torch.Tensor:
    """Compute the gradient of each row for all trained parameters, float32 ``(n, p)``."""
    found: list[torch.Tensor] = []
    order = np.argsort(shard.lengths, kind="stable")
    for start in range(0, len(order), physical_batch):
        rows = order[start : start + physical_batch]
        with work.per_sample.expanded(len(rows)):
            batch = work.task.collate(shard, rows)
            work.task.losses(work.model, batch, work.labels).sum().backward()
            collected = work.per_sample.collect()
        named = lora_layers.trained(work.model)
        found.append(torch.cat([collected[p].flatten(1) for p in named.values()], 1).cpu())
    return torch.cat(found)[np.argsort(order)]


def scores(
    config: RunConfig,
    work: Trainable,
    transcript: Transcript,
    canaries: Shard,
    owners: Sequence[str],
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Floats]:
    r"""Estimate the share of each canary's gradient in the sums that observers know, over rounds.

    An update of one SGD step is :math:`-\eta / L (\sum_i w_i g_i + \text{others} + \text{noise})`
    with :math:`w_i = 1` where canary i was sampled. The scores are ridge estimates of w, summed
    over rounds. The ridge is the variance of the noise over that of w; both are public. Without
    noise, the institution's other records hide a canary. The system then contains them too, since
    an auditor may know everything except the coin flips. The same holds where a sum is so short
    that the planned noise cannot be in it. A sum of several vectors has one system
    for the canaries of all its institutions; a round in which one of the vectors was lost is left
    out.

    Args:
        config: The run.
        work: The run's base model; its adapter is replaced.
        transcript: The updates of the run.
        canaries: The canaries' rows, ``(n,)``.
        owners: The institution of each canary.
        say: Receives progress messages.

    Returns:
        Name of a view -> the scores, float64 ``(n,)``; nan where a canary is in no sum of the view.
    """
    federation, plans = records.load(config), _plans(config)
    owner = np.array([federation.names.index(name) for name in owners])
    observers = views(config, len(federation.names))
    sums = [(name, group) for name, groups in observers.items() for group in groups]
    found = {
        name: np.where(np.isin(owner, np.concatenate(groups)), 0.0, np.nan)
        for name, groups in observers.items()
    }
    for number, (sent, parts) in sorted(transcript.orders.items()):
        say(f"scoring canaries, round {number} of {max(transcript.orders)}")
        sent.load_into(work.model)
        work.train_only(parts)
        everyone = gradients(work, canaries, config.training.physical_batch)
        keys = list(lora_layers.trained(work.model))
        for name, group in sums:
            rows = np.flatnonzero(np.isin(owner, group))
            members = [federation.names[index] for index in group]
            updates = transcript.updates(number, members) if len(rows) else []
            if not updates:
                continue
            moves = [_move(config, sent.only(parts), update) for update in updates]
            step = torch.stack([torch.cat([m[k].flatten() for k in keys]) for m in moves]).sum(0)
            g, shards = everyone[rows], [federation.train(index) for index in group]
            ridge = 0.0
            if plans:
                plan = plans[members[0]]  # under secure aggregation that of all institutions
                many, noise = plan.expected_batch_size, _noise_variance(plan, len(group))
            else:
                share, rows_of_step = config.training.sample_rate, config.training.batch_size
                many, noise = share * len(shards[0]) if share else float(rows_of_step), 0.0
            if not config.privacy.shares_noise:
                step = step * many / config.training.learning_rate
            # The steps of another optimizer than SGD do not have the length of its noise.
            sgd = config.training.optimizer == "sgd"
            missing = sgd and float(step.square().mean()) < noise / 4
            if plans and not missing:
                included = plan.sample_rate / 2  # by a coin flip, then sampled
                ridge = noise / (included * (1 - included))
            else:
                others = [s.select(np.flatnonzero(~_among(s, canaries))) for s in shards]
                physical = config.training.physical_batch
                g = torch.cat([g, *(gradients(work, other, physical) for other in others)])
            if plans:
                clip(g, config.privacy.max_grad_norm)
            found[name][rows] += _solve(g, step.float(), ridge)[: len(rows)]
    return found


def _move(config: RunConfig, sent: AdapterState, update: ClientUpdate) -> dict[str, torch.Tensor]:
    """Return the trained tensors before an update minus those after it, float32.

    Under secure aggregation return the vector, as tensors in units of a gradient, float64.
    """
    if update.words is None:
        return {name: sent[name] - update.adapter[name] for name in update.adapter}
    vector = torch.as_tensor(update.words).double()
    vector *= noise_shares.grid(config.privacy.max_grad_norm)
    split = vector.split([tensor.numel() for tensor in sent.values()])
    return dict(zip(sent, split, strict=True))


def _noise_variance(plan: PrivacyPlan, vectors: int) -> float:
    """Return the variance of the planned noise in each number of a sum of so many vectors."""
    return (plan.share_noise_multiplier * plan.max_grad_norm) ** 2 * vectors


def _solve(g: torch.Tensor, step: torch.Tensor, ridge: float) -> Floats:
    """Return ridge estimates ``(n,)`` of the shares of gradients ``(n, p)`` in a sum ``(p,)``."""
    gram = (g @ g.T).double()
    gram.diagonal().add_(ridge or RIDGE_FRACTION * float(gram.diagonal().mean()))
    return torch.linalg.solve(gram, (g @ step).double()).numpy()


@dataclass(frozen=True, kw_only=True)
class NoiseReuse:
    """The similarity of updates whose noise should be independent.

    Args:
        cosine: The largest absolute cosine of two updates: successive ones of an institution, or
            those of two institutions in a round. None if no two updates were comparable.
        institutions: The number of institutions with compared updates.
        left_out: The number of other institutions.
    """

    cosine: float | None
    institutions: int
    left_out: int


def noise_reuse(config: RunConfig, transcript: Transcript) -> NoiseReuse:
    """Look for noise that was used twice.

    Independent noise vectors have a cosine of about 0; a repeated one has a cosine near 1. The
    gradients of the records can be similar too. An institution is therefore compared only if its
    noise is at least twice as long as a sum of twice the expected batch of clipped gradients, all
    of one direction. Under secure aggregation the auditor compares the vectors, which the server
    does not see.
    """
    plans, steps = _plans(config), config.training.local_steps
    found: list[float] = []
    compared: set[str] = set()
    # Tensor names -> institution -> its last update of these tensors, normalised.
    before: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for number, (sent, parts) in sorted(transcript.orders.items()):
        now: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        for name, plan in plans.items():
            update = transcript.update(number, name)
            if update is None:
                continue
            move = _move(config, sent.only(parts), update)
            keys = tuple(sorted(move))
            step = torch.cat([move[key].flatten() for key in keys]).float()
            # In units of C and of the step size. A mean batch is below twice the size class's.
            noise = plan.share_noise_multiplier * (step.numel() * steps) ** 0.5
            if noise >= 2 * (2 * plan.expected_batch_size * steps):
                now.setdefault(keys, {})[name] = torch.nn.functional.normalize(step, dim=0)
        for keys, units in now.items():
            last = before.setdefault(keys, {})
            again = units.keys() & last.keys()
            found += [float(last[name] @ units[name]) for name in again]
            together = torch.stack(list(units.values()))
            first, second = torch.triu_indices(len(units), len(units), 1)
            found += (together @ together.T)[first, second].tolist()
            compared |= units.keys() if len(units) > 1 else again
            last |= units
    return NoiseReuse(
        cosine=max(map(abs, found), default=None),
        institutions=len(compared),
        left_out=len(plans) - len(compared),
    )


def _plans(config: RunConfig) -> dict[str, PrivacyPlan]:
    """Return institution -> the plan of its run; empty without DP."""
    if not config.privacy.enabled:
        return {}
    federation = records.load(config)
    cap = config.federation.participations(len(federation.names))
    return {
        name: plan_run(config, federation.train(index).num_units, cap)
        for index, name in enumerate(federation.names)
    }


def _among(shard: Shard, others: Shard) -> NDArray[np.bool_]:
    """Return for each row of a shard, ``(n,)``, whether other rows contain it."""
    known = {bytes(row) for row in others.records}
    return np.array([bytes(row) in known for row in shard.records], dtype=bool)
