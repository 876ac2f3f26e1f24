"""Seconds of an institution-round on the Ray engine when the institution does nothing.

Usage: python -m benchmarks.engine_overhead [--institutions 1000] [--rounds 10]
"""

import argparse
import json
import statistics
import time

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict

from server.exchange import exchange
from simulation.engines import ray

WORKERS = 2
FLOATS = 73_728
"""Numbers of the adapter that an institution gets."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--institutions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    n = arguments.institutions
    process = psutil.Process()
    with (
        ray.started("", WORKERS),
        ray.RayGrid(
            "benchmarks.empty_client:app",
            n,
            {},
            workers=ray.WorkerSpec(count=WORKERS, threads=1),
        ) as grid,
    ):
        seconds, memory = [], []
        for _ in range(arguments.rounds):
            record = ArrayRecord({"w": Array(np.zeros(FLOATS, dtype=np.float32))})
            started = time.perf_counter()
            messages = [
                Message(RecordDict({"adapter": record}), node, MessageType.TRAIN, ttl=60.0)
                for node in grid.get_node_ids()
            ]
            replies = sum(
                reply is not None and reply.has_content()
                for _, reply in exchange(grid, messages, 60.0)
            )
            assert replies == n, replies
            seconds.append(time.perf_counter() - started)
            memory.append(process.memory_info().rss / 2**20)
    print(
        json.dumps(
            {
                "institutions": n,
                "rounds": arguments.rounds,
                "milliseconds_per_institution_round": round(
                    1000 * statistics.median(seconds[1:]) / n, 3
                ),
                "first_round_seconds": round(seconds[0], 2),
                "driver_mib_first": round(memory[0]),
                "driver_mib_last": round(memory[-1]),
                "driver_growth": round(memory[-1] / memory[min(4, len(memory) - 1)], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
