"""The server's view of a run, and an attack on single records from that view.

The server knows every order that it sent and every update that it received. With one step of SGD an
update is the noisy sum of the clipped gradients of the sampled records. The share of a canary's
gradient in that sum is the solution of a linear system.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Message, MessageType

from client.dp_sgd import clip
from fedlora.arrays import Floats
from fedlora.config.config import RunConfig
from fedlora.data import records
from fedlora.data.shards import Shard
from fedlora.gradients import lora_layers
from fedlora.models.adapters import AdapterState
from fedlora.models.trainable import Trainable
from fedlora.privacy.accounting import PrivacyPlan
from fedlora.privacy.budget import plan_run
from fedlora.wire import wire
from fedlora.wire.messages import ClientUpdate
from simulation.engines.grid import SimulationGrid

RIDGE_FRACTION = 1e-3
"""The ridge without noise, as a fraction of the mean squared norm of gradients."""


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
        path = self.folder / f"{update.round}-{update.institution}"
        path.write_bytes(wire.update_to_bytes(update))

    def update(self, round_number: int, institution: str) -> ClientUpdate | None:
        """Return the update that an institution sent in a round, or None."""
        path = self.folder / f"{round_number}-{institution}"
        return wire.update_from_bytes(path.read_bytes()) if path.exists() else None


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
) -> Floats:
    r"""Estimate the share of each canary's gradient in its institution's updates, over rounds.

    An update of one SGD step is :math:`-\eta / L (\sum_i w_i g_i + \text{others} + \text{noise})`
    with :math:`w_i = 1` where canary i was sampled. The scores are ridge estimates of w, summed
    over rounds. The ridge is the variance of the noise over that of w; both are public. Without
    noise, the institution's other records hide a canary. The system then contains them too, since
    an auditor may know everything except the coin flips. The same holds where an update is so short
    that the planned noise cannot be in it.

    Args:
        config: The run, under local trust.
        work: The run's base model; its adapter is replaced.
        transcript: The updates of the run.
        canaries: The canaries' rows, ``(n,)``.
        owners: The institution of each canary.
        say: Receives progress messages.

    Returns:
        float64 ``(n,)``.
    """
    federation, plans = records.load(config), _plans(config)
    owner = np.array([federation.names.index(name) for name in owners])
    found, physical = np.zeros(len(owner)), config.training.physical_batch
    for number, (sent, parts) in sorted(transcript.orders.items()):
        say(f"scoring canaries, round {number} of {max(transcript.orders)}")
        sent.load_into(work.model)
        work.train_only(parts)
        everyone = gradients(work, canaries, physical)
        keys = list(lora_layers.trained(work.model))
        for index, name in enumerate(federation.names):
            rows = np.flatnonzero(owner == index)
            update = transcript.update(number, name)
            if update is None or not len(rows):
                continue
            shard, plan = federation.train(index), plans.get(name)
            rate = config.training.rate(len(shard))
            many = plan.expected_batch_size if plan else rate * len(shard)
            step = torch.cat([(sent[key] - update.adapter[key]).flatten() for key in keys])
            step = step * many / config.training.learning_rate
            g, ridge = everyone[rows], _ridge(config, plan, step)
            if not ridge:
                known = {bytes(row) for row in canaries.records}
                others = [i for i, row in enumerate(shard.records) if bytes(row) not in known]
                g = torch.cat([g, gradients(work, shard.select(np.array(others)), physical)])
            if plan:
                clip(g, config.privacy.max_grad_norm)
            found[rows] += _solve(g, step.float(), ridge)[: len(rows)]
    return found


def _ridge(config: RunConfig, plan: PrivacyPlan | None, step: torch.Tensor) -> float:
    """The variance of the noise over that of w; 0 where the noise is not in the step."""
    if plan is None:
        return 0.0
    noise = (plan.noise_multiplier * plan.max_grad_norm) ** 2
    # The steps of another optimizer than SGD do not have the length of its noise.
    if config.training.optimizer == "sgd" and float(step.square().mean()) < noise / 4:
        return 0.0
    included = plan.sample_rate / 2  # by a coin flip, then sampled
    return noise / (included * (1 - included))


def _solve(g: torch.Tensor, step: torch.Tensor, ridge: float) -> Floats:
    """Return ridge estimates ``(n,)`` of the shares of gradients ``(n, p)`` in a sum ``(p,)``."""
    gram = (g @ g.T).double()
    gram.diagonal().add_(ridge or RIDGE_FRACTION * float(gram.diagonal().mean()))
    return torch.linalg.solve(gram, (g @ step).double()).numpy()


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
