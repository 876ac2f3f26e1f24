"""An institution's local steps without DP, and the parts that steps with DP share.

Steps with DP are in `client.private_training`. Neither module uses the network or the ledger.
"""

# torch and Opacus type some of their functions in part only
# pyright: reportUnknownMemberType=false

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from client.passes import plain_passes
from fedlora.config.config import RunConfig
from fedlora.data.shards import Shard
from fedlora.models.trainable import Trainable, training_mode
from fedlora.privacy.streams import RandomSource

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True, kw_only=True)
class LocalPlan:
    """The local training of one round.

    Args:
        steps: Optimizer steps.
        physical_batch: Records in memory at a time.
        optimizer: A key of ``OPTIMIZERS``.
        learning_rate: The optimizer's step size.
        proximal: FedProx's mu (Li et al. 2020, arXiv 1812.06127): mu (w - w_global) is added to
            each step's gradient. Under DP the term is added after clipping and noise and depends
            on earlier releases only, so it is post-processing.
    """

    steps: int
    physical_batch: int
    optimizer: str
    learning_rate: float
    proximal: float = 0.0

    @classmethod
    def of(cls, config: RunConfig) -> "LocalPlan":
        """The local plan of a run."""
        return cls(
            steps=config.training.local_steps,
            physical_batch=config.training.physical_batch,
            optimizer=config.training.optimizer,
            learning_rate=config.training.learning_rate,
            proximal=config.training.proximal,
        )


def train(
    trainable: Trainable, shard: Shard, plan: LocalPlan, batch_size: int, source: RandomSource
) -> float:
    """Plain steps over shuffled records.

    Args:
        trainable: A model with the global adapter; afterwards with the trained one.
        shard: The institution's records.
        plan: The local plan.
        batch_size: Records in a step; at most those of the shard.
        source: The random source of shuffling and dropout.

    Returns:
        Mean training loss over all records seen.
    """
    parameters = list(trainable.parameters().values())
    optimizer = OPTIMIZERS[plan.optimizer](parameters, lr=plan.learning_rate)
    pull = proximal_term(parameters, plan.proximal)
    size = min(batch_size, len(shard))
    total = 0.0
    with training_steps(trainable, private=False):
        batches = shuffled(len(shard), size, plan.steps, source.child("shuffle"))
        for step, rows in enumerate(batches):
            optimizer.zero_grad()
            dropout = source.child("dropout", step)
            total += add_gradients(trainable, shard, rows, plan.physical_batch, dropout)
            pull()
            optimizer.step()
    return total / (size * plan.steps)


def add_gradients(
    trainable: Trainable,
    shard: Shard,
    rows: np.ndarray,
    physical_batch: int,
    dropout: RandomSource,
) -> float:
    """Add the gradient of the mean loss of some rows to the trained parameters.

    Args:
        trainable: The model.
        shard: The records.
        rows: Numbers of the rows ``(n,)``.
        physical_batch: Records in memory at a time.
        dropout: The random source of the step's dropout.

    Returns:
        The sum of the rows' losses.
    """
    total = 0.0
    of_row = functools.partial(dropout.child, "row")
    passes = plain_passes(trainable, shard, rows, physical_batch, of_row)
    with contextlib.closing(passes):
        for losses in passes:
            (losses.sum() / len(rows)).backward()
            total += float(losses.detach().sum())
    return total


def shuffled(records: int, size: int, steps: int, source: RandomSource) -> Iterator[np.ndarray]:
    """``steps`` batches of ``size`` rows, walking through fresh permutations."""
    queue = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(queue) < size:
            queue = np.concatenate([queue, source.permutation(records)])
        batch, queue = queue[:size], queue[size:]
        yield batch


def proximal_term(parameters: Sequence[torch.nn.Parameter], mu: float) -> Callable[[], None]:
    """Return a function that adds ``mu (w - origin)`` to each gradient.

    Args:
        parameters: The trained parameters w; their values at this call are the origins.
        mu: The strength of the pull; 0: none.
    """
    if not mu:
        return lambda: None
    origins = [p.detach().clone() for p in parameters]

    def add() -> None:
        for p, origin in zip(parameters, origins, strict=True):
            if p.grad is not None:
                p.grad.add_(p.detach() - origin, alpha=mu)

    return add


@contextlib.contextmanager
def training_steps(trainable: Trainable, *, private: bool) -> Generator[None]:
    """Training mode. Under DP on a GPU attention is computed by plain products.

    Their result for one row does not depend on the other rows.
    """
    plain = private and trainable.base.model.device.type != "cpu"
    training_mode(trainable.model, True)
    try:
        with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            yield
    finally:
        trainable.per_sample.draw_dropout(())
        training_mode(trainable.model, False)
