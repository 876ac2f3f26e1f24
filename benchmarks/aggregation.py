"""Memory and time of aggregating adapters of an 8B Llama: rank 16 on all linear layers, float32.

Usage: python -m benchmarks.aggregation [--strategy fedavg] [--institutions 100] [--layers 32]

Updates are random and created one at a time; their creation is not timed. Peak memory is the
increase over the process with the global adapter loaded, in units of one adapter of this many
layers. svd's scratch memory is that of one layer, so few layers overstate its figure in adapters.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fedlora.models.adapters import AdapterState
from fedlora.wire.messages import ClientUpdate
from strategies import STRATEGIES
from strategies.base import Round, Weighted

HIDDEN, KV, INTERMEDIATE, RANK = 4096, 1024, 14336, 16
LINEAR = {  # d_out, d_in
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def adapter(layers: int, seed: int) -> AdapterState:
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (d_out, d_in) in LINEAR.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            for factor, shape in (("A", (RANK, d_in)), ("B", (d_out, RANK))):
                value = torch.empty(shape).uniform_(-0.01, 0.01, generator=draw)
                tensors[f"{path}.lora_{factor}.weight"] = value
    return AdapterState(tensors)


def resident(field: str) -> int:
    """Bytes: ``VmRSS`` now, ``VmHWM`` at the highest since the last `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Updates:
    """Creates updates one at a time and records the time of it."""

    def __init__(self, institutions: int, layers: int) -> None:
        self.institutions, self.layers = institutions, layers
        self.seconds = self.busy = 0.0

    def __iter__(self) -> Iterator[Weighted]:
        for i in range(self.institutions):
            started, busy = time.perf_counter(), time.process_time()
            update = ClientUpdate(
                institution=f"{i:04}", round=1, adapter=adapter(self.layers, i + 1)
            )
            self.seconds += time.perf_counter() - started
            self.busy += time.process_time() - busy
            yield update, 1.0
            del update


def warm_up(strategy: str) -> None:
    """Make a first call, which loads kernels and code, whatever the size of the adapter."""
    small = AdapterState(
        {k: v[:, :RANK] if "lora_A" in k else v[:RANK] for k, v in adapter(1, 0).items()}
    )
    STRATEGIES[strategy].aggregate(
        Round(number=1, asked=1, before=small, alpha=32.0),
        [(ClientUpdate(institution="0", round=1, adapter=small), 1.0)],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", choices=sorted(STRATEGIES), default="fedavg")
    parser.add_argument("--institutions", type=int, default=100)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    before = adapter(arguments.layers, 0)
    one_round = Round(number=1, asked=arguments.institutions, before=before, alpha=32.0)
    updates = Updates(arguments.institutions, arguments.layers)
    warm_up(arguments.strategy)
    held = resident("VmRSS")
    forget_peak()
    started, busy = time.perf_counter(), time.process_time()
    result = STRATEGIES[arguments.strategy].aggregate(one_round, updates)
    seconds = time.perf_counter() - started - updates.seconds
    busy = time.process_time() - busy - updates.busy
    peak = resident("VmHWM") - held
    folded = arguments.institutions * before.num_bytes
    assert before.updated(result).validate_against(before, residual=True) is None
    print(
        json.dumps(
            {
                "strategy": arguments.strategy,
                "institutions": arguments.institutions,
                "layers": arguments.layers,
                "adapter_mib": round_to(before.num_bytes / 2**20),
                "peak_adapters": round_to(peak / before.num_bytes),
                "peak_mib": round_to(peak / 2**20),
                "seconds": round_to(seconds),
                "gb_per_second": round_to(folded / seconds / 1e9),
                "gb_per_processor_second": round_to(folded / busy / 1e9),
            }
        )
    )


def round_to(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
