"""All updates of a round in a fixed order, for strategies that cannot fold them in one by one."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import contextlib
import math
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from fedlora.models.adapters import factor_names
from fedlora.wire import wire
from fedlora.wire.messages import ClientUpdate
from strategies.base import Round, Weighted
from strategies.products import Product

MAX_MEMORY = 128 * 2**20
"""Bytes of updates in memory; later updates wait on disk."""


class Collected:
    """Updates sorted by institution, to be read whole or tensor by tensor.

    Attributes:
        institutions: Their names, sorted.
        weights: The weight of each, not normalised.
        shares: The weights divided by their sum.
    """

    def __init__(self, entries: Sequence[tuple[str, float, ClientUpdate | Path]]) -> None:
        ordered = sorted(entries, key=lambda entry: entry[0])
        self.institutions = [name for name, _, _ in ordered]
        self.weights = [weight for _, weight, _ in ordered]
        total = math.fsum(self.weights)
        self.shares = [weight / total for weight in self.weights]
        self._held = [held for _, _, held in ordered]

    def __len__(self) -> int:
        return len(self._held)

    def tensors(self, name: str) -> list[torch.Tensor]:
        """The tensor of this name of every update, float32."""
        return [
            _tensor(held, name) if isinstance(held, Path) else held.adapter[name]
            for held in self._held
        ]

    def products(self, this_round: Round, path: str) -> list[Product]:
        """Each update's product in the layer at a module path, with its share and scale."""
        a, b = (self.tensors(name) for name in factor_names(path))
        return [
            (share * this_round.scale(len(right)), left, right)
            for share, left, right in zip(self.shares, b, a, strict=True)
        ]

    def mean(self, name: str) -> torch.Tensor:
        """The weighted mean of this tensor, float32; summed in float64."""
        return sum(
            (t.double() * p for p, t in zip(self.shares, self.tensors(name), strict=True)),
            start=torch.zeros((), dtype=torch.float64),
        ).float()

    def weighted(self, weights: Sequence[float]) -> Iterator[Weighted]:
        """The updates under other weights, one at a time; those of weight 0 are left out."""
        for held, weight in zip(self._held, weights, strict=True):
            if weight:
                yield (
                    wire.update_from_bytes(held.read_bytes()) if isinstance(held, Path) else held,
                    weight,
                )


@contextlib.contextmanager
def collect(updates: Iterable[Weighted]) -> Generator[Collected]:
    """All updates; those beyond `MAX_MEMORY` are in a directory in ``TMPDIR`` until the end.

    Args:
        updates: Updates of different institutions, in any order.
    """
    entries: list[tuple[str, float, ClientUpdate | Path]] = []
    with tempfile.TemporaryDirectory(prefix="fedlora-round-") as folder:
        room = MAX_MEMORY
        for update, weight in updates:
            held: ClientUpdate | Path = update
            room -= update.adapter.num_bytes
            if room < 0:
                held = Path(folder) / str(len(entries))
                held.write_bytes(wire.update_to_bytes(update))
            entries.append((update.institution, weight, held))
            del update, held  # frees memory before the next one arrives
        yield Collected(entries)


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)
