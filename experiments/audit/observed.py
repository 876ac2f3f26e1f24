"""What the server sees of a run, and what it tells about single records.

A server knows every order that it sent and every update that came back. With one step of SGD an
update is the clipped sum of the drawn gradients with noise, so how much of a canary's gradient is
in it can be solved for.
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
from fedlora import adapters, records, wire
from fedlora.adapters import AdapterState
from fedlora.budget import plan_run
from fedlora.config import RunConfig
from fedlora.shards import Shard
from fedlora.trainable import Trainable, training_mode
from simulation.engines.grid import SimulationGrid
from strategies import base

Floats = NDArray[np.float64]
RIDGE = 1e-3  # of the mean squared gradient, where no noise says how much to trust a fit


@dataclass(kw_only=True)
class Transcript:
    """Orders and updates of every round, on disk.

    Args:
        folder: Where they are.
    """

    folder: Path
    orders: dict[int, tuple[AdapterState, tuple[str, ...]]] = field(
        default_factory=dict[int, tuple[AdapterState, tuple[str, ...]]]
    )

    def watch(self, grid: SimulationGrid) -> None:
        """Write down what passes through a grid from now on."""
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
                    self._keep(reply)
            return replies

        self.folder.mkdir(parents=True, exist_ok=True)
        cast(Any, grid).push_messages, cast(Any, grid).pull_messages = pushed, pulled

    def _keep(self, reply: Message) -> None:
        try:
            update = wire.unpack_update(reply.content)
        except Exception:  # a refusal: it says so in the run's own record
            return
        (self.folder / f"{update.round}-{update.institution}").write_bytes(
            wire.update_to_bytes(update)
        )

    def update(self, round: int, institution: str) -> AdapterState | None:
        """What an institution sent in a round, if it did."""
        path = self.folder / f"{round}-{institution}"
        return wire.update_from_bytes(path.read_bytes()).adapter if path.exists() else None


def losses(work: Trainable, shard: Shard, physical_batch: int) -> Floats:
    """Loss of each row under the adapter that is loaded, ``(n,)``."""
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
    """Gradient of each row over all that is trained, float32 ``(n, p)``."""
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
    r"""How much of each canary's gradient its institution's updates hold, over all rounds.

    An update of one SGD step is :math:`-\eta / L (\sum_i w_i g_i + \text{others} + \text{noise})`
    with :math:`w_i = 1` where canary i was drawn. The scores are ridge estimates of w, summed over
    rounds; the ridge is the noise's variance over that of w, which are both public. Where there is
    no noise the institution's other records are what hides a canary: they are solved for too, since
    an auditor may know all but the coins.

    Args:
        config: The run.
        work: Its base; the adapter in it is replaced.
        transcript: What the server saw.
        canaries: ``(n,)`` rows.
        owners: The institution of each.
        say: Is told how far it is.

    Returns:
        ``(n,)``.
    """
    total = np.zeros(len(canaries))
    federation = records.load(config)
    owner = np.array(owners)
    cap = _cap(config)
    clipping = Clipping(max_grad_norm=config.privacy.max_grad_norm, kind=config.privacy.clipping)
    for round, (sent, parts) in sorted(transcript.orders.items()):
        say(f"scoring canaries, round {round} of {max(transcript.orders)}")
        sent.load_into(work.model)
        work.train_only(parts)
        everyone = gradients(work, canaries, config.training.physical_batch)
        names = list(_trained(work))
        for index, name in enumerate(federation.names):
            update = transcript.update(round, name)
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
                ridge = noise / (rate / 2 * (1 - rate / 2))  # in by a coin, then drawn
            else:
                share, rows_of_step = config.training.sample_rate, config.training.batch_size
                many = share * len(shard) if share else float(rows_of_step)
                ridge = 0.0
                others = shard.select(np.flatnonzero(~_among(shard, canaries)))
                g = torch.cat([g, gradients(work, others, config.training.physical_batch)])
            gram = (g @ g.T).double()
            ridge = ridge or RIDGE * float(gram.diagonal().mean())
            gram.diagonal().add_(ridge)
            share_of_step = g @ (step * many / config.training.learning_rate)
            held = torch.linalg.solve(gram, share_of_step.double())
            total[rows] += held[: len(rows)].numpy()
    return total


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How alike updates are that should have no noise in common.

    Args:
        cosine: The largest of two successive updates of an institution, and of two institutions'
            updates in a round; None where no two could be compared.
        institutions: Whose updates were compared: they are mostly noise, and there were two.
        left_out: How many others there are.
    """

    cosine: float | None
    institutions: int
    left_out: int


def likeness(config: RunConfig, transcript: Transcript) -> Likeness:
    """Look for noise that was used twice.

    Noise that is drawn anew has a cosine of about 0 with any other; the same noise again, one near
    1. Institutions are left out where noise is not at least twice as long as the longest sum of
    gradients, so that their records alone could be as alike.
    """
    federation, cap = records.load(config), _cap(config)
    plans = {
        name: plan_run(config, federation.train(index).num_units, cap)
        for index, name in enumerate(federation.names)
    }
    steps = config.training.local_steps
    found: list[float] = []
    compared: set[str] = set()
    # What an institution sent last of these tensors, at length 1.
    before: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for round, (sent, _) in sorted(transcript.orders.items()):
        now: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        for name, plan in plans.items():
            update = transcript.update(round, name)
            if update is None:
                continue
            keys = tuple(sorted(update))
            step = torch.cat([(sent[key] - update[key]).flatten() for key in keys]).float()
            # In units of C and of the step size; no batch has a longer sum, but for chance.
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
    return Likeness(
        cosine=max(map(abs, found), default=None),
        institutions=len(compared),
        left_out=len(plans) - len(compared),
    )


def _cap(config: RunConfig) -> int:
    """The most rounds that an institution is asked for."""
    institutions = len(records.load(config).names)
    rounds = config.federation
    return base.participations(rounds.rounds, institutions, rounds.institutions_per_round)


def _among(shard: Shard, others: Shard) -> NDArray[np.bool_]:
    """Which rows of a shard, ``(n,)``, are among others too."""
    assert shard.records is not None and others.records is not None, "rows of sources have digests"
    known = {bytes(row) for row in others.records}
    return np.array([bytes(row) in known for row in shard.records], dtype=bool)


def _trained(work: Trainable) -> dict[str, torch.nn.Parameter]:
    """Parameters that are trained now, under the names that adapters have."""
    named = adapters.parameters(work.model)
    return {name: p for name, p in named.items() if p.requires_grad}
