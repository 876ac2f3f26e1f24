"""The server's view of a run, and attacks on single records from that view.

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
from numpy.typing import NDArray

from client.dp_sgd import Clipping
from fedlora import lora_layers, records, wire
from fedlora.adapters import AdapterState
from fedlora.budget import plan_run
from fedlora.config import RunConfig
from fedlora.shards import Shard
from fedlora.trainable import Trainable, training_mode
from simulation.engines.grid import SimulationGrid
from strategies import base

Floats = NDArray[np.float64]
RIDGE_FRACTION = 1e-3  # ridge without noise, as a fraction of the mean squared gradient norm


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
        (self.folder / f"{update.round}-{update.institution}").write_bytes(
            wire.update_to_bytes(update)
        )

    def update(self, round_number: int, institution: str) -> AdapterState | None:
        """Return the adapter that an institution sent in a round, or None."""
        path = self.folder / f"{round_number}-{institution}"
        return wire.update_from_bytes(path.read_bytes()).adapter if path.exists() else None


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
            work.per_sample.collect()
        named = _trained(work)
        found.append(
            torch.cat([cast(Any, p).grad_sample.flatten(1) for p in named.values()], 1).cpu()
        )
        for parameter in named.values():
            cast(Any, parameter).grad_sample = None
    return torch.cat(found)[np.argsort(order)]


def scores(
    config: RunConfig,
    work: Trainable,
    transcript: Transcript,
    canaries: Shard,
    owners: Sequence[str],
    say: Callable[[str], None] = lambda _: None,
) -> Floats:
    r"""Estimate the share of each canary's gradient in its institution's updates, over all rounds.

    An update of one SGD step is :math:`-\eta / L (\sum_i w_i g_i + \text{others} + \text{noise})`
    with :math:`w_i = 1` where canary i was sampled. The scores are ridge estimates of w, summed
    over rounds. The ridge is the variance of the noise over that of w; both are public. Without
    noise, the institution's other records hide a canary. The system then contains them too, since
    an auditor may know everything except the coin flips.

    Args:
        config: The run.
        work: The run's base model; its adapter is replaced.
        transcript: The server's view of the run.
        canaries: The canaries' rows, ``(n,)``.
        owners: The institution of each canary.
        say: Receives progress messages.

    Returns:
        The scores, float64 ``(n,)``.
    """
    total = np.zeros(len(canaries))
    federation = records.load(config)
    owner = np.array(owners)
    cap = _cap(config)
    clipping = Clipping(max_grad_norm=config.privacy.max_grad_norm, kind=config.privacy.clipping)
    for number, (sent, parts) in sorted(transcript.orders.items()):
        say(f"scoring canaries, round {number} of {max(transcript.orders)}")
        sent.load_into(work.model)
        work.train_only(parts)
        everyone = gradients(work, canaries, config.training.physical_batch)
        names = list(_trained(work))
        for index, name in enumerate(federation.names):
            update = transcript.update(number, name)
            rows = np.flatnonzero(owner == name)
            if update is None or not len(rows):
                continue
            step = torch.cat([(sent[key] - update[key]).flatten() for key in names])
            g, shard = everyone[rows], federation.train(index)
            if config.privacy.enabled:
                plan = plan_run(config, shard.num_units, cap)
                rate, many = plan.sample_rate, plan.expected_batch_size
                noise = (plan.noise_multiplier * config.privacy.max_grad_norm) ** 2
                clipping.clip([g])
                ridge = noise / (rate / 2 * (1 - rate / 2))  # included by a coin flip, then sampled
            else:
                share, rows_of_step = config.training.sample_rate, config.training.batch_size
                many = share * len(shard) if share else float(rows_of_step)
                ridge = 0.0
                others = shard.select(np.flatnonzero(~_among(shard, canaries)))
                g = torch.cat([g, gradients(work, others, config.training.physical_batch)])
            gram = (g @ g.T).double()
            ridge = ridge or RIDGE_FRACTION * float(gram.diagonal().mean())
            gram.diagonal().add_(ridge)
            share_of_step = g @ (step * many / config.training.learning_rate)
            held = torch.linalg.solve(gram, share_of_step.double())
            total[rows] += held[: len(rows)].numpy()
    return total


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
    noise is at least twice as long as the longest possible sum of its gradients.
    """
    federation, cap = records.load(config), _cap(config)
    plans = {
        name: plan_run(config, federation.train(index).num_units, cap)
        for index, name in enumerate(federation.names)
    }
    steps = config.training.local_steps
    found: list[float] = []
    compared: set[str] = set()
    # Tensor names -> institution -> its last update of these tensors, normalised.
    before: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for number, (sent, _) in sorted(transcript.orders.items()):
        now: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        for name, plan in plans.items():
            update = transcript.update(number, name)
            if update is None:
                continue
            keys = tuple(sorted(update))
            step = torch.cat([(sent[key] - update[key]).flatten() for key in keys]).float()
            # In units of C and of the step size. A batch twice the expected size is very unlikely.
            noise = plan.noise_multiplier * (step.numel() * steps) ** 0.5
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


def _cap(config: RunConfig) -> int:
    """Return the participations of an institution: the most rounds in which it trains."""
    institutions = len(records.load(config).names)
    rounds = config.federation
    return base.participations(rounds.rounds, institutions, rounds.institutions_per_round)


def _among(shard: Shard, others: Shard) -> NDArray[np.bool_]:
    """Return for each row of a shard, ``(n,)``, whether other rows contain it."""
    assert shard.records is not None and others.records is not None, "rows of sources have digests"
    known = {bytes(row) for row in others.records}
    return np.array([bytes(row) in known for row in shard.records], dtype=bool)


def _trained(work: Trainable) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that require gradients, by their names in an adapter."""
    named = lora_layers.parameters(work.model)
    return {name: p for name, p in named.items() if p.requires_grad}
