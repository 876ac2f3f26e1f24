"""Shares of the operators in the time of an institution's training step.

Usage: python -m benchmarks.profile_step [--private] [--institutions 5]

The steps are those of benchmarks/work.toml: five of 64 rows, under DP several institutions together
as a worker trains them. Prints one line of JSON: seconds of an institution's step and
the share of each kind of operator (torch's profiler, which itself takes some time).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import dp_step, work
from client import private_training, training
from fedlora.config.config import load
from fedlora.data import records
from fedlora.models import trainable
from fedlora.privacy.streams import RandomSource

KINDS = {
    "products with the base": ("aten::mm", "aten::addmm"),
    "products for each example": ("aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product",),
    "GELU and norms": ("aten::gelu", "aten::native_layer_norm", "aten::linalg_vector_norm"),
    "copies and gathers": (
        "aten::copy_",
        "aten::index",
        "aten::cat",
        "aten::fill_",
        "aten::masked",
    ),
    "sums and scalings": ("aten::add_", "aten::sum", "aten::mul"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--institutions", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load(Path(work.CONFIG))
    federation = records.load(config)
    model = trainable.load(config, federation.labels)
    count = arguments.institutions
    plan = training.LocalPlan(
        steps=config.training.local_steps,
        physical_batch=config.training.physical_batch,
        optimizer=config.training.optimizer,
        learning_rate=config.training.learning_rate,
    )

    def private(turn: int) -> None:
        participants = [
            private_training.Participant(
                shard=shard,
                mechanism=dp_step.mechanism(len(shard), min(1.0, 64 / len(shard)), plan.steps),
                source=RandomSource.seeded("profile", turn, index),
            )
            for index, shard in enumerate(map(federation.train, range(count)))
        ]
        private_training.train_privately(model, participants, plan)

    def plain(turn: int) -> None:
        for index in range(count):
            source = RandomSource.seeded("profile", turn, index)
            training.train(model, federation.train(index), plan, 64, source)

    work_of: Callable[[int], None] = private if arguments.private else plain
    work_of(0)
    started = time.perf_counter()
    work_of(1)
    seconds = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work_of(2)
    spent = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    total = sum(spent.values())
    shares = {
        kind: sum(value for key, value in spent.items() if key.startswith(names)) / total
        for kind, names in KINDS.items()
    }
    shares["everything else"] = 1 - sum(shares.values())
    print(
        json.dumps(
            {
                "private": arguments.private,
                "institutions": count,
                "seconds_of_a_step": round(seconds / count / plan.steps, 4),
                "shares": {kind: round(value, 3) for kind, value in shares.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
